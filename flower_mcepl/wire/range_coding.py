"""Range coding of bits in groups: how the wire comes far below one bit per weight.

Weights are sorted into groups whose bits look alike; in each group the positions of the
rarer bit are coded. All models are binary and all frequencies are integers, so that
`constriction` and any other range coder agree on them bit for bit;
``docs/wire-format.md`` says how.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import constriction
import numpy as np
from numpy.typing import NDArray

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.wire.digits import (
    ONE,
    Bits,
    Ints,
    count_table,
    digits_of,
    frequency_of,
    gap_table,
    share_log2,
)

BITWISE = 16  # a group is coded bit by bit where over one in so many is the rarer bit
AT_ONCE = 1 << 13  # gaps or bits in one go: no frame makes its reader allocate much
SMALL = 1 << 10  # groups of at most so many weights are coded together, bit by bit

_queue = constriction.stream.queue
_BINARY = constriction.stream.model.Categorical(perfect=False)


class BitWriter:
    """Collects binary symbols, each under the frequency of its 1."""

    def __init__(self) -> None:
        self._coder = _queue.RangeEncoder()

    def write(self, bits: Bits, frequency: Ints) -> None:
        """Append bits; ``frequency`` is one for all (shape [1]) or one for each."""
        if bits.size:
            self._coder.encode(bits.astype(np.int32), *_models(frequency))

    def to_bytes(self) -> bytes:
        """All that was written, as little-endian 32-bit words."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class BitReader:
    """Reads back what a `BitWriter` wrote, given the same frequencies.

    Any bytes are safe to read from.
    """

    def __init__(self, data: memoryview) -> None:
        self._coder = _queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def read(self, count: int, frequency: Ints) -> Bits:
        """The next bits."""
        if count == 0:
            return np.zeros(0, np.bool_)
        models = _models(frequency)
        try:
            bits = self._coder.decode(*models, *([count] if len(models) == 1 else []))
        except AssertionError as error:  # constriction's way to say that no symbol fits
            raise CorruptFrameError(f"the range-coded bits cannot be read ({error})") from None
        return np.asarray(bits).astype(np.bool_)

    def at_end(self) -> bool:
        """Whether everything may have been read."""
        return bool(self._coder.maybe_exhausted())


def _models(frequency: Ints) -> tuple[object, ...]:
    """The models of bits with these frequencies, as constriction takes them."""
    # It adds 1 to each of the two integers, given as floats: exact under 2**24.
    pairs = np.empty((len(frequency), 2), np.float32)
    pairs[:, 0], pairs[:, 1] = ONE - 1 - frequency, frequency - 1
    if len(frequency) == 1:
        return (constriction.stream.model.Categorical(pairs[0], perfect=False),)
    return _BINARY, pairs


