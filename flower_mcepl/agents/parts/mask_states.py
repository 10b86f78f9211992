"""Masks in a state: what was heard from the neighbors, and the agent's own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.algorithm import Masks
from flower_mcepl.agents.parts.groups import groups_of
from flower_mcepl.config.patterns import best_key
from flower_mcepl.config.ratios import per_layer
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.gates import GATES, LAYER, MaskRules, gate_name, masks_of
from flower_mcepl.masks.layers import CONV, LINEAR, LayerSpec
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.retention import resolve_retention

STRENGTH = "fusion-strength"  # fact of a state, where it is not 1
# facts of a state with gates: share of the filters that are to go that is on still, and
# groups of the transposed convolutions that have any
OPENING, TRANSPOSED = "filters-opening", "transposed-groups"
SHARE = "filters-share"  # fact of a state whose device chooses its share of filters


def rules_facts(model: MaskedModel) -> dict[str, Any]:
    """What a state must say of its gates, besides their scores; nothing without any."""
    rules, layers = model.rules, model.layers
    if not rules.filters:
        return {}
    groups = {n: g for n in rules.filters if (g := layers[n].transposed_groups)}
    return {OPENING: rules.opening, **({TRANSPOSED: groups} if groups else {})}


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
        if (count := maths.count_of_mean(n, num_neighbors=model.num_neighbors)) is not None
    }
    return {"neighbor-count": counts} if len(counts) == len(means) else {"neighbor-mean": means}


def heard_means(
    groups: Mapping[str, Mapping[str, Tensor]], num_neighbors: int
) -> dict[str, Tensor]:
    """Undo `heard_group`."""
    if "neighbor-mean" in groups:
        return dict(groups["neighbor-mean"])
    return {
        name: maths.neighbor_mean(count, num_neighbors=num_neighbors)
        for name, count in groups.get("neighbor-count", {}).items()
    }


def final_masks(state: AgentState, parameters: Mapping[str, Any]) -> Masks | str:
    """Read an agent's own masks, those that travel, from its state; or say why not."""
    if parameters.get("retention") is None:
        return "the record lacks the agents' retention ratios, without which scores make no mask"
    groups = groups_of(state)
    rank = FUSIONS.find(parameters.get("fusion", "mcepl")).rank
    strength = float(state.facts.get(STRENGTH, 1.0))
    means = {
        name: n if strength == 1 else strength * n
        for name, n in heard_means(groups, int(state.facts.get("num-neighbors", 0))).items()
    }
    scores = groups["scores"]
    transposed = state.facts.get(TRANSPOSED, {})
    layers = {
        name: LayerSpec(name, CONV if z.dim() > 2 else LINEAR, z.shape, transposed.get(name, 0))
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
        retention=resolve_retention(parameters["retention"], layers),
        filters={n: share if key is None else of_layers[key] for n, key in keys.items()},
        budget=parameters.get("retention_budget", LAYER),
        opening=float(state.facts.get(OPENING, 0.0)),
    )
