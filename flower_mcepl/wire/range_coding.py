"""Range coding of bits in groups: how the wire comes far below one bit per weight.

Weights are sorted into groups whose bits look alike; in each group the positions of the
rarer bit are coded. All models are binary and all frequencies are integers, so that
`constriction` and any other range coder agree on them bit for bit;
``docs/wire-format.md`` says how.
"""

from dataclasses import dataclass

import constriction
import numpy as np
from numpy.typing import NDArray

from flower_mcepl.errors import CorruptFrameError

FREQUENCY_BITS = 24  # a frequency f means the probability f / 2**24
BITWISE = 16  # a group is coded bit by bit where over one in so many is the rarer bit
AT_ONCE = 1 << 13  # gaps read in one go: no frame makes its reader allocate much

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]

_queue = constriction.stream.queue
_BINARY = constriction.stream.model.Categorical(perfect=False)
_ONE = 1 << FREQUENCY_BITS
_X_BITS = np.uint64(32)


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
    pairs = np.stack([_ONE - 1 - frequency, frequency - 1], axis=1).astype(np.float32)
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
        by_class = np.stack([np.diff(begins) for _, begins in self._sets], axis=1).reshape(-1)
        self.sizes: Ints = np.concatenate(
            [np.array([len(r) for r in self._recent], np.int64), by_class]
        )

    def ranks(self, weights: Ints) -> tuple[Ints, Ints]:
        """Number of ``weights`` (ascending) in each group, and their ranks by group."""
        groups, ranks = [], []
        for bit, members in enumerate(self._recent):
            at = _find(members, weights)
            groups.append(np.full(len(at), bit))
            ranks.append(at)
        places = weights if self._classes is None else np.sort(self._classes.place[weights])
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
        writer.write(*_digits(counts, _count_table(sizes, int(counts.sum()))))
    rare, bitwise = _rare(sizes, counts)
    spots = _turn(sizes, counts, ranks)
    gaps = np.diff(spots, prepend=0) - 1
    starts = (np.cumsum(rare) - rare)[rare > 0]
    gaps[starts] = spots[starts]
    table = _gap_table(sizes, np.where(bitwise, 0, rare))
    sparse = np.repeat(~bitwise, rare)
    writer.write(*_digits(gaps[sparse], table, np.repeat(np.arange(len(sizes)), rare)[sparse]))
    ends = np.cumsum(rare)
    for group in np.flatnonzero(bitwise):
        bits = np.zeros(sizes[group], np.bool_)
        bits[spots[ends[group] - rare[group] : ends[group]]] = True
        writer.write(bits, _share(rare[group], sizes[group]))


def read_positions(reader: BitReader, sizes: Ints, total: int) -> tuple[Ints, Ints]:
    """The counts and the ranks, as given to `write_positions`."""
    counts = np.array([total])
    if len(sizes) > 1:
        counts = _read_digits(reader, _count_table(sizes, total))
    if counts.sum() != total or np.any(counts > sizes):
        raise CorruptFrameError(
            f"the groups hold {counts.sum()} positions instead of {total}, or more than fit"
        )
    rare, bitwise = _rare(sizes, counts)
    group = np.repeat(np.arange(len(sizes)), rare)
    sparse = ~bitwise[group]
    table, row = _gap_table(sizes, np.where(bitwise, 0, rare)), group[sparse]
    pieces = [
        _read_digits(reader, table, row[at : at + AT_ONCE]) for at in range(0, len(row), AT_ONCE)
    ]
    gaps = np.concatenate([np.zeros(0, np.int64), *pieces])
    spots = np.zeros(len(group), np.int64)
    along = np.cumsum(gaps + 1)
    own = np.where(bitwise, 0, rare)
    # where each group's first gap begins
    before = np.concatenate([[0], along])[np.cumsum(own) - own]
    spots[sparse] = along - np.repeat(before, own) - 1
    ends = np.cumsum(rare)
    for g in np.flatnonzero(bitwise):
        places = np.flatnonzero(reader.read(int(sizes[g]), _share(rare[g], sizes[g])))
        if len(places) != rare[g]:
            raise CorruptFrameError(f"a group holds {len(places)} positions instead of {rare[g]}")
        spots[ends[g] - rare[g] : ends[g]] = places
    if np.any(spots >= sizes[group]):
        raise CorruptFrameError("a position lies beyond its group")
    return counts, _turn(sizes, counts, spots, back=True)