@dataclass(frozen=True)
class Classes:
    """The weights of a layer, sorted into classes that both ends know."""

    order: Ints  # weights by class, within a class by index
    place: Ints  # of each weight in ``order``
    starts: Ints  # where each class begins in ``order``, and at the end the number of weights

    @classmethod
    def of(cls, labels: NDArray[np.uint8]) -> "Classes":
        """Sort weights by their label, 0 to 255."""
        order = np.argsort(labels, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        starts = np.zeros(int(labels.max(initial=0)) + 2, np.int64)
        np.cumsum(np.bincount(labels, minlength=len(starts) - 1), out=starts[1:])
        return cls(order, place, starts)

    def among(self, live: Bits) -> "Classes":
        """The same classes of the live weights alone, numbered anew in their order."""
        chosen = live[self.order]
        order = (np.cumsum(live) - 1)[self.order[chosen]]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Classes(order, place, np.concatenate([[0], np.cumsum(chosen)])[self.starts])


# Why groups. Positions among n weights cost about n H(share) bits (H: binary entropy).
# H is concave: groups with different shares, each coded on its own, never cost more
# than all weights together, and much less where both ends know beforehand which weights
# are lively. They know three things. The last bit: where 3 of 10 weights are on, one
# that is on flips more often than one that is off, since as many come as go. What
# flipped a round ago: such a weight lies at the edge of being kept, and tends to flip
# back. The class: how far a score began from zero, and how fast it moves. The price of
# a group is its count, some 5 to 20 bits.
#
# Why ranks. A weight's index says little in a layer where most weights belong to other
# groups; among its own group alone the gaps between positions are geometric with one
# parameter, which the count gives. So index and rank must lead to each other for
# millions of weights, both ways, with a few array operations: `_sets` holds, for each
# last bit, the ascending places (by class, then by index) of its weights. Classes are
# consecutive ranges of them, so a group is a slice, and a rank a subtraction.


class Groups:
    """The groups of one layer's weights, and each weight's rank in its group.

    The rank is the weight's place among the others of the group, by index.

    Parameters
    ----------
    numel : int
        Number of weights.
    last : bool array [numel], optional
        The weights' bits in the reference. With it, group ``2c`` of class ``c`` holds
        the weights whose last bit is 0 and group ``2c + 1`` those with a 1; without it,
        group ``c`` is class ``c``.
    recent : int array, optional
        Weights (ascending) that flipped when the reference itself was sent; needs
        ``last``. They leave their classes for two groups of their own, by last bit,
        that come before all others.
    classes : Classes, optional
        Without it there is one class.
    """

    def __init__(
        self,
        numel: int,
        *,
        last: Bits | None = None,
        recent: Ints | None = None,
        classes: Classes | None = None,
    ) -> None:
        self._classes = classes
        starts = np.array([0, numel]) if classes is None else classes.starts
        self._recent: list[Ints] = []
        # The weights of one last bit, by class and index: their places in the order of
        # the classes (None: all places), and where each class begins among them.
        self._sets: list[tuple[Ints | None, Ints]] = [(None, starts)]
        if last is not None:
            in_order = last if classes is None else last[classes.order]
            absent = np.zeros(numel, np.bool_)
            if recent is not None:
                self._recent = [recent[~last[recent]], recent[last[recent]]]
                absent[recent if classes is None else classes.place[recent]] = True
            by_bit = np.flatnonzero(~(in_order | absent)), np.flatnonzero(in_order & ~absent)
            self._sets = [(places, np.searchsorted(places, starts)) for places in by_bit]
        by_class = np.stack([begins[1:] - begins[:-1] for _, begins in self._sets], axis=1)
        self.sizes: Ints = np.concatenate(
            [np.array([len(r) for r in self._recent], np.int64), by_class.reshape(-1)]
        )

    def ranks(self, weights: Ints) -> tuple[Ints, Ints]:
        """Number of ``weights`` (ascending) in each group, and their ranks by group."""
        groups, ranks = [], []
        for bit, members in enumerate(self._recent):
            at = _find(members, weights)
            groups.append(np.full(len(at), bit))
            ranks.append(at)
        places = weights
        if self._classes is not None:
            places = ascending(self._classes.place[weights], len(self._classes.place))
        for number, (chosen, begins) in enumerate(self._sets):
            at = places if chosen is None else _find(chosen, places)
            within = np.searchsorted(begins, at, side="right") - 1
            groups.append(len(self._recent) + within * len(self._sets) + number)
            ranks.append(at - begins[within])
        group = np.concatenate(groups)
        order = np.argsort(group, kind="stable")
        return np.bincount(group, minlength=len(self.sizes)), np.concatenate(ranks)[order]

    def weights(self, counts: Ints, ranks: Ints) -> Ints:
        """The weights of these ranks, in any order; the inverse of `ranks`."""
        group = np.repeat(np.arange(len(counts)), counts)
        pieces = [members[ranks[group == bit]] for bit, members in enumerate(self._recent)]
        group -= len(self._recent)
        for number, (chosen, begins) in enumerate(self._sets):
            mine = (group >= 0) & (group % len(self._sets) == number)
            at = ranks[mine] + begins[group[mine] // len(self._sets)]
            places = at if chosen is None else chosen[at]
            pieces.append(places if self._classes is None else self._classes.order[places])
        return np.asarray(np.concatenate(pieces))


def ascending(places: Ints, numel: int) -> Ints:
    """The places (all different, below ``numel``) sorted; many are faster marked."""
    if len(places) * BITWISE < numel:
        return np.sort(places)
    taken = np.zeros(numel, np.bool_)
    taken[places] = True
    return np.flatnonzero(taken)


def _find(members: Ints, wanted: Ints) -> Ints:
    """Ranks of those of ``wanted`` that are ``members``; both ascend."""
    at = np.searchsorted(members, wanted)
    if not len(members):
        return at[:0]
    return np.asarray(at[members[np.minimum(at, len(members) - 1)] == wanted])


def write_positions(writer: BitWriter, sizes: Ints, counts: Ints, ranks: Ints) -> None:
    """Write which ranks of each group are taken.

    The reader must know the sizes and the sum of the counts.
    """
    if len(sizes) > 1:
        writer.write(*digits_of(counts, count_table(sizes, int(counts.sum()))))
    rare, bitwise = _rare(sizes, counts)
    spots, own = _turn(sizes, counts, ranks), np.where(bitwise, 0, rare)
    row, sparse = np.repeat(np.arange(len(sizes)), own), np.repeat(~bitwise, rare)
    places, starts = spots[sparse], (np.cumsum(own) - own)[own > 0]
    gaps = places - 1
    gaps[1:] -= places[:-1]
    gaps[starts] = places[starts]
    writer.write(*digits_of(gaps, gap_table(sizes, own), row))
    wide, few = sizes[bitwise], rare[bitwise]
    bits = np.zeros(int(wide.sum()), np.bool_)
    bits[spots[~sparse] + np.repeat(np.cumsum(wide) - wide, few)] = True
    for stretch, frequency in _stretches(wide, few):
        writer.write(bits[stretch], frequency)


def read_positions(reader: BitReader, sizes: Ints, total: int) -> tuple[Ints, Ints]:
    """The counts and the ranks, as given to `write_positions`."""
    counts = np.array([total])
    if len(sizes) > 1:
        counts = _read_digits(reader, count_table(sizes, total))
    if counts.sum() != total or np.any(counts > sizes):
        raise CorruptFrameError(
            f"the groups hold {counts.sum()} positions instead of {total}, or more than fit"
        )
    rare, bitwise = _rare(sizes, counts)
    group = np.repeat(np.arange(len(sizes)), rare)
    sparse, own = ~bitwise[group], np.where(bitwise, 0, rare)
    table, row = gap_table(sizes, own), group[sparse]
    pieces = [
        _read_digits(reader, table, row[at : at + AT_ONCE]) for at in range(0, len(row), AT_ONCE)
    ]
    gaps = np.concatenate([np.zeros(0, np.int64), *pieces])
    spots = np.zeros(len(group), np.int64)
    along = np.cumsum(gaps + 1)
    # where each group's first gap begins
    before = np.concatenate([[0], along])[np.cumsum(own) - own]
    spots[sparse] = along - np.repeat(before, own) - 1
    spots[~sparse] = _read_bitwise(reader, sizes[bitwise], rare[bitwise])
    if np.any(spots >= sizes[group]):
        raise CorruptFrameError("a position lies beyond its group")
    return counts, _turn(sizes, counts, spots, back=True)


def _read_bitwise(reader: BitReader, sizes: Ints, rare: Ints) -> Ints:
    """Places of the rarer bit in the groups that are coded bit by bit."""
    bits = np.zeros(int(sizes.sum()), np.bool_)
    for stretch, frequency in _stretches(sizes, rare):
        bits[stretch] = reader.read(stretch.stop - stretch.start, frequency)
    starts, places = np.cumsum(sizes) - sizes, np.flatnonzero(bits)
    group = np.searchsorted(starts, places, side="right") - 1
    came = np.bincount(group, minlength=len(sizes))
    if (wrong := np.flatnonzero(came != rare)).size:
        raise CorruptFrameError(
            f"a group holds {came[wrong[0]]} positions instead of {rare[wrong[0]]}"
        )
    return np.asarray(places - starts[group])


def _stretches(sizes: Ints, rare: Ints) -> Iterator[tuple[slice, Ints]]:
    """Stretches of the groups' bits, end to end, with their frequencies.

    As many as a call of the coder takes.
    """
    shares = [frequency_of(n, size) for n, size in zip(rare.tolist(), sizes.tolist(), strict=True)]
    frequency, end = np.array(shares, np.int64), 0
    for batch in _batches(sizes.tolist()):
        start, end = end, end + int(sizes[batch].sum())
        alone = batch.stop - batch.start == 1
        yield (
            slice(start, end),
            frequency[batch] if alone else np.repeat(frequency[batch], sizes[batch]),
        )


def _batches(sizes: Sequence[int]) -> Iterator[slice]:
    """Groups that are coded in one call: small ones together, a large one alone.

    A call costs as much as some thousand bits, and a frequency for each bit twice as
    much as one for all.
    """
    begin = filled = 0
    for group, size in enumerate(sizes):
        room = size if size <= SMALL else AT_ONCE
        if filled + room > AT_ONCE:
            yield slice(begin, group)
            begin, filled = group, 0
        filled += room
    if filled:
        yield slice(begin, len(sizes))


def estimate_bits(sizes: Ints, counts: Ints) -> float:
    """Approximate size in bits of what `write_positions` writes."""
    total = int(counts.sum())
    share = counts / np.maximum(sizes, 1)
    bits = float(np.sum(sizes * (-share_log2(share) - share_log2(1 - share))))
    if len(sizes) > 1:
        digits, frequency = digits_of(counts, count_table(sizes, total))
        bits -= float(np.sum(np.log2(np.where(digits, frequency, ONE - frequency) / ONE)))
    return bits


def _rare(sizes: Ints, counts: Ints) -> tuple[Ints, Bits]:
    """Number of the rarer bit in each group, and which groups are coded bit by bit."""
    rare = np.minimum(counts, sizes - counts)
    return rare, rare * BITWISE > sizes


def _turn(sizes: Ints, counts: Ints, spots: Ints, *, back: bool = False) -> Ints:
    """Where over half of a group is taken, the ranks left out instead; or ``back``."""
    turned, rare = 2 * counts > sizes, np.minimum(counts, sizes - counts)
    if not turned.any():
        return spots
    before, after = (rare, counts) if back else (counts, rare)
    mine, wide = np.repeat(turned, before), sizes[turned]
    starts = np.cumsum(wide) - wide  # of the turned groups, end to end
    free = np.ones(int(wide.sum()), np.bool_)
    free[spots[mine] + np.repeat(starts, before[turned])] = False
    others = np.flatnonzero(free) - np.repeat(starts, after[turned])
    into = np.repeat(turned, after)
    result = np.empty(len(into), np.int64)
    result[into], result[~into] = others, spots[~mine]
    return result


def _read_digits(reader: BitReader, table: Ints, row: Ints | None = None) -> Ints:
    frequency = table if row is None else table[row]
    has = frequency > 0
    digits = np.zeros(frequency.shape, np.int64)
    digits[has] = reader.read(int(has.sum()), frequency[has])
    return np.asarray(digits @ (1 << np.arange(table.shape[1])))
