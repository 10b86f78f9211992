"""Open a frame: check its bytes, read its header, compare it with what is expected."""

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flower_mcepl.errors import (
    ConfigError,
    ForeignFrameError,
    FutureFrameError,
    TruncatedFrameError,
)
from flower_mcepl.wire.layout import (
    AMONG_LIVE,
    DESCRIBED,
    DIGEST_NBYTES,
    FIXED,
    MAGIC,
    NO_REFERENCE,
    WIRE_VERSION,
    WITH_CLASSES,
    WITH_RECENT,
    FrameBytes,
    FrameHeader,
    LayerEntry,
    bind,
    check_fingerprint,
    corrupt,
    describe,
    digest,
    future,
    model_digest,
    name_frame,
    shape_fits,
)
from flower_mcepl.wire.support import ALONE, DELTA, Prior
from flower_mcepl.wire.values import BUILT_IN, BY_CODE, NAMED, PRECISIONS, Codec, find_precision


def read_header(
    data: FrameBytes, layers: Mapping[str, tuple[int, ...]] | None = None
) -> FrameHeader:
    """Read who sent a frame, when, and which layers, without unpacking a tensor.

    The checksum and the structure are checked as in :func:`decode_frame`, the bits are
    not. ``layers`` are the names and shapes to assume where the frame does not tell
    them.
    """
    return open_frame(data, layers)[1]


def check_frame(
    data: FrameBytes,
    *,
    fingerprint: str | None,
    layers: Mapping[str, tuple[int, ...]] | None,
    dtype: torch.dtype | None,
    sender: int | None,
    latest_round: int | None,
    prior: Prior | None,
    run: str | None,
) -> tuple[memoryview, FrameHeader]:
    """Check all that `decode_frame` checks before it looks for the reference.

    Returns
    -------
    tuple[memoryview, FrameHeader]
        The payload (raw bytes, then coded ones) and the header.
    """
    if fingerprint is not None:
        check_fingerprint(fingerprint)
    payload, header = open_frame(data, layers)
    _expect_model(header, fingerprint=fingerprint, layers=layers, dtype=dtype, prior=prior, run=run)
    _expect_origin(header, sender=sender, latest_round=latest_round)
    return payload, header


def _expect_model(
    header: FrameHeader,
    *,
    fingerprint: str | None,
    layers: Mapping[str, tuple[int, ...]] | None,
    dtype: torch.dtype | None,
    prior: Prior | None,
    run: str | None,
) -> None:
    who = name_frame(header.sender, header.round)
    if fingerprint is not None and header.fingerprint not in (None, fingerprint):
        raise ForeignFrameError(
            f"a frame must carry the fingerprint of the same frozen weights, {fingerprint}; {who} "
            f"carries {header.fingerprint}. Give both agents the same model and the same seed."
        )
    if any(entry.name is None for entry in header.layers):
        raise ForeignFrameError(
            f"a delta frame does not repeat names and shapes, {len(header.layers)} here; {who} "
            f"cannot be read with {'none' if layers is None else len(layers)} expected. Pass the "
            "layers of the sender's model."
        )
    came = {entry.name: entry.shape for entry in header.layers}
    wanted = came if layers is None else {name: tuple(shape) for name, shape in layers.items()}
    if came != wanted:
        name = min(str(n) for n in {*came, *wanted} if came.get(n) != wanted.get(n))
        raise ForeignFrameError(
            f"a frame must have the receiver's layers; in {who} layer {name!r} has shape "
            f"{came.get(name, 'none')} instead of {wanted.get(name, 'none')}. Give both agents "
            "one model."
        )
    if fingerprint is not None and layers is not None and run is not None:
        mine = model_digest(describe(fingerprint, layers), prior, run).hex()
        if mine != header.model:
            raise ForeignFrameError(
                "a frame must be of the receiver's run, frozen weights, layers and classes of "
                f"weights, together {mine}; {who} has {header.model}. It may be of another run; if "
                "not, give both agents the same model, seed and algorithm."
            )
    for entry in header.layers:
        if dtype is not None and (dtype == torch.bool) != (entry.precision is None):
            raise ForeignFrameError(
                f"the receiver takes {dtype} only; {who} has "
                f"{entry.precision.name if entry.precision else 'a mask'} in layer "
                f"{entry.name!r}. Give both agents the same algorithm."
            )


def _expect_origin(header: FrameHeader, *, sender: int | None, latest_round: int | None) -> None:
    who = name_frame(header.sender, header.round)
    if sender is not None and header.sender != sender:
        raise ForeignFrameError(
            f"a frame must come from the agent it is filed under, {sender}; this is {who}. Look "
            "at the routing."
        )
    if latest_round is not None and header.round > latest_round:
        raise FutureFrameError(
            f"a frame must come from a round that has begun, at most {latest_round}; this is "
            f"{who}. It may belong to another run; if not, keep it until that round."
        )


def open_frame(
    data: FrameBytes, layers: Mapping[str, Sequence[int]] | None
) -> tuple[memoryview, FrameHeader]:
    """Check everything that needs no expectation; return as `check_frame`.

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
    try:
        declared = header.coded_bytes + sum(entry.raw_bytes() for entry in header.layers)
    except ConfigError as error:  # of a codec that a package adds
        raise undecodable(who, "a layer", error) from error
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
        precision = self._named_codec(label) if code == NAMED else BY_CODE.get(code)
        sparse_differences = kind and precision is not None and precision.of_differences
        among_live = bool(coding & AMONG_LIVE)
        odd = sparse_differences or (among_live and (kind < ALONE or code))
        if odd or (code and precision is None):
            raise future(self._who, f"coding {coding:#04x} in {label}")
        num_listed = self.varint() if kind in (ALONE, DELTA) else 0
        num_values = self.varint() if kind and precision else 0
        with_classes, with_recent = bool(coding & WITH_CLASSES), bool(coding & WITH_RECENT)
        if (
            (not kind and not precision)
            or (with_classes and kind < ALONE)
            or (with_recent and kind != DELTA)
        ):
            raise corrupt(self._who, f"the coding {coding:#04x} of {label} contradicts itself")
        if shape is not None and (most := max(num_listed, num_values)) > math.prod(shape):
            raise corrupt(self._who, f"{label} of {math.prod(shape)} weights tells of {most}")
        return LayerEntry(
            name,
            shape,
            kind,
            precision,
            with_classes,
            with_recent,
            among_live,
            num_listed,
            num_values,
        )

    def _named_codec(self, label: str) -> Codec:
        """The codec of a package; a name that is not installed here is refused."""
        try:
            (length,) = self._take("<B")
            (octets,) = self._take(f"<{length}s")
            name = octets.decode("utf-8")
        except (struct.error, UnicodeDecodeError) as error:
            raise corrupt(self._who, f"the codec of {label} has no name ({error})") from None
        if name not in PRECISIONS:
            raise FutureFrameError(
                f"a frame is read with the codecs that it was written with; {self._who} has "
                f"{label} in codec {name!r}, and this installation has "
                f"{', '.join(PRECISIONS)}. Install the package that adds it here, or let the "
                "sender choose one of these."
            )
        if name in BUILT_IN:
            raise corrupt(self._who, f"the built-in codec of {label} came by its name, {name!r}")
        try:
            return find_precision(name)
        except ConfigError as error:
            raise undecodable(self._who, label, error) from error

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


def undecodable(who: str, label: str, error: ConfigError) -> ForeignFrameError:
    """The error of a frame whose bytes are right and whose codec fails here."""
    return ForeignFrameError(
        f"sender and receiver must have the same working codec; {who} cannot be decoded, in "
        f"{label}: {error}"
    )
