"""Masks of the agents at the end of a run, from the states that it left.

Each algorithm knows how its own states are read (`Algorithm.final_masks`).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.agents import ALGORITHMS, AgentState, find_algorithm, load_state
from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.record.reading import Run

Masks = dict[str, NDArray[np.bool_]]
"""One agent's mask by layer."""


def final_masks(run: Run) -> tuple[dict[int, Masks], str | None]:
    """Final mask of each agent, layers in a natural order; or nothing, and why.

    Of mask averaging it is the agent's own mask, the one that travels, not the mean
    under which its network lives.
    """
    if not run.agents:
        return (
            {},
            "the record has no agents/ with final states, which runs on devices and older runs do "
            "not leave",
        )
    masks: dict[int, Masks] = {}
    try:
        for agent, file in run.agents.items():
            own = _masks_of(load_state(file), run.handshakes.get(agent, {}))
            if isinstance(own, str):
                return {}, own
            masks[agent] = own
    except FlowerMceplError as error:
        return {}, str(error)
    shapes = {name: mask.shape for layers in masks.values() for name, mask in layers.items()}
    if any(m.shape != shapes[name] for layers in masks.values() for name, m in layers.items()):
        return {}, "the agents' masks are not of the same layers"
    return masks, None


def common_layers(masks: Mapping[int, Masks]) -> dict[int, Masks]:
    """The masks of those layers that all agents hold; they may differ in depth."""
    first, *others = masks.values()
    names = [name for name in first if all(name in other for other in others)]
    return {agent: {name: layers[name] for name in names} for agent, layers in masks.items()}


def all_layers(masks: Mapping[int, Masks]) -> list[str]:
    """Names of the layers that any agent holds, in a natural order."""
    return sorted({name for layers in masks.values() for name in layers}, key=_natural)


def _masks_of(state: AgentState, handshake: Mapping[str, Any]) -> Masks | str:
    name = str(state.facts.get("algorithm"))
    if name not in ALGORITHMS:
        return (
            f"no package that is installed here gives the algorithm {name}, which reads its masks"
        )
    masks = find_algorithm(name).masks_of(state, handshake.get("parameters", {}))
    return masks if isinstance(masks, str) else _ordered(masks)


def _ordered(masks: Masks) -> Masks:
    """Masks with ``layers.4`` before ``layers.11``."""
    return {name: masks[name] for name in sorted(masks, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"([0-9]{1,18})", name)
    ]
