"""The agents' masks at the end of a run, from the states that it left.

Some states hold the mask. Those of MCE-PL hold what the mask is made of: scores ``z``,
the sum of the neighbors' masks and their number; with the retention ratio in the record
the mask is the agent's own, bit for bit.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.agents.agent import AgentState, load_state
from flower_mcepl.agents.parts.groups import split_groups
from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import CONV, LINEAR, LayerSpec
from flower_mcepl.masks.retention import Retention, resolve_retention
from flower_mcepl.record.reading import Run

Masks = dict[str, NDArray[np.bool_]]
"""One agent's mask by layer."""

# their masks rank y, which holds the neighbors' masks
_NEIGHBORS_LIFT = ("mcepl", "mcepl-no-finetuning")
_SCORES_ALONE = ("local-masks", "mask-averaging")  # the others' rank |z|


def final_masks(run: Run) -> tuple[dict[int, Masks], str | None]:
    """Return each agent's final mask, layers in a natural order; or nothing, and why.

    Of mask averaging it is the agent's own mask, the one that travels, not the mean
    under which its network lives.
    """
    if not run.agents:
        return (
            {},
            "the record has no agents/ with final states, which runs on devices and older runs do "
            "not leave",
        )
    entries = {
        int(entry["agent"]): entry for entry in run.config.get("agents") or [] if "agent" in entry
    }
    masks: dict[int, Masks] = {}
    try:
        for agent, file in run.agents.items():
            found = _masks_of(load_state(file), entries.get(agent, {}))
            if isinstance(found, str):
                return {}, found
            masks[agent] = found
    except FlowerMceplError as error:
        return {}, str(error)
    shapes = [{name: mask.shape for name, mask in layers.items()} for layers in masks.values()]
    if any(other != shapes[0] for other in shapes):
        return {}, "the agents' masks are not of the same layers"
    return masks, None


def _masks_of(state: AgentState, entry: Mapping[str, Any]) -> Masks | str:
    algorithm = str(state.facts.get("algorithm"))
    groups = split_groups(state.tensors, device="cpu")
    if "held" in groups:  # sparse weights: the mask under which they are
        return _ordered(groups["held"])
    if algorithm not in (*_NEIGHBORS_LIFT, *_SCORES_ALONE) or "scores" not in groups:
        return f"agents of {algorithm} hold no mask at the end"
    retention = (entry.get("parameters") or {}).get("retention")
    if retention is None:
        return "the record does not tell the agents' retention ratios, without which scores make no mask"
    counts = groups.get("neighbor-count", {}) if algorithm in _NEIGHBORS_LIFT else {}
    return _ordered(
        _ranked(groups["scores"], counts, int(state.facts.get("num-neighbors", 0)), retention)
    )


def _ranked(
    scores: Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    num_neighbors: int,
    retention: Retention,
) -> dict[str, Tensor]:
    kinds = {
        name: LayerSpec(name, CONV if z.dim() > 2 else LINEAR, z.shape)
        for name, z in scores.items()
    }
    ratios = resolve_retention(retention, kinds)
    masks = {}
    with torch.no_grad():
        for name, z in scores.items():
            count = counts.get(name)
            n = None if count is None else maths.neighbor_mean(count, num_neighbors=num_neighbors)
            y = z if n is None else maths.aggregate_scores(z, n)
            masks[name] = maths.topk_mask(y, retention=ratios[name])
    return masks


def _ordered(masks: Mapping[str, Tensor]) -> Masks:
    """Return NumPy masks, ``layers.4`` before ``layers.11``."""
    return {name: masks[name].bool().numpy() for name in sorted(masks, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
