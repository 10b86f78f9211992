"""Masks in a state: what was heard from the neighbors, and the agent's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.algorithm import Masks
from flower_mcepl.agents.parts.depth import fitting
from flower_mcepl.agents.parts.groups import Shapes, groups_of
from flower_mcepl.config.patterns import best_key
from flower_mcepl.config.ratios import per_layer
from flower_mcepl.errors import StateError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.gates import GATES, LAYER, MaskRules, gate_name, masks_of
from flower_mcepl.masks.layers import CONV, LINEAR, LayerSpec
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.retention import Retention, resolve_retention

# facts of a state: of how many neighbors n is; how many of them hold a layer, where
# those are fewer
NEIGHBORS, HOLDERS = "num-neighbors", "holders"
STRENGTH = "fusion-strength"  # fact of a state, where it is not 1
# facts of a state with gates: share of the filters that are to go that is on still, and
# groups of the transposed convolutions that have any
OPENING, TRANSPOSED = "filters-opening", "transposed-groups"
KINDS = "layer-kinds"  # fact of a state: kinds of layers that are not those of their shapes
SHARE = "filters-share"  # fact of a state whose device chooses its share of filters
IN_BLOCKS = "block-layers"  # fact of a state: layers that keep 2 of every 4 inputs


def rules_facts(model: MaskedModel) -> dict[str, Any]:
    """What a state must say of its kinds of layers, gates and blocks; often nothing."""
    rules, layers = model.rules, model.layers
    kinds = {n: spec.kind for n, spec in layers.items() if spec.kind != _kind_of(spec.shape)}
    facts = {
        **({KINDS: kinds} if kinds else {}),
        **({IN_BLOCKS: [*rules.blocks]} if rules.blocks else {}),
    }
    if not rules.filters:
        return facts
    groups = {n: g for n in rules.filters if (g := layers[n].transposed_groups)}
    return {**facts, OPENING: rules.opening, **({TRANSPOSED: groups} if groups else {})}


def _kind_of(shape: Sequence[int]) -> str:
    """Kind of a layer by the shape of its weight; a bilinear one has another."""
    return CONV if len(shape) > 2 else LINEAR


# A state travels to and from the agent with every message of a simulation, so what was
# heard is kept small: where n is the plain mean of masks, as in all rules of this
# package, as whole numbers of neighbors, a byte a weight in place of four. Any other
# rule's n is kept as it is. Both give n again, bit for bit.
def heard_group(model: MaskedModel) -> dict[str, Mapping[str, Tensor]]:
    """Return ``n`` as a group of a state; no tensors where nobody was heard."""
    means = {name: n for name, n in model.neighbor_means.items() if n is not None}
    counts = {
        name: count
        for name, n in means.items()
        if (count := maths.count_of_mean(n, num_neighbors=model.num_holders(name))) is not None
    }
    return {"neighbor-count": counts} if len(counts) == len(means) else {"neighbor-mean": means}


@dataclass(frozen=True)
class HeardBy:
    """Number of neighbors that ``n`` in a state is of, layer by layer."""

    number: int
    holders: Mapping[str, int]  # fewer of them, in layers that not all of them hold
    shapes: Shapes  # of the layers that any of them holds

    def of(self, name: str) -> int:
        """Number of neighbors that hold a layer."""
        return self.holders.get(name, self.number)


def heard_facts(model: MaskedModel, shapes: Shapes) -> dict[str, Any]:
    """What a state must say of ``n``: of how many neighbors it is."""
    number = model.num_neighbors
    holders = {name: k for name in shapes if (k := model.num_holders(name)) != number}
    return {NEIGHBORS: number, **({HOLDERS: holders} if holders else {})}


def read_heard(facts: Mapping[str, Any], shapes: Shapes, *, whose: str) -> HeardBy:
    """Read what `heard_facts` gave, for layers of these shapes.

    Raises
    ------
    StateError
        If it is missing, or no number of neighbors.
    """
    number, holders = facts.get(NEIGHBORS, -1), facts.get(HOLDERS, {})
    if (
        not _is_count(number)
        or not isinstance(holders, dict)
        or not all(name in shapes and _is_count(k) and k < number for name, k in holders.items())
    ):
        raise StateError(
            f"the saved state of {whose} does not say its {NEIGHBORS}, and how many of them hold "
            "each layer. Start afresh."
        )
    held = {name: shape for name, shape in shapes.items() if holders.get(name, 1)}
    return HeardBy(number, holders, held)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def heard_means(groups: Mapping[str, Mapping[str, Tensor]], heard_by: HeardBy) -> dict[str, Tensor]:
    """Undo `heard_group`."""
    if "neighbor-mean" in groups:
        return dict(groups["neighbor-mean"])
    return {
        name: maths.neighbor_mean(count, num_neighbors=heard_by.of(name))
        for name, count in groups.get("neighbor-count", {}).items()
    }


def final_masks(state: AgentState, parameters: Mapping[str, Any]) -> Masks | str:
    """Read an agent's own masks, those that travel, from its state; or say why not."""
    if parameters.get("retention") is None:
        return "the record lacks the agents' retention ratios, without which scores make no mask"
    groups = groups_of(state)
    scores = groups["scores"]
    shapes = {name: tuple(z.shape) for name, z in scores.items()}
    heard_by = read_heard({NEIGHBORS: 0, **state.facts}, shapes, whose="an agent")
    rank = FUSIONS.find(parameters.get("fusion", "mcepl")).rank
    strength = float(state.facts.get(STRENGTH, 1.0))
    means = {
        name: n if strength == 1 else strength * n
        for name, n in heard_means(groups, heard_by).items()
    }
    transposed, kinds = state.facts.get(TRANSPOSED, {}), state.facts.get(KINDS, {})
    layers = {
        name: LayerSpec(name, kinds.get(name, _kind_of(z.shape)), z.shape, transposed.get(name, 0))
        for name, z in scores.items()
        if not name.endswith(GATES)
    }
    y = {name: rank(z, means[name]) if name in means else z for name, z in scores.items()}
    masks = masks_of(y, layers, _rules(state, parameters, layers, scores))
    return {name: masks[name].numpy() for name in layers}


def _rules(
    state: AgentState,
    parameters: Mapping[str, Any],
    layers: Mapping[str, LayerSpec],
    scores: Mapping[str, Tensor],
) -> MaskRules:
    of_layers = per_layer("filters-layers", parameters.get("filters_layers", ""))
    share = float(state.facts.get(SHARE, parameters.get("filters", 1.0)))
    keys = {name: best_key(name, of_layers) for name in layers if gate_name(name) in scores}
    return MaskRules(
        retention=resolve_retention(_fitting(parameters["retention"], layers), layers),
        filters={n: share if key is None else of_layers[key] for n, key in keys.items()},
        budget=parameters.get("retention_budget", LAYER),
        opening=float(state.facts.get(OPENING, 0.0)),
        blocks=tuple(state.facts.get(IN_BLOCKS, ())),
    )


def _fitting(retention: Retention, layers: Mapping[str, LayerSpec]) -> Retention:
    """Ratios without those of layers that a shallow agent does not hold."""
    if not isinstance(retention, Mapping):
        return retention
    kinds = {key: value for key, value in retention.items() if key in (CONV, LINEAR)}
    return {**fitting(retention, layers), **kinds}