def estimate_bits(sizes: Ints, counts: Ints) -> float:
    """Approximate size in bits of what `write_positions` writes."""
    total = int(counts.sum())
    share = counts / np.maximum(sizes, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nan_to_num(share * np.log2(share)) - np.nan_to_num(
            (1 - share) * np.log2(1 - share)
        )
    bits = float(np.sum(sizes * entropy))
    if len(sizes) > 1:
        digits, frequency = _digits(counts, _count_table(sizes, total))
        bits -= float(np.sum(np.log2(np.where(digits, frequency, _ONE - frequency) / _ONE)))
    return bits


def _rare(sizes: Ints, counts: Ints) -> tuple[Ints, Bits]:
    """Number of the rarer bit in each group, and which groups are coded bit by bit."""
    rare = np.minimum(counts, sizes - counts)
    return rare, rare * BITWISE > sizes


def _turn(sizes: Ints, counts: Ints, spots: Ints, *, back: bool = False) -> Ints:
    """Where over half of a group is taken, the ranks left out instead; or ``back``."""
    turned = 2 * counts > sizes
    if not turned.any():
        return spots
    lengths = np.minimum(counts, sizes - counts) if back else counts
    parts = np.split(spots, np.cumsum(lengths)[:-1])
    for group in np.flatnonzero(turned):
        others = np.ones(sizes[group], np.bool_)
        others[parts[group]] = False
        parts[group] = np.flatnonzero(others)
    return np.concatenate(parts)


def _share(count: np.int64, size: np.int64) -> Ints:
    return np.array([np.clip((int(count) << FREQUENCY_BITS) // int(size), 1, _ONE - 1)])


# A number with a geometric distribution, P(k) ~ x**k, has independent binary digits:
# digit b is 1 with the probability x**2**b / (1 + x**2**b). So numbers are written
# digit by digit, lowest first, each at its own frequency. A table has a row for each
# distribution and a column for each digit; 0 stands where the numbers have no such
# digit.


def _count_table(sizes: Ints, total: int) -> Ints:
    """Frequencies of each group's count, whose mean is its share of the total."""
    everything = int(sizes.sum())
    ratios = [((total * size) << 32) // (everything + total * size or 1) for size in sizes.tolist()]
    return _table(ratios, [min(size, total) for size in sizes.tolist()])


def _gap_table(sizes: Ints, rare: Ints) -> Ints:
    """Frequencies of each group's gaps between positions."""
    pairs = list(zip(sizes.tolist(), rare.tolist(), strict=True))
    return _table(
        [((size - n) << 32) // max(size, 1) for size, n in pairs],
        [(size - n) * (n > 0) for size, n in pairs],
    )


def _table(ratios: list[int], largest: list[int]) -> Ints:
    """Frequencies for each x, in units of 2**-32, and largest number that may occur."""
    lengths = np.array([value.bit_length() for value in largest])
    x = np.array([min(ratio, (1 << 32) - 1) for ratio in ratios], np.uint64)
    # x ** 2**digit
    powers = np.empty((int(lengths.max(initial=0)), len(ratios)), np.uint64)
    for digit in range(len(powers)):
        powers[digit] = x
        x = (x * x) >> _X_BITS
    frequency = (powers << np.uint64(FREQUENCY_BITS)) // (powers + (np.uint64(1) << _X_BITS))
    has = np.arange(len(powers))[:, None] < lengths
    return np.asarray(
        np.where(has, np.maximum(frequency, np.uint64(1)), np.uint64(0)).T.astype(np.int64)
    )


def _digits(numbers: Ints, table: Ints, row: Ints | None = None) -> tuple[Bits, Ints]:
    """The digits of all numbers, number after number, and their frequencies."""
    frequency = table if row is None else table[row]
    digits = (numbers[:, None] >> np.arange(table.shape[1])) & 1
    has = frequency > 0
    return digits[has].astype(np.bool_), frequency[has]


def _read_digits(reader: BitReader, table: Ints, row: Ints | None = None) -> Ints:
    frequency = table if row is None else table[row]
    has = frequency > 0
    digits = np.zeros(frequency.shape, np.int64)
    digits[has] = reader.read(int(has.sum()), frequency[has])
    return np.asarray(digits @ (1 << np.arange(table.shape[1])))
