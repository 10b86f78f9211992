"""The header of a frame, and how to write its parts.

Byte by byte in ``docs/wire-format.md``.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.errors import (
    ConfigError,
    CorruptFrameError,
    FutureFrameError,
)
from flower_mcepl.wire.support import ALONE, DELTA, PACKED, Prior, packed_bytes
from flower_mcepl.wire.values import Codec

# raise it when a field moves, or bit order, padding, layer order or a model's
# frequencies change
WIRE_VERSION = 4

MAGIC = b"MCPL"
DIGEST_NBYTES = 8
RUN_NBYTES = 8  # of a run's id; zeros: of no run
DESCRIBED = 1  # flag: fingerprint, names and shapes follow the fixed header
MAX_DIMS = 32  # what every supported numpy can hold
MAX_NUMEL = 2**60  # bounds the strides, also of an empty layer: (0, 2**32 - 1, 2**32 - 1)
# the most that a frame may declare where no shapes are expected
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 2**20, 2**10
U16, U32 = 2**16 - 1, 2**32 - 1
NO_REFERENCE = U32
# magic version flags layers sender round reference model content total
FIXED = struct.Struct("<4sBBHIII8s8sI")
MODEL, CONTENT = slice(20, 28), slice(28, 36)  # where these lie in it

FrameBytes = bytes | bytearray | memoryview | NDArray[np.uint8]
# in the coding byte of a layer's line
WITH_CLASSES, WITH_RECENT, AMONG_LIVE = 0x20, 0x40, 0x80
GATES = ":filters"  # behind a mask's name: the mask that says which of its rows are on


@dataclass(frozen=True)
class LayerEntry:
    """One layer in a frame's header.

    Name and shape are None where neither the frame nor its reader knows them.
    """

    name: str | None
    shape: tuple[int, ...] | None
    kind: int  # of the support: 0 (all weights), PACKED, ALONE or DELTA
    precision: Codec | None  # None: a mask, without values
    with_classes: bool = False
    with_recent: bool = False
    among_live: bool = False  # only weights of rows that are on are coded
    # weights that the range-coded section lists: that are on (ALONE) or flipped (DELTA)
    num_listed: int = 0
    num_values: int = 0  # of a sparse layer

    @property
    def is_sparse(self) -> bool:
        """Whether it holds a mask together with the values under it."""
        return self.kind != 0 and self.precision is not None

    @property
    def is_change(self) -> bool:
        """Whether it says what changed against another frame: flips, or differences."""
        return self.kind == DELTA or (self.precision is not None and self.precision.of_differences)

    @property
    def count(self) -> int:
        """Number of its values; the shape must be known."""
        assert self.shape is not None
        return self.num_values if self.is_sparse else math.prod(self.shape)

    def raw_bytes(self) -> int:
        """Size in bytes of what is not range-coded; the shape must be known."""
        assert self.shape is not None
        values = 0 if self.precision is None else self.precision.size(self.count)
        return values + (packed_bytes(math.prod(self.shape)) if self.kind == PACKED else 0)

    def line(self) -> bytes:
        """The layer's line in the header."""
        coding = (self.precision.code if self.precision else 0) | self.kind << 3
        coding |= self.with_classes * WITH_CLASSES | self.with_recent * WITH_RECENT
        coding |= self.among_live * AMONG_LIVE
        line = bytes([coding]) + (self.precision.tag if self.precision else b"")
        line += varint(self.num_listed) if self.kind in (ALONE, DELTA) else b""
        return line + (varint(self.num_values) if self.is_sparse else b"")


@dataclass(frozen=True)
class FrameHeader:
    """Everything a frame says before its payload; the layers are sorted by name."""

    version: int
    sender: int
    round: int
    # round of the frame that this one builds on (0: the common first payload), None: it
    # is whole
    reference: int | None
    model: str  # 16 hex digits, for run, fingerprint, layers and classes of weights together
    content: str  # 16 hex digits, for what the frame decodes to
    # of the shared frozen weights, 32 lower-case hex digits; None: not described
    fingerprint: str | None
    layers: tuple[LayerEntry, ...]
    total: int  # bytes of the whole frame
    coded_bytes: int  # of them range-coded
    header_bytes: int  # of them neither range-coded bits nor packed bits nor values


