"""Range coding of bits in groups: how the wire comes far below one bit per weight.

Weights are sorted into groups whose bits look alike; in each group the positions of the
rarer bit are coded. All models are binary and all frequencies are integers, so that
`constriction` and any other range coder agree on them bit for bit;
``docs/wire-format.md`` says how.
"""

from collections.abc import Iterator, Sequence

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
from flower_mcepl.wire.groups import merge, select

BITWISE = 16  # a group is coded bit by bit where over one in so many is the rarer bit
AT_ONCE = 1 << 13  # gaps or bits in one go: no frame makes its reader allocate much
STEP = 1 << 16  # bits of one frequency in one go
SMALL = 1 << 10  # groups of at most so many gaps or bits are coded together

_queue = constriction.stream.queue
_BINARY = constriction.stream.model.Categorical(perfect=False)


class BitWriter:
    """Collects binary symbols, each under the frequency of its 1."""

    def __init__(self) -> None:
        self._coder = _queue.RangeEncoder()

    def write(self, bits: Bits, frequency: Ints) -> None:
        """Append bits; ``frequency`` is one for all (shape [1]) or one for each."""
        for part, models in _in_steps(len(bits), frequency):
            self._coder.encode(bits[part].astype(np.int32), *models)

    def write_numbers(self, numbers: Ints, row: Ints) -> None:
        """Append numbers, digit by digit; all have the same row of a table."""
        models = _models_of_digits(row, len(numbers))
        for at in range(0, len(numbers), AT_ONCE):
            octets = numbers[at : at + AT_ONCE].astype("<i8").view(np.uint8).reshape(-1, 8)
            digits = np.unpackbits(octets, axis=1, count=len(row), bitorder="little")
            self._coder.encode(digits.reshape(-1).astype(np.int32), _BINARY, models[: digits.size])

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
        bits = np.zeros(count, np.bool_)
        for part, models in _in_steps(count, frequency):
            bits[part] = self._decode(*models, *([len(bits[part])] if len(models) == 1 else []))
        return bits

    def read_numbers(self, count: int, row: Ints) -> Ints:
        """The next numbers; all have the same row of a table."""
        numbers = np.zeros(count, np.int64)
        models = _models_of_digits(row, count)
        values: Ints = 1 << np.arange(len(row))
        if len(row) < 32:  # the digits are int32, too
            values = values.astype(np.int32)
        for at in range(0, count, AT_ONCE):
            part = numbers[at : at + AT_ONCE]
            digits = self._decode(_BINARY, models[: part.size * len(row)])
            part[:] = digits.reshape(-1, len(row)) @ values
        return numbers

    def _decode(self, *models: object) -> Ints:
        try:
            return np.asarray(self._coder.decode(*models))
        except AssertionError as error:  # constriction's way to say that no symbol fits
            raise CorruptFrameError(f"the range-coded bits cannot be read ({error})") from None

    def at_end(self) -> bool:
        """Whether everything may have been read."""
        return bool(self._coder.maybe_exhausted())


def _in_steps(count: int, frequency: Ints) -> Iterator[tuple[slice, tuple[object, ...]]]:
    """The bits that a call of the coder takes, and their models."""
    if len(frequency) > 1:
        yield slice(0, count), (_BINARY, _pairs(frequency))
    elif count:
        model = constriction.stream.model.Categorical(_pairs(frequency)[0], perfect=False)
        for at in range(0, count, STEP):
            yield slice(at, min(at + STEP, count)), (model,)


def _models_of_digits(row: Ints, count: int) -> NDArray[np.float32]:
    """The models of the digits of so many numbers, or of as many as go at once."""
    return np.tile(_pairs(row), (min(count, AT_ONCE), 1))


def _pairs(frequency: Ints) -> NDArray[np.float32]:
    """The models of bits with these frequencies, as constriction takes them."""
    # It adds 1 to each of the two integers, given as floats: exact under 2**24.
    pairs = np.empty((len(frequency), 2), np.float32)
    pairs[:, 0], pairs[:, 1] = ONE - 1 - frequency, frequency - 1
    return pairs


