"""The header of a frame and the checks of its structure; byte by byte in ``docs/wire-format.md``."""

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.errors import (
    ConfigError,
    CorruptFrameError,
    ForeignFrameError,
    FutureFrameError,
    TruncatedFrameError,
)
from flower_mcepl.wire.support import ALONE, DELTA, PACKED, Prior, packed_bytes
from flower_mcepl.wire.values import BY_CODE, Precision

# raise it when a field moves, or bit order, padding, layer order or a model's
# frequencies change
WIRE_VERSION = 3

MAGIC = b"MCPL"
DIGEST_NBYTES = 8
DESCRIBED = 1  # flag: fingerprint, names and shapes follow the fixed header
MAX_DIMS = 32  # what every supported numpy can hold
MAX_NUMEL = 2**60  # bounds the strides, also of an empty layer such as (0, 2**32 - 1, 2**32 - 1)
# the most that a frame may declare where no shapes are expected
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 2**20, 2**10
U16, U32 = 2**16 - 1, 2**32 - 1
NO_REFERENCE = U32
# magic version flags layers sender round reference model content total
FIXED = struct.Struct("<4sBBHIII8s8sI")
CONTENT = slice(28, 36)  # where the content lies in it

FrameBytes = bytes | bytearray | memoryview | NDArray[np.uint8]
_WITH_CLASSES, _WITH_RECENT = 0x20, 0x40


@dataclass(frozen=True)
class LayerEntry:
    """One layer in a frame's header; name and shape are None where the frame does not describe itself."""

    name: str | None
    shape: tuple[int, ...] | None
    kind: int  # of the support: 0 (all weights), PACKED, ALONE or DELTA
    precision: Precision | None  # None: a mask, without values
    with_classes: bool = False
    with_recent: bool = False
    told: int = 0  # weights told by range coding: those that are on (ALONE) or have flipped (DELTA)
    num_values: int = 0  # of a sparse layer

    @property
    def is_sparse(self) -> bool:
        """Tell whether it holds a mask together with the values under it."""
        return self.kind != 0 and self.precision is not None

    @property
    def is_change(self) -> bool:
        """Tell whether it says what changed against another frame: flips of a mask, or differences of values."""
        return self.kind == DELTA or (self.precision is not None and self.precision.of_differences)

    def raw_bytes(self) -> int:
        """Return how many bytes lie outside the range-coded ones; the shape must be known."""
        assert self.shape is not None
        numel = math.prod(self.shape)
        values = 0
        if self.precision is not None:
            values = self.precision.num_bytes(self.num_values if self.is_sparse else numel)
        return values + (packed_bytes(numel) if self.kind == PACKED else 0)

    def line(self) -> bytes:
        """Return the layer's line in the header."""
        coding = (self.precision.code if self.precision else 0) | self.kind << 3
        coding |= self.with_classes * _WITH_CLASSES | self.with_recent * _WITH_RECENT
        told = varint(self.told) if self.kind in (ALONE, DELTA) else b""
        return bytes([coding]) + told + (varint(self.num_values) if self.is_sparse else b"")


@dataclass(frozen=True)
class FrameHeader:
    """Everything a frame says before its payload; the layers are sorted by name."""

    version: int
    sender: int
    round: int
    # round of the frame that this one builds on (0: the common first payload), None: it
    # is whole
    reference: int | None
    model: str  # 16 hex digits, for the fingerprint, the layers and the classes of weights together
    # 16 hex digits, for what the frame decodes to; another one where the header was edited
    content: str
    # of the shared frozen weights, 32 lower-case hex digits; None: not described
    fingerprint: str | None
    layers: tuple[LayerEntry, ...]
    total: int  # bytes of the whole frame
    coded_bytes: int  # of them range-coded
    header_bytes: int  # of them neither range-coded bits nor packed bits nor values


def check_fingerprint(fingerprint: str) -> str:
    """Return the fingerprint as it is; raise :class:`ConfigError` unless it is 32 lower-case hex digits."""
    if not re.fullmatch("[0-9a-f]{32}", fingerprint):
        raise ConfigError(
            f"a fingerprint is 32 lower-case hex digits (16 bytes); got {fingerprint!r}. "
            "Pass the fingerprint of the frozen weights unchanged."
        )
    return fingerprint


def describe(fingerprint: str, layers: Mapping[str, Sequence[int]]) -> bytes:
    """Return the part of a frame that says for which weights it is; the names ascend."""
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


def model_digest(description: bytes, prior: Prior | None) -> bytes:
    """Return 8 bytes that stand for the weights, the layers and the classes that a frame presumes."""
    return digest([description, b"" if prior is None else prior.digest])