def check_fingerprint(fingerprint: str) -> str:
    """Return the fingerprint as it is.

    Raises
    ------
    ConfigError
        Unless it is 32 lower-case hex digits.
    """
    if not re.fullmatch("[0-9a-f]{32}", fingerprint):
        raise ConfigError(
            f"a fingerprint is 32 lower-case hex digits (16 bytes); got {fingerprint!r}. "
            "Pass the fingerprint of the frozen weights unchanged."
        )
    return fingerprint


def check_run(run: str) -> str:
    """Return the id of a run as it is; empty: of no run.

    Raises
    ------
    ConfigError
        Unless it is empty, or 16 lower-case hex digits.
    """
    if run and not re.fullmatch("[0-9a-f]{16}", run):
        raise ConfigError(
            f"the id of a run is 16 lower-case hex digits, or empty; got {run!r:.80}. Pass the id "
            "unchanged."
        )
    return run


def describe(fingerprint: str, layers: Mapping[str, Sequence[int]]) -> bytes:
    """The part of a frame that says for which weights it is; the names ascend."""
    parts = [bytes.fromhex(check_fingerprint(fingerprint))]
    for name in sorted(layers):  # code points sort like their utf-8 bytes
        try:
            label = name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"a layer name must be valid unicode; got {name!r}. Rename the layer."
            ) from error
        shape = tuple(layers[name])
        if len(label) > U16 or not shape_fits(shape):
            raise ConfigError(
                f"a layer has a name of at most {U16} bytes and at most {MAX_DIMS} dimensions, "
                f"each under 2**32 and together under 2**60 elements; got {len(label)} bytes and "
                f"shape {shape}. Rename or reshape it."
            )
        parts.append(
            struct.pack(f"<H{len(label)}sB{len(shape)}I", len(label), label, len(shape), *shape)
        )
    return b"".join(parts)


def model_digest(description: bytes, prior: Prior | None, run: str) -> bytes:
    """8 bytes that stand for the run, weights, layers and classes a frame presumes.

    `bind` covers them, and so a frame of one run is none of another: last week's cannot
    be played again.
    """
    number = bytes.fromhex(check_run(run)).ljust(RUN_NBYTES, b"\0")
    return digest([number, description, b"" if prior is None else prior.digest])


def model_of(data: FrameBytes) -> str:
    """The `model_digest` that a frame names, as hex digits; of a stub, fewer of them.

    It is unchecked, for choosing among the layers that may be expected.
    """
    return bytes(data[MODEL]).hex()


def digest(parts: Iterable[bytes | memoryview]) -> bytes:
    """The 8 bytes of BLAKE2b over all parts."""
    state = hashlib.blake2b(digest_size=DIGEST_NBYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def bind(content: bytes, header: bytes | memoryview) -> bytes:
    """The content digest as it travels: bound to the header around it by exclusive-or.

    The same call leads back. So a header with an edit names the digest of another
    content, and no payload decodes to that: names, shapes and how each layer is coded
    are covered as well as the bits, while equal payloads keep equal content digests.
    """
    around = digest([header[: CONTENT.start], header[CONTENT.stop :]])
    return bytes(left ^ right for left, right in zip(content, around, strict=True))


def shape_fits(shape: Sequence[int]) -> bool:
    """Whether a frame and numpy can hold the shape."""
    # Zeros count as ones: an empty layer must not smuggle in strides that overflow.
    fits = len(shape) <= MAX_DIMS and all(0 <= dim <= U32 for dim in shape)
    return fits and math.prod(max(dim, 1) for dim in shape) < MAX_NUMEL


def varint(value: int) -> bytes:
    """A number in base 128, lowest digit first, the top bit set on all but the last."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def most_bytes(num_weights: int, *, only_masks: bool) -> int:
    """Size in bytes above which nothing is a frame of so many weights.

    It leaves room for a bit a weight, a float64 a weight where there are floats, and
    for names of many layers.
    """
    return 2**18 + (num_weights if only_masks else 9 * num_weights)


def name_frame(sender: int, round: int) -> str:
    """A frame's name in an error."""
    return f"the frame of sender {sender} in round {round}"


def corrupt(who: str, what: str) -> CorruptFrameError:
    """The error of a damaged frame."""
    return CorruptFrameError(
        f"a frame must arrive as it was written; {who} is damaged: {what}. Have it sent again."
    )


def future(who: str, what: str) -> FutureFrameError:
    """The error of a frame with something that this version does not know."""
    return FutureFrameError(
        f"this flower_mcepl reads frames up to version {WIRE_VERSION} and knows no {what}; {who} "
        "was written by a newer one. Update flower_mcepl here."
    )
