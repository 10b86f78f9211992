"""Masks in a state: what was heard from the neighbors, and the agent's own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.algorithm import Masks
from flower_mcepl.agents.parts.groups import groups_of
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.layers import CONV, LINEAR, LayerSpec
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.retention import resolve_retention

STRENGTH = "fusion-strength"  # fact of a state, where it is not 1


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
    retention = parameters.get("retention")
    if retention is None:
        return "the record lacks the agents' retention ratios, without which scores make no mask"
    groups = groups_of(state)
    rank = FUSIONS.find(parameters.get("fusion", "mcepl")).rank
    strength = float(state.facts.get(STRENGTH, 1.0))
    means = {
        name: n if strength == 1 else strength * n
        for name, n in heard_means(groups, int(state.facts.get("num-neighbors", 0))).items()
    }
    kinds = {
        name: LayerSpec(name, CONV if z.dim() > 2 else LINEAR, z.shape)
        for name, z in groups["scores"].items()
    }
    ratios = resolve_retention(retention, kinds)
    return {
        name: maths.topk_mask(
            rank(z, means[name]) if name in means else z, retention=ratios[name]
        ).numpy()
        for name, z in groups["scores"].items()
    }
