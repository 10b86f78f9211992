"""Numbers with a geometric distribution as binary digits, each at its own frequency.

All frequencies are integers, made of integers alone: they do not depend on the machine.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FREQUENCY_BITS = 24  # a frequency f means the probability f / 2**24

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]

ONE = 1 << FREQUENCY_BITS
_X_BITS = np.uint64(32)


def frequency_of(count: int, size: int) -> int:
    """Frequency of a bit that is 1 in so many of so many."""
    return min(max((count << FREQUENCY_BITS) // size, 1), ONE - 1)


def share_log2(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """``share * log2(share)``; 0 of 0."""
    return np.asarray(share * np.log2(np.maximum(share, 1e-300)))


# A number with a geometric distribution, P(k) ~ x**k, has independent binary digits:
# digit b is 1 with the probability x**2**b / (1 + x**2**b). So numbers are written
# digit by digit, lowest first, each at its own frequency. A table has a row for each
# distribution and a column for each digit; 0 stands where the numbers have no such
# digit.


def count_table(sizes: Ints, total: int) -> Ints:
    """Frequencies of each group's count, whose mean is its share of the total."""
    return _count_table_of(sizes.tobytes(), total)


@lru_cache(maxsize=16)  # a sender estimates with it, and then writes with it
def _count_table_of(packed: bytes, total: int) -> Ints:
    sizes = np.frombuffer(packed, np.int64)
    means = _exact(sizes, total * int(sizes.max(initial=0))) * total
    return _table(means, int(sizes.sum()) + means, np.minimum(sizes, total))


def gap_table(sizes: Ints, rare: Ints) -> Ints:
    """Frequencies of each group's gaps between positions."""
    others = sizes - rare
    return _table(_exact(others, int(others.max(initial=0))), sizes, others * (rare > 0))


def _exact(numbers: Ints, largest: int) -> Ints:
    """The numbers, as Python's own where 2**32 times the largest exceeds an int64."""
    return numbers if largest < 1 << 31 else numbers.astype(object)


def _table(parts: Ints, wholes: Ints, largest: Ints) -> Ints:
    """Frequencies for each x, a part of a whole, and largest number that may occur."""
    lengths = np.frexp(largest)[1]  # in bits; exact below 2**53
    ratios = np.minimum((parts << 32) // np.maximum(wholes, 1), (1 << 32) - 1)
    # x ** 2**digit, in units of 2**-32
    powers = np.empty((int(lengths.max(initial=0)), len(ratios)), np.uint64)
    powers[:1] = ratios
    for digit in range(1, len(powers)):
        np.multiply(powers[digit - 1], powers[digit - 1], out=powers[digit])
        powers[digit] >>= _X_BITS
    frequency = (powers << np.uint64(FREQUENCY_BITS)) // (powers + (np.uint64(1) << _X_BITS))
    frequency = np.maximum(frequency, np.uint64(1))
    frequency *= np.arange(len(powers))[:, None] < lengths
    table = np.ascontiguousarray(frequency.T).view(np.int64)
    table.flags.writeable = False
    return table


def digits_of(numbers: Ints, table: Ints, row: Ints | None = None) -> tuple[Bits, Ints]:
    """The digits of all numbers, number after number, and their frequencies."""
    frequency = table if row is None else table[row]
    digits = (numbers[:, None] >> np.arange(table.shape[1])) & 1
    has = frequency > 0
    return digits[has].astype(np.bool_), frequency[has]
