"""Numbers behind the heat maps: agreement of the agents' masks, overlap of classes.

Both are Jaccard indices, ``|a ∩ b| / |a ∪ b|``: the share of what both have in what one
of them has. Among equal bits, common zeros would count, of which sparse masks are full;
and classes could not be measured by the same rule.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flower_mcepl.record.reading import Run
from flower_mcepl.report.final_masks import Masks

Matrix = NDArray[np.float64]
_NUMBER = re.compile("[0-9]{1,18}")  # of a class; anybody's text may stand in its place
_COLUMNS = 1 << 16  # weights at a time: memory stays small whatever the model


@dataclass(frozen=True)
class Agreement:
    """Two matrices over the same agents, in the same order."""

    # by their classes, so that neighbors in the picture hold much in common
    agents: tuple[int, ...]
    masks: Matrix
    classes: Matrix | None  # None: the record does not tell every agent's classes
    # what `masks` would be off the diagonal, were the kept weights of each layer drawn
    # at random
    by_chance: float
    range: tuple[float, float]  # least and most of `masks` off the diagonal
    # Pearson's, between both matrices over all pairs; None where one of them is
    # constant
    correlation: float | None


def agreement_of(masks: Mapping[int, Masks], classes: Mapping[int, frozenset[str]]) -> Agreement:
    """Agreement of masks and, where all agents tell theirs, overlap of classes."""
    known = set(masks) <= set(classes)
    order = {agent: (_class_order(classes[agent]) if known else [], agent) for agent in masks}
    agents = tuple(sorted(masks, key=order.__getitem__))
    in_order = [masks[agent] for agent in agents]
    agree = _mask_jaccard(in_order)
    overlap = _class_jaccard([classes[agent] for agent in agents]) if known else None
    pairs = agree[np.triu_indices(len(agents), 1)]
    extremes = (float(pairs.min(initial=1.0)), float(pairs.max(initial=0.0)))
    return Agreement(
        agents, agree, overlap, _by_chance(in_order), extremes, _correlation(agree, overlap)
    )


def classes_of(run: Run) -> dict[int, frozenset[str]]:
    """Classes of the agents that tell them, in a handshake's text or a list."""
    held = {agent: handshake.get("classes") for agent, handshake in run.handshakes.items()}
    return {
        agent: frozenset(names.split() if isinstance(names, str) else map(str, names))
        for agent, names in held.items()
        if names
    }


def _class_order(classes: frozenset[str]) -> list[tuple[int, str]]:
    return sorted((int(name) if _NUMBER.fullmatch(name) else -1, name) for name in classes)


def _mask_jaccard(masks: Sequence[Masks]) -> Matrix:
    both = np.zeros((len(masks), len(masks)))
    for name in masks[0]:
        rows = np.stack([layers[name].reshape(-1) for layers in masks])
        for start in range(0, rows.shape[1], _COLUMNS):
            block = torch.from_numpy(rows[:, start : start + _COLUMNS]).float()
            both += (block @ block.T).numpy()  # exact: sums of at most 2^16 ones
    return _jaccard(both)


def _class_jaccard(classes: Sequence[frozenset[str]]) -> Matrix:
    return _jaccard(np.array([[len(a & b) for b in classes] for a in classes], dtype=np.float64))


def _jaccard(both: Matrix) -> Matrix:
    sizes = np.diag(both)
    either = sizes[:, None] + sizes[None] - both
    # two empty sets are equal
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def _by_chance(masks: Sequence[Masks]) -> float:
    """Mean over pairs of expected intersection by expected union, masks random."""
    sizes = np.array([mask.size for mask in masks[0].values()], dtype=np.float64)
    dense = np.array([[mask.mean() for mask in layers.values()] for layers in masks])
    both = (dense * sizes) @ dense.T
    kept = dense @ sizes
    pairs = np.triu_indices(len(masks), 1)
    either = (kept[:, None] + kept[None] - both)[pairs]
    return float((both[pairs] / either).mean()) if either.size and either.all() else 1.0


def _correlation(agree: Matrix, overlap: Matrix | None) -> float | None:
    if overlap is None:
        return None
    pairs = np.triu_indices(len(agree), 1)
    left, right = agree[pairs], overlap[pairs]
    if left.size < 2 or not left.std() or not right.std():
        return None
    return float(np.corrcoef(left, right)[0, 1])
