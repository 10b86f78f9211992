"""How the float values of a layer lie in a frame; see ``docs/wire-format.md``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from flower_mcepl.errors import ConfigError

Values = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One way to store values; the registry below knows it by its name, the wire by its code."""

    name: str
    code: int
    num_bytes: Callable[[int], int]  # of that many values
    pack: Callable[[Values], bytes]
    unpack: Callable[[memoryview], Values]  # owns its memory
    of_differences: bool = False  # what is packed is the difference from values that both ends hold


def _pack_float32(values: Values) -> bytes:
    return bytes(values.astype("<f4", copy=False).tobytes())


def _unpack_float32(data: memoryview) -> Values:
    return np.array(np.frombuffer(data, "<f4"), np.float32)


def _pack_float16(values: Values) -> bytes:
    with np.errstate(over="ignore"):  # beyond 65504 lies infinity, as everywhere in binary16
        return bytes(values.astype("<f2").tobytes())


def _unpack_float16(data: memoryview) -> Values:
    return np.array(np.frombuffer(data, "<f2"), np.float32)


def _pack_bfloat16(values: Values) -> bytes:
    rounded = (
        torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy()
    )
    return bytes(rounded.astype("<i2", copy=False).tobytes())


def _unpack_bfloat16(data: memoryview) -> Values:
    upper = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    return upper.view(np.float32)


def _pack_int8(values: Values, *, precision: str) -> bytes:
    if not np.isfinite(values).all():
        raise ConfigError(
            f"precision {precision} needs finite values, because the largest sets the scale; some "
            "are infinite or not a number. Send them with precision float32, or look at why "
            "training left the finite numbers."
        )
    scale = np.float32(np.abs(values).max(initial=np.float32(0)) / np.float32(127))
    steps = np.rint(values / scale) if scale > 0 else np.zeros_like(values)
    return np.array([scale], "<f4").tobytes() + bytes(
        np.clip(steps, -127, 127).astype(np.int8).tobytes()
    )


def _unpack_int8(data: memoryview) -> Values:
    (scale,) = np.frombuffer(data[:4], "<f4").astype(np.float32)
    # a damaged scale gives odd values, never a crash
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(scale * np.frombuffer(data[4:], np.int8).astype(np.float32))


def _int8(name: str, code: int, *, of_differences: bool = False) -> Precision:
    return Precision(
        name=name,
        code=code,
        num_bytes=lambda n: 4 + n,
        pack=partial(_pack_int8, precision=name),
        unpack=_unpack_int8,
        of_differences=of_differences,
    )


def difference(values: Values, base: Values) -> Values:
    """Return what a precision of differences packs."""
    # what is not finite is refused by name when it is packed
    with np.errstate(over="ignore", invalid="ignore"):
        return values - base


def add_difference(base: Values, difference: Values) -> Values:
    """Return the values that both ends then hold: the same float32 addition on either side, hence the same bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        return base + difference


FLOAT32 = Precision(
    name="float32", code=1, num_bytes=lambda n: 4 * n, pack=_pack_float32, unpack=_unpack_float32
)
PRECISIONS = {
    precision.name: precision
    for precision in (
        FLOAT32,
        Precision(
            name="float16",
            code=2,
            num_bytes=lambda n: 2 * n,
            pack=_pack_float16,
            unpack=_unpack_float16,
        ),
        Precision(
            name="bfloat16",
            code=3,
            num_bytes=lambda n: 2 * n,
            pack=_pack_bfloat16,
            unpack=_unpack_bfloat16,
        ),
        _int8("int8", 4),
        _int8("int8-differences", 5, of_differences=True),
    )
}
BY_CODE = {precision.code: precision for precision in PRECISIONS.values()}


def find_precision(name: str) -> Precision:
    """Return the precision of that name; raise ConfigError if there is none."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; got {name!r}.")
    return PRECISIONS[name]
