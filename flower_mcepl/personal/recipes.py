"""Recipes of frozen weights: how those that a mask leaves on come back without bytes.

A weight that is off is +0. Every function handles one layer, flat.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.personal.elements import from_bytes
from flower_mcepl.personal.layout import (
    LIVE,
    SIGNS,
    TERNARY,
    UNIFORMS,
    Draw,
    Entry,
    pieces_by_seed,
)
from flower_mcepl.streams import mersenne_pieces
from flower_mcepl.wire import Prior

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
_LOW = 0xFFFFFF  # the bits of a word that torch makes a float32 of
SCORE_LEVELS, WEIGHT_LEVELS = 16, 2
OFF_ROW = SCORE_LEVELS * WEIGHT_LEVELS  # class of weights in a row that is all off


class Twisters:
    """Words that the tensors of a file ask for, each twister run once.

    What is skipped is not kept: a file cannot make its reader hold more words than it
    has weights.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._words: dict[tuple[Draw, int], Words] = {}
        for seed, pieces in pieces_by_seed(entries).items():
            for (skip, count), words in zip(pieces, mersenne_pieces(seed, pieces), strict=True):
                self._words[Draw(seed, skip), count] = words

    def words(self, draw: Draw, count: int) -> Words:
        """So many words from where the draw begins."""
        return self._words[draw, count]


def uniform(words: Words, bound: float) -> Floats:
    """Weights uniform in ±bound: ``u * 2**-24 * 2 b - b``, rounded once, to float32.

    In float64 each step before that is exact.
    """
    doubled = (words & _LOW).astype(np.float64) * (bound * 2**-23)
    return (doubled - bound).astype(np.float32)


def scaled(words: Words, bound: float, factor: float) -> Floats:
    """Weights uniform in ±bound, times a float32, rounded once more."""
    return uniform(words, bound) * np.float32(factor)


def restored(entry: Entry, on: NDArray[np.bool_], values: memoryview, twisters: Twisters) -> Tensor:
    """The flat tensor of an entry whose mask is ``on``, from its values in the file."""
    flat = torch.zeros(entry.numel, dtype=getattr(torch, entry.dtype))
    flat[torch.from_numpy(on)] = _live(entry, on, values, twisters)
    return flat


def _live(entry: Entry, on: NDArray[np.bool_], values: memoryview, twisters: Twisters) -> Tensor:
    dtype = getattr(torch, entry.dtype)
    if entry.recipe == LIVE:
        return from_bytes(values, entry.dtype)
    if entry.recipe == TERNARY:
        negative = np.unpackbits(np.frombuffer(values, np.uint8), count=int(on.sum())) == 1
        return _signed(negative, entry.magnitude, dtype)
    assert entry.draw is not None
    words = twisters.words(entry.draw, entry.numel)[on]
    if entry.recipe == SIGNS:
        return _signed(words & 1 == 0, entry.magnitude, dtype)
    assert entry.recipe in UNIFORMS
    return torch.from_numpy(scaled(words, entry.magnitude, entry.factor))


def _signed(negative: NDArray[np.bool_], magnitude: float, dtype: torch.dtype) -> Tensor:
    signs = torch.from_numpy(np.where(negative, -1.0, 1.0))
    return (signs * magnitude).to(dtype)


# The masks are range-coded with classes as the wire has them, here of whole numbers
# alone: how far a first score lay from zero decides how likely its weight is on at the
# end, and scores of larger weights move further. Rows that are off as a whole are
# classes of their own, and cost next to nothing.
def classes(entries: Sequence[Entry], twisters: Twisters) -> Prior | None:
    """Classes of weights by first scores, weights and rows; None: there are none."""
    labels = {
        entry.name: torch.from_numpy(_labels(entry, twisters)).view(entry.shape)
        for entry in entries
        if entry.scores is not None or entry.rows
    }
    return Prior(labels) if labels else None


def _labels(entry: Entry, twisters: Twisters) -> NDArray[np.uint8]:
    labels = np.zeros(entry.numel, np.int64)
    if entry.scores is not None:
        labels = _levels(twisters.words(entry.scores, entry.numel), SCORE_LEVELS)
        if entry.recipe in UNIFORMS and entry.draw is not None:
            sizes = _levels(twisters.words(entry.draw, entry.numel), WEIGHT_LEVELS)
            labels = labels * WEIGHT_LEVELS + sizes
    if entry.rows:
        off = np.unpackbits(np.frombuffer(entry.rows, np.uint8), count=entry.shape[0])
        labels[np.repeat(off == 1, entry.numel // entry.shape[0])] = OFF_ROW
    return labels.astype(np.uint8)


def _levels(words: Words, count: int) -> NDArray[np.int64]:
    """Level of each size ``|2 u - 2**24|``, ``count`` of equal width."""
    sizes = np.abs(2 * (words & _LOW).astype(np.int64) - 2**24)
    return np.asarray(np.minimum(sizes * count >> 24, count - 1))
