"""Four bits a value: fifteen even steps up to the largest magnitude."""

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.wire import Codec

Values = NDArray[np.float32]


def num_bytes(count: int) -> int:
    """Size of a scale and ``count`` half bytes."""
    return 4 + (count + 1) // 2


def pack(values: Values) -> bytes:
    """Round to the nearest step."""
    if not np.isfinite(values).all():
        raise ValueError("the largest value sets the scale, and some are not finite")
    scale = np.float32(np.abs(values).max(initial=np.float32(0)) / np.float32(7))
    steps = np.rint(values / scale) if scale > 0 else np.zeros_like(values)
    codes = np.zeros(len(values) + len(values) % 2, np.uint8)
    codes[: len(values)] = np.clip(steps, -7, 7) + 8
    pairs = codes[0::2] | codes[1::2] << 4
    return np.array([scale], "<f4").tobytes() + pairs.astype(np.uint8).tobytes()


def unpack(data: memoryview, count: int) -> Values:
    """Undo `pack`, up to the rounding."""
    scale = np.frombuffer(data[:4], "<f4").astype(np.float32)
    pairs = np.frombuffer(data[4:], np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:count]
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale never crashes
        return scale * (codes.astype(np.float32) - 8)


INT4 = Codec(name="int4", num_bytes=num_bytes, pack=pack, unpack=unpack)
