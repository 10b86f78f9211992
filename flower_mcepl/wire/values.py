"""How the float values of a layer lie in a frame, and how a package adds a codec.

Byte by byte in ``docs/wire-format.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from flower_mcepl.config.registry import Registry
from flower_mcepl.errors import ConfigError

Values = NDArray[np.float32]
NAMED = 7  # the code on the wire of every codec that a package adds; its name follows


@final
@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to store the float values of a layer in a frame.

    A package adds one by an entry point of the group ``flower_mcepl.codecs``. Whatever
    has the setting ``precision`` then takes its name, and frames carry the name, so
    that every receiver needs the package, too.

    Parameters
    ----------
    name : str
        That of its entry point, 1 to 255 bytes of UTF-8.
    num_bytes : callable
        ``num_bytes(count)``: size in bytes of that many packed values, exactly. A frame
        declares the count, up to 2**60, and nothing is read or allocated before this
        size was compared with what came. So it must compute, not try.
    pack : callable
        ``pack(values)``: the values, a float32 array of shape [count], as ``bytes``.
        The same values must give the same bytes.
    unpack : callable
        ``unpack(data, count)``: the values that come out of a memoryview, a float32
        array of shape [count].
    of_differences : bool (default: False)
        Whether dense layers are packed as their difference from the values that both
        ends hold of an earlier round. Sparse layers are then refused.

    Raises
    ------
    ConfigError
        If the name does not fit into a frame.
    """

    name: str
    num_bytes: Callable[[int], int]
    pack: Callable[[Values], bytes]
    unpack: Callable[[memoryview, int], Values]
    of_differences: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name.encode()) <= 255:
            raise ConfigError(
                f"the name of a codec has 1 to 255 bytes of UTF-8; got {self.name!r}. Rename it."
            )

    @property
    def code(self) -> int:
        """Its code on the wire."""
        return BUILT_IN.get(self.name, NAMED)

    @property
    def tag(self) -> bytes:
        """Its name behind the code in a layer's line; empty for a built-in codec."""
        if self.code != NAMED:
            return b""
        label = self.name.encode()
        return bytes([len(label)]) + label

    # What a built-in codec does is proved by the tests. The code of a package is called
    # with copies, and what it returns is believed only after a look.

    def size(self, count: int) -> int:
        """Size in bytes of ``count`` packed values."""
        if self.code != NAMED:
            return self.num_bytes(count)
        size = self._call(f"tell the size of {count} values", self.num_bytes, count)
        if not isinstance(size, int) or size < 0:
            raise self._wrong(f"num_bytes({count}) must be an int, at least 0; got {size!r}")
        return size

    def encode(self, values: Values) -> bytes:
        """The values as they travel.

        Raises
        ------
        ConfigError
            If the codec cannot pack them, or not into the size that it declares.
        """
        if self.code != NAMED:
            return self.pack(values)
        count, size = values.size, self.size(values.size)
        packed = self._call(f"pack {count} values", self.pack, values.copy())
        if not isinstance(packed, bytes) or len(packed) != size:
            raise self._wrong(
                f"pack must return num_bytes({count}) = {size} bytes; got {_sketch(packed)}"
            )
        return packed

    def decode(self, data: memoryview, count: int) -> Values:
        """The values that come out of ``size(count)`` bytes, in memory of their own.

        Raises
        ------
        ConfigError
            If the codec cannot unpack them, or gives something else than values.
        """
        if self.code != NAMED:
            return self.unpack(data, count)
        values = self._call(f"unpack {count} values", self.unpack, data.toreadonly(), count)
        fits = isinstance(values, np.ndarray) and values.dtype == np.float32
        if not fits or values.shape != (count,):
            raise self._wrong(
                f"unpack must return float32 of shape ({count},); got {_sketch(values)}"
            )
        return np.array(values, np.float32)

    def _call(self, what: str, function: Callable[..., object], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # whatever the package's code raises
            raise self._wrong(f"it cannot {what}: {type(error).__name__}: {error}") from error

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(
            f"codec {self.name!r}: {what}. Look at the values, or mend the package that adds it "
            "(docs/extending.md)."
        )


def _sketch(value: object) -> str:
    """What came instead, without its elements."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__


def _pack_float32(values: Values) -> bytes:
    return bytes(values.astype("<f4", copy=False).tobytes())


def _unpack_float32(data: memoryview, count: int) -> Values:
    return np.array(np.frombuffer(data, "<f4"), np.float32)


def _pack_float16(values: Values) -> bytes:
    with np.errstate(over="ignore"):  # beyond 65504 lies infinity, as everywhere in binary16
        return bytes(values.astype("<f2").tobytes())


def _unpack_float16(data: memoryview, count: int) -> Values:
    return np.array(np.frombuffer(data, "<f2"), np.float32)


def _pack_bfloat16(values: Values) -> bytes:
    rounded = (
        torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy()
    )
    return bytes(rounded.astype("<i2", copy=False).tobytes())


def _unpack_bfloat16(data: memoryview, count: int) -> Values:
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


def _unpack_int8(data: memoryview, count: int) -> Values:
    (scale,) = np.frombuffer(data[:4], "<f4").astype(np.float32)
    # a damaged scale gives odd values, never a crash
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(scale * np.frombuffer(data[4:], np.int8).astype(np.float32))


def _int8(name: str, *, of_differences: bool = False) -> Codec:
    return Codec(
        name=name,
        num_bytes=lambda count: 4 + count,
        pack=partial(_pack_int8, precision=name),
        unpack=_unpack_int8,
        of_differences=of_differences,
    )


def difference(values: Values, base: Values) -> Values:
    """What a codec of differences packs."""
    # what is not finite is refused by name when it is packed
    with np.errstate(over="ignore", invalid="ignore"):
        return values - base


def add_difference(base: Values, difference: Values) -> Values:
    """The values that both ends then hold.

    It is the same float32 addition on either side, hence the same bits.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return base + difference


FLOAT32 = Codec(
    name="float32",
    num_bytes=lambda count: 4 * count,
    pack=_pack_float32,
    unpack=_unpack_float32,
)
FLOAT16 = Codec(
    name="float16",
    num_bytes=lambda count: 2 * count,
    pack=_pack_float16,
    unpack=_unpack_float16,
)
BFLOAT16 = Codec(
    name="bfloat16",
    num_bytes=lambda count: 2 * count,
    pack=_pack_bfloat16,
    unpack=_unpack_bfloat16,
)
INT8 = _int8("int8")
INT8_DIFFERENCES = _int8("int8-differences", of_differences=True)

# The built-in codecs by their code on the wire, and the codes by name. Reading their
# frames looks no further: it searches no installed packages.
BY_CODE = dict(enumerate((FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_DIFFERENCES), start=1))
BUILT_IN = {codec.name: code for code, codec in BY_CODE.items()}
# all codecs by name, those of installed packages included
PRECISIONS = Registry(
    "flower_mcepl.codecs",
    Codec,
    {
        **{
            codec.name: f"{__name__}:{codec.name.upper().replace('-', '_')}"
            for codec in BY_CODE.values()
        },
        # these have no code of their own, and travel by name
        "sign-differences": "flower_mcepl.wire.compression:SIGN",
        "top-0.001-differences": "flower_mcepl.wire.compression:TOP_THOUSANDTH",
        "top-0.01-differences": "flower_mcepl.wire.compression:TOP_HUNDREDTH",
        "top-0.1-differences": "flower_mcepl.wire.compression:TOP_TENTH",
    },
    noun="precision",
)


def find_precision(name: str) -> Codec:
    """The codec of that name.

    Raises
    ------
    ConfigError
        If there is none, it cannot be loaded, or it calls itself otherwise.
    """
    if name not in PRECISIONS:
        raise ConfigError(
            f"precision must be one of {', '.join(PRECISIONS)}; got {name!r}. Choose one of these, "
            "or install the package that adds it."
        )
    codec = PRECISIONS.find(name)
    if codec.name != name:
        raise ConfigError(
            f"a codec must have the name of its entry point, {name!r}; it calls itself "
            f"{codec.name!r}. Mend the package that adds it (docs/extending.md)."
        )
    return codec