def digest(parts: Iterable[bytes | memoryview]) -> bytes:
    """Return the 8 bytes of BLAKE2b over all parts."""
    state = hashlib.blake2b(digest_size=DIGEST_NBYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def bind(content: bytes, header: bytes | memoryview) -> bytes:
    """The content digest as it travels: exclusive-or the digest of the header around it.

    The same call leads back. So a header with an edit names the digest of another
    content, and no payload decodes to that: names, shapes and how each layer is told
    are covered as well as the bits, while equal payloads keep equal content digests.
    """
    around = digest([header[: CONTENT.start], header[CONTENT.stop :]])
    return bytes(left ^ right for left, right in zip(content, around, strict=True))


def shape_fits(shape: Sequence[int]) -> bool:
    """Tell whether a frame and numpy can hold the shape."""
    # Zeros count as ones: an empty layer must not smuggle in strides that overflow.
    fits = len(shape) <= MAX_DIMS and all(0 <= dim <= U32 for dim in shape)
    return fits and math.prod(max(dim, 1) for dim in shape) < MAX_NUMEL


def varint(value: int) -> bytes:
    """Return a number in base 128, lowest digit first, the top bit set on all bytes but the last."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def open_frame(
    data: FrameBytes, layers: Mapping[str, Sequence[int]] | None
) -> tuple[memoryview, FrameHeader]:
    """Check everything that needs no expectation; return the payload (raw bytes, then coded ones) and the header.

    The order matters. Magic, version and length come before the checksum, because only
    they say that there is one and where. All else comes after it, so that a flipped bit
    is never taken for another model or round. Where the frame does not describe itself
    its layers are taken to be ``layers``.
    """
    view = _as_view(data)
    _check_start(view)
    _, version, flags, count, sender, round, reference, model, content, total = FIXED.unpack_from(
        view
    )
    who = name_frame(sender, round)
    if total > len(view):
        raise TruncatedFrameError(
            f"a frame must be as long as it says; {who} says {total} bytes and has {len(view)}. "
            "Have it sent again."
        )
    if total < len(view) or total < FIXED.size + DIGEST_NBYTES:
        raise corrupt(who, f"it says {total} bytes and {len(view)} came")
    body = view[:-DIGEST_NBYTES]
    if digest([body]) != view[-DIGEST_NBYTES:]:
        raise corrupt(who, "its checksum does not match (so sender and round may be wrong, too)")
    if flags & ~DESCRIBED:
        raise future(who, f"flags {flags:#04x}")
    reader = _Reader(body, FIXED.size, who)
    fingerprint, names = None, None
    if flags & DESCRIBED:
        fingerprint, names = reader.description(count)
    elif layers is not None and len(layers) == count:
        names = [(name, tuple(layers[name])) for name in sorted(layers)]
    entries = tuple(reader.line(*(names[i] if names else (None, None))) for i in range(count))
    coded = reader.varint()
    payload = body[reader.at :]
    header = FrameHeader(
        version=version,
        sender=sender,
        round=round,
        reference=None if reference == NO_REFERENCE else reference,
        model=model.hex(),
        content=bind(content, body[: reader.at]).hex(),
        fingerprint=fingerprint,
        layers=entries,
        total=total,
        coded_bytes=coded,
        header_bytes=total - len(payload),
    )
    _check_payload(header, len(payload), who)
    return payload, header


def _check_payload(header: FrameHeader, num_bytes: int, who: str) -> None:
    if header.coded_bytes % 4 or header.coded_bytes > num_bytes:
        raise corrupt(
            who,
            f"{header.coded_bytes} range-coded bytes are no whole words, or more than there are",
        )
    if header.reference is None and any(entry.is_change for entry in header.layers):
        raise corrupt(who, "a layer builds on another frame, but the header names none")
    if any(entry.shape is None for entry in header.layers):
        return
    declared = header.coded_bytes + sum(entry.raw_bytes() for entry in header.layers)
    if declared != num_bytes:
        raise corrupt(who, f"its layers say {declared} bytes of payload and {num_bytes} are there")


class _Reader:
    """Reads the description and the lines of a frame whose checksum is right."""

    def __init__(self, view: memoryview, at: int, who: str) -> None:
        self._view, self.at, self._who = view, at, who

    def description(self, count: int) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
        layers: list[tuple[str, tuple[int, ...]]] = []
        try:
            (digits,) = self._take("<16s")
            for _ in range(count):
                (length,) = self._take("<H")
                (label,) = self._take(f"<{length}s")
                (dims,) = self._take("<B")
                layers.append((label.decode("utf-8"), self._take(f"<{dims}I")))
        except (struct.error, UnicodeDecodeError) as error:
            raise corrupt(
                self._who, f"layer {len(layers)} of its description cannot be read ({error})"
            ) from None
        for name, shape in layers:
            if not shape_fits(shape):
                raise corrupt(self._who, f"layer {name!r} has the impossible shape {shape}")
        if any(left >= right for (left, _), (right, _) in pairwise(layers)):
            raise corrupt(self._who, "its layer names are not in ascending order")
        return digits.hex(), layers

    def line(self, name: str | None, shape: tuple[int, ...] | None) -> LayerEntry:
        label = "a layer" if name is None else f"layer {name!r}"
        try:
            (coding,) = self._take("<B")
        except struct.error:
            raise corrupt(self._who, f"it ends before the line of {label}") from None
        kind, code = coding >> 3 & 3, coding & 7
        precision = BY_CODE.get(code)
        sparse_differences = kind and precision is not None and precision.of_differences
        if coding & 0x80 or (code and precision is None) or sparse_differences:
            raise future(self._who, f"coding {coding:#04x} in {label}")
        told = self.varint() if kind in (ALONE, DELTA) else 0
        num_values = self.varint() if kind and precision else 0
        with_classes, with_recent = bool(coding & _WITH_CLASSES), bool(coding & _WITH_RECENT)
        if (
            (not kind and not precision)
            or (with_classes and kind < ALONE)
            or (with_recent and kind != DELTA)
        ):
            raise corrupt(self._who, f"the coding {coding:#04x} of {label} contradicts itself")
        if shape is not None and max(told, num_values) > math.prod(shape):
            raise corrupt(
                self._who, f"{label} of {math.prod(shape)} weights tells of {max(told, num_values)}"
            )
        return LayerEntry(name, shape, kind, precision, with_classes, with_recent, told, num_values)

    def varint(self) -> int:
        value = 0
        for digit in range(9):
            try:
                byte = int(self._take("<B")[0])
            except struct.error:
                break
            value |= (byte & 127) << 7 * digit
            if byte < 128:
                return value
        raise corrupt(self._who, "a number in its header does not end")

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._view, self.at)
        self.at += struct.calcsize(layout)
        return values


def _as_view(data: FrameBytes) -> memoryview:
    try:
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    except (TypeError, ValueError):
        view = None
    if view is None or view.format not in ("B", "b", "c"):
        raise ConfigError(
            "a frame is bytes, bytearray, memoryview or a numpy uint8 array; got "
            f"{type(data).__name__}. Pass the bytes as they came."
        )
    if view.ndim == 1 and view.c_contiguous:
        return view if view.format == "B" else view.cast("B")
    return memoryview(view.tobytes())


def _check_start(view: memoryview) -> None:
    """Judge magic, version and the presence of the fixed header."""
    start = bytes(view[: len(MAGIC)])
    if start != MAGIC[: len(start)]:
        raise ForeignFrameError(
            f"a frame starts with {MAGIC!r}; these {len(view)} bytes start with {start!r}. They "
            "are no frame: look at what wrote them."
        )
    if len(view) > len(MAGIC) and view[len(MAGIC)] > WIRE_VERSION:
        raise future("a frame", f"version {view[len(MAGIC)]}")
    if len(view) > len(MAGIC) and 0 < view[len(MAGIC)] < WIRE_VERSION:
        raise ForeignFrameError(
            f"this flower_mcepl reads frames of version {WIRE_VERSION}; one came of version "
            f"{view[len(MAGIC)]}, written by an older one. Update flower_mcepl there."
        )
    if len(view) < FIXED.size:
        raise TruncatedFrameError(
            f"a frame has at least {FIXED.size + DIGEST_NBYTES} bytes; {len(view)} came. Have "
            "it sent again."
        )
    if view[len(MAGIC)] != WIRE_VERSION:
        raise corrupt("a frame", f"version {view[len(MAGIC)]} never existed")


def name_frame(sender: int, round: int) -> str:
    """Return how to call a frame in an error."""
    return f"the frame of sender {sender} in round {round}"


def corrupt(who: str, what: str) -> CorruptFrameError:
    """Return the error of a damaged frame."""
    return CorruptFrameError(
        f"a frame must arrive as it was written; {who} is damaged: {what}. Have it sent again."
    )


def future(who: str, what: str) -> FutureFrameError:
    """Return the error of a frame with something that this version does not know."""
    return FutureFrameError(
        f"this flower_mcepl reads frames up to version {WIRE_VERSION} and knows no {what}; {who} "
        "was written by a newer one. Update flower_mcepl here."
    )