def write_positions(writer: BitWriter, sizes: Ints, counts: Ints, ranks: Ints) -> None:
    """Write which ranks of each group are taken.

    The reader must know the sizes and the sum of the counts.
    """
    if len(sizes) > 1:
        writer.write(*digits_of(counts, count_table(sizes, int(counts.sum()))))
    rare, bitwise = _rare(sizes, counts)
    spots = _turn(sizes, counts, ranks)
    _write_gaps(writer, sizes, np.where(bitwise, 0, rare), select(~bitwise, rare, spots))
    if not bitwise.any():
        return
    wide, few = sizes[bitwise], rare[bitwise]
    bits = np.zeros(int(wide.sum()), np.bool_)
    bits[select(bitwise, rare, spots) + np.repeat(np.cumsum(wide) - wide, few)] = True
    for stretch, frequency in _stretches(wide, few):
        writer.write(bits[stretch], frequency)


def _write_gaps(writer: BitWriter, sizes: Ints, rare: Ints, places: Ints) -> None:
    """Write places by the gaps between them; ``rare`` in each group."""
    if not len(places):
        return
    gaps = places - 1
    gaps[1:] -= places[:-1]
    starts = (np.cumsum(rare) - rare)[rare > 0]
    gaps[starts] = places[starts]
    table, end = gap_table(sizes, rare), 0
    for batch in _batches(rare.tolist()):
        start, end = end, end + int(rare[batch].sum())
        if batch.stop - batch.start == 1:
            writer.write_numbers(gaps[start:end], _digits(table[batch.start]))
        else:
            row = np.repeat(np.arange(batch.start, batch.stop), rare[batch])
            writer.write(*digits_of(gaps[start:end], table, row))


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
    sparse = _read_gaps(reader, sizes, np.where(bitwise, 0, rare))
    spots = sparse
    if bitwise.any():
        spots = merge(bitwise, rare, _read_bitwise(reader, sizes[bitwise], rare[bitwise]), sparse)
    return counts, _turn(sizes, counts, spots, back=True)


def _read_gaps(reader: BitReader, sizes: Ints, rare: Ints) -> Ints:
    """Places that were written by their gaps."""
    if not rare.any():
        return np.zeros(0, np.int64)
    table, pieces = gap_table(sizes, rare), []
    for batch in _batches(rare.tolist()):
        if batch.stop - batch.start == 1:
            row = _digits(table[batch.start])
            pieces.append(reader.read_numbers(int(rare[batch.start]), row))
        else:
            rows = np.repeat(np.arange(batch.start, batch.stop), rare[batch])
            pieces.append(_read_digits(reader, table, rows))
    along = np.cumsum(np.concatenate(pieces) + 1)
    # where each group's first gap begins
    before = np.concatenate([[0], along])[np.cumsum(rare) - rare]
    places: Ints = along - np.repeat(before + 1, rare)
    if np.any(places >= np.repeat(sizes, rare)):
        raise CorruptFrameError("a position lies beyond its group")
    return places


def _read_bitwise(reader: BitReader, sizes: Ints, rare: Ints) -> Ints:
    """Places of the rarer bit in the groups that are coded bit by bit."""
    bits = np.zeros(int(sizes.sum()), np.bool_)
    for stretch, frequency in _stretches(sizes, rare):
        bits[stretch] = reader.read(stretch.stop - stretch.start, frequency)
    starts, places = np.cumsum(sizes) - sizes, np.flatnonzero(bits)
    came = np.diff(np.searchsorted(places, np.append(starts, len(bits))))
    if (wrong := np.flatnonzero(came != rare)).size:
        raise CorruptFrameError(
            f"a group holds {came[wrong[0]]} positions instead of {rare[wrong[0]]}"
        )
    return np.asarray(places - np.repeat(starts, came))


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
    wide = sizes[turned]
    starts = np.cumsum(wide) - wide  # of the turned groups, end to end
    free = np.ones(int(wide.sum()), np.bool_)
    free[select(turned, before, spots) + np.repeat(starts, before[turned])] = False
    others = np.flatnonzero(free) - np.repeat(starts, after[turned])
    return merge(turned, after, others, select(~turned, before, spots))


def _digits(row: Ints) -> Ints:
    """Frequencies of the digits that the numbers of one row have."""
    return np.asarray(row[row > 0])


def _read_digits(reader: BitReader, table: Ints, row: Ints | None = None) -> Ints:
    frequency = table if row is None else table[row]
    has = frequency > 0
    digits = np.zeros(frequency.shape, np.int64)
    digits[has] = reader.read(int(has.sum()), frequency[has])
    return np.asarray(digits @ (1 << np.arange(table.shape[1])))
