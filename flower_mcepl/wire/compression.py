"""Codecs of differences far below 8 bits a value: their signs, or their largest.

Both are for senders whose receivers add up what comes (CHOCO-SGD): what one frame
leaves out is part of the next one's difference. They travel by name, as the codecs of
packages do.
"""

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.wire.values import BFLOAT16, Codec, Values

Places = NDArray[np.int64]


def _pack_signs(values: Values) -> bytes:
    _check_finite(values)
    scale = np.abs(values).mean(dtype=np.float64) if len(values) else 0.0
    return np.array([scale], "<f4").tobytes() + np.packbits(values >= 0).tobytes()


def _unpack_signs(data: memoryview, count: int) -> Values:
    (scale,) = np.frombuffer(data[:4], "<f4").astype(np.float32)
    signs = np.unpackbits(np.frombuffer(data[4:], np.uint8), count=count)
    return np.asarray(np.where(signs.view(np.bool_), scale, -scale), np.float32)


def num_kept(count: int, *, share: float) -> int:
    """Number of values that are kept of so many; at least one of any."""
    return min(count, max(1, math.ceil(share * count)))


def _size_of_largest(count: int, *, share: float) -> int:
    kept = num_kept(count, share=share)
    return BFLOAT16.size(kept) + places_nbytes(kept, count)


def _pack_largest(values: Values, *, share: float) -> bytes:
    _check_finite(values)
    kept = num_kept(len(values), share=share)
    if not kept:
        return b""
    size = np.abs(values)
    last = np.partition(size, len(size) - kept)[len(size) - kept]
    above = np.flatnonzero(size > last)
    equal = np.flatnonzero(size == last)[: kept - len(above)]  # of equals the earlier
    places = np.sort(np.concatenate([above, equal]))
    return BFLOAT16.pack(values[places]) + pack_places(places, len(values))


def _unpack_largest(data: memoryview, count: int, *, share: float) -> Values:
    values = np.zeros(count, np.float32)
    kept = num_kept(count, share=share)
    if kept:
        split = BFLOAT16.size(kept)
        places = unpack_places(data[split:], kept, count)
        values[places] = BFLOAT16.unpack(data[:split], kept)
    return values


def _check_finite(values: Values) -> None:
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite; some are infinite or not a number")


# Elias-Fano: of each place the lower bits as they are, the upper ones as a step in a
# walk. Its size follows from the two counts alone, as a codec's must, and is about half
# a bit a place above what any code needs: 8.6 bits where one in a hundred is kept.
def _low_bits(kept: int, count: int) -> int:
    """Bits of a place that are stored as they are."""
    return max(0, (count // kept).bit_length() - 1) if kept else 0


def places_nbytes(kept: int, count: int) -> int:
    """Size in bytes of so many packed places below ``count``."""
    if not kept:
        return 0
    low = _low_bits(kept, count)
    return (kept * low + 7) // 8 + (kept + (count >> low) + 1 + 7) // 8


def pack_places(places: Places, count: int) -> bytes:
    """Pack ascending places below ``count``."""
    kept = len(places)
    low = _low_bits(kept, count)
    lower = (places[:, None] >> np.arange(low)) & 1
    walk = np.zeros(kept + (count >> low) + 1, np.uint8)
    walk[(places >> low) + np.arange(kept)] = 1
    return np.packbits(lower.astype(np.uint8)).tobytes() + np.packbits(walk).tobytes()


def unpack_places(data: memoryview, kept: int, count: int) -> Places:
    """Places that were packed.

    Raises
    ------
    ValueError
        If they are not so many, do not ascend, or lie beyond ``count``.
    """
    low = _low_bits(kept, count)
    split = (kept * low + 7) // 8
    bits = np.unpackbits(np.frombuffer(data[:split], np.uint8), count=kept * low)
    lower = bits.reshape(kept, low).astype(np.int64) @ (1 << np.arange(low, dtype=np.int64))
    length = kept + (count >> low) + 1
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(data[split:], np.uint8), count=length))
    if len(ones) != kept:
        raise ValueError(f"{len(ones)} places came for {kept} values")
    places = ((ones - np.arange(kept)) << low) | lower
    if np.any(np.diff(places) <= 0) or places[-1] >= count:
        raise ValueError("places do not ascend or lie beyond the layer")
    return places


def _largest(share: float) -> Codec:
    return Codec(
        name=f"top-{share:g}-differences",
        num_bytes=partial(_size_of_largest, share=share),
        pack=partial(_pack_largest, share=share),
        unpack=partial(_unpack_largest, share=share),
        of_differences=True,
    )


SIGN = Codec(
    name="sign-differences",
    num_bytes=lambda count: 4 + (count + 7) // 8,
    pack=_pack_signs,
    unpack=_unpack_signs,
    of_differences=True,
)
TOP_THOUSANDTH, TOP_HUNDREDTH, TOP_TENTH = _largest(0.001), _largest(0.01), _largest(0.1)
