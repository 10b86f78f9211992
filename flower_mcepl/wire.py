"""Turn masks and float tensors into framed bytes and back; byte by byte in ``docs/wire-format.md``.

A frame is one agent's payload of one round. It says who sent it, when, and for which frozen weights, and it
ends in a checksum. Bytes from the network are never trusted: no declared length is believed before it is
compared with the number of bytes that are there, and a refused frame always raises a ``FrameError``.
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.codings import BY_DTYPE, CODINGS
from flower_mcepl.errors import (
    ConfigError,
    CorruptFrameError,
    ForeignFrameError,
    FutureFrameError,
    TruncatedFrameError,
)

WIRE_VERSION = 1  # raise it when bit order, padding, layer order or the place of a header field changes

MAGIC = b"MCPL"
CHECKSUM_NBYTES = 8
MAX_DIMS = 32  # what every supported numpy can hold
MAX_NUMEL = 2**60  # bounds the strides, also of an empty layer such as (0, 2**32 - 1, 2**32 - 1)
_U16, _U32 = 2**16 - 1, 2**32 - 1
_FIXED = struct.Struct("<4sBBHII16sQ")  # magic version flags layers sender round fingerprint total-length

FrameBytes = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True)
class LayerEntry:
    """One line of a frame's layer table."""

    name: str
    shape: tuple[int, ...]
    coding: int  # the byte on the wire
    nbytes: int  # of the layer's payload

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoded tensor."""
        return CODINGS[self.coding].dtype


@dataclass(frozen=True)
class FrameHeader:
    """Everything a frame says before its payload; the layers are sorted by name."""

    version: int
    sender: int
    round: int
    fingerprint: str  # of the shared frozen weights, 32 lower-case hex digits
    layers: tuple[LayerEntry, ...]


@dataclass(frozen=True)
class Frame:
    """A decoded frame; its tensors lie on the CPU, are writable and own their memory."""

    header: FrameHeader
    tensors: dict[str, Tensor]


def check_fingerprint(fingerprint: str) -> str:
    """Return the fingerprint as it is; raise :class:`ConfigError` unless it is 32 lower-case hex digits."""
    if not re.fullmatch("[0-9a-f]{32}", fingerprint):
        raise ConfigError(
            f"a fingerprint is 32 lower-case hex digits (16 bytes); got {fingerprint!r}. "
            "Pass the fingerprint of the frozen weights unchanged."
        )
    return fingerprint


def encode_frame(tensors: Mapping[str, Tensor], *, sender: int, round: int, fingerprint: str) -> bytes:
    """Frame one agent's payload; the same tensors give the same bytes, whatever the order of the mapping.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Layer name to bool tensor (1 bit a weight) or float32 tensor (32 bits). Scalars, empty layers and no
        layers at all are fine.
    sender : int
        Index of the agent that sends, 0 to 2**32 - 1.
    round : int
        The round it is sent in, 0 to 2**32 - 1.
    fingerprint : str
        Fingerprint of the shared frozen weights, 32 lower-case hex digits.

    Raises
    ------
    ConfigError
        If a value does not fit the format.
    """
    for word, value in (("sender", sender), ("round", round)):
        if not 0 <= value <= _U32:
            raise ConfigError(f"the {word} of a frame must lie in 0 to 2**32 - 1; got {value}.")
    if len(tensors) > _U16:
        raise ConfigError(f"a frame holds at most {_U16} layers; got {len(tensors)}. Send them in several frames.")
    table, payloads = [], []
    for name in sorted(tensors):  # code points sort like their utf-8 bytes
        line, payload = _encode_layer(name, tensors[name])
        table.append(line)
        payloads.append(payload)
    total = _FIXED.size + sum(map(len, table + payloads)) + CHECKSUM_NBYTES
    digits = bytes.fromhex(check_fingerprint(fingerprint))
    fixed = _FIXED.pack(MAGIC, WIRE_VERSION, 0, len(tensors), sender, round, digits, total)
    body = b"".join([fixed, *table, *payloads])
    return body + _checksum(body)


def _encode_layer(name: str, tensor: Tensor) -> tuple[bytes, bytes]:
    """Return the line of the layer table and the payload."""
    if tensor.dtype not in BY_DTYPE or tensor.layout is not torch.strided or tensor.is_meta:
        known = ", ".join(sorted(str(dtype) for dtype in BY_DTYPE))
        raise ConfigError(
            f"a frame carries dense tensors of {known}; layer {name!r} is {tensor.dtype}, "
            f"{tensor.layout}, on {tensor.device}. "
            "Convert it first: `.bool()` for a mask, `.float()` for values, `.to_dense()` for sparse ones."
        )
    try:
        label = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"a layer name must be valid unicode; got {name!r}. Rename the layer.") from error
    shape = tuple(tensor.shape)
    if len(label) > _U16 or not _shape_fits(shape):
        raise ConfigError(
            f"a layer has a name of at most {_U16} bytes and at most {MAX_DIMS} dimensions, each under "
            f"2**32 and together under 2**60 elements; got {len(label)} bytes and shape {shape}. "
            "Rename or reshape it."
        )
    coding = BY_DTYPE[tensor.dtype]
    payload = coding.pack(tensor.detach().cpu().contiguous())
    dims = struct.pack(f"<BB{len(shape)}I", coding.code, len(shape), *shape)
    return struct.pack("<H", len(label)) + label + dims + struct.pack("<Q", len(payload)), payload


def _shape_fits(shape: Sequence[int]) -> bool:
    # Zeros count as ones: an empty layer must not smuggle in strides that overflow.
    fits = len(shape) <= MAX_DIMS and all(dim <= _U32 for dim in shape)
    return fits and math.prod(max(dim, 1) for dim in shape) < MAX_NUMEL


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM_NBYTES).digest()


def decode_frame(
    data: FrameBytes,
    *,
    fingerprint: str | None = None,
    layers: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype | None = None,
    sender: int | None = None,
    latest_round: int | None = None,
) -> Frame:
    """Check a frame and unpack its tensors.

    Parameters
    ----------
    data : bytes, bytearray, memoryview or numpy uint8 array
        The frame, as it came.
    fingerprint : str | None (default: None)
        The fingerprint it must have. None leaves this and each of the following unchecked.
    layers : Mapping[str, tuple[int, ...]] | None (default: None)
        The names and shapes it must have, in any order.
    dtype : torch.dtype | None (default: None)
        The type that every layer must have.
    sender : int | None (default: None)
        The agent it must come from.
    latest_round : int | None (default: None)
        The newest round it may come from.

    Raises
    ------
    FrameError
        One subclass per remedy: truncated, corrupt, foreign or future. Nothing else, whatever the bytes are.
    """
    if fingerprint is not None:
        check_fingerprint(fingerprint)
    view, header, at = _open(data)
    _expect_model(header, fingerprint=fingerprint, layers=layers, dtype=dtype)
    _expect_origin(header, sender=sender, latest_round=latest_round)
    tensors = {}
    for layer in header.layers:
        tensors[layer.name] = _unpack_layer(header, layer, view[at : at + layer.nbytes])
        at += layer.nbytes
    return Frame(header, tensors)


def read_header(data: FrameBytes) -> FrameHeader:
    """Read who sent a frame, when, and which layers, without unpacking a tensor.

    The checksum and the whole structure are checked as in :func:`decode_frame`, the padding bits are not.
    """
    return _open(data)[1]


def _open(data: FrameBytes) -> tuple[memoryview, FrameHeader, int]:
    """Check everything that needs no expectation; return the bytes, the header and where the payload starts.

    The order matters. Magic, version and length come before the checksum, because only they say that there is
    one and where. All else comes after it, so that a flipped bit is never taken for another model or round.
    """
    view = _as_view(data)
    _check_start(view)
    _, version, flags, count, sender, round, digits, total = _FIXED.unpack_from(view)
    who = _who(sender, round)
    if total > len(view):
        raise TruncatedFrameError(
            f"a frame must be as long as it says; {who} says {total} bytes and has {len(view)}. Have it sent again."
        )
    if total < len(view) or total < _FIXED.size + CHECKSUM_NBYTES:
        raise _corrupt(who, f"it says {total} bytes and {len(view)} came")
    if _checksum(view[:-CHECKSUM_NBYTES]) != view[-CHECKSUM_NBYTES:]:
        raise _corrupt(who, "its checksum does not match (so sender and round may be wrong, too)")
    if flags:
        raise _future(who, f"flags {flags:#04x}")
    entries, at = _read_table(view[:-CHECKSUM_NBYTES], count, who)
    return view, FrameHeader(version, sender, round, digits.hex(), entries), at


def _as_view(data: FrameBytes) -> memoryview:
    try:
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    except (TypeError, ValueError):
        view = None
    if view is None or view.format not in ("B", "b", "c"):
        raise ConfigError(
            f"a frame is bytes, bytearray, memoryview or a numpy uint8 array; got {type(data).__name__}. "
            "Pass the bytes as they came."
        )
    if view.ndim == 1 and view.c_contiguous:
        return view if view.format == "B" else view.cast("B")
    return memoryview(view.tobytes())


def _check_start(view: memoryview) -> None:
    """Judge magic, version and the presence of the fixed header."""
    start = bytes(view[: len(MAGIC)])
    if start != MAGIC[: len(start)]:
        raise ForeignFrameError(
            f"a frame starts with {MAGIC!r}; these {len(view)} bytes start with {start!r}. They are no "
            "frame: look at what wrote them."
        )
    if len(view) > len(MAGIC) and view[len(MAGIC)] > WIRE_VERSION:
        raise _future("a frame", f"version {view[len(MAGIC)]}")
    if len(view) < _FIXED.size:
        raise TruncatedFrameError(
            f"a frame has at least {_FIXED.size + CHECKSUM_NBYTES} bytes; {len(view)} came. Have it sent again."
        )
    if view[len(MAGIC)] != WIRE_VERSION:
        raise _corrupt("a frame", f"version {view[len(MAGIC)]} never existed")


def _read_table(view: memoryview, count: int, who: str) -> tuple[tuple[LayerEntry, ...], int]:
    """Read the layer table and compare it with the bytes that follow."""
    entries: list[LayerEntry] = []
    at = _FIXED.size
    try:
        for _ in range(count):
            entry, at = _read_entry(view, at)
            entries.append(entry)
    except (struct.error, UnicodeDecodeError) as error:
        raise _corrupt(who, f"line {len(entries)} of its layer table cannot be read ({error})") from None
    for entry in entries:
        _check_entry(entry, who)
    names = [entry.name for entry in entries]
    if any(left >= right for left, right in pairwise(names)):
        raise _corrupt(who, "its layer names are not in ascending order")
    declared = sum(entry.nbytes for entry in entries)
    if declared != len(view) - at:
        raise _corrupt(who, f"its layers say {declared} bytes of payload and {len(view) - at} are there")
    return tuple(entries), at


def _read_entry(view: memoryview, at: int) -> tuple[LayerEntry, int]:
    (length,) = struct.unpack_from("<H", view, at)
    at += 2
    name = str(view[at : at + length], "utf-8")
    at += length
    coding, ndim = struct.unpack_from("<BB", view, at)
    *shape, nbytes = struct.unpack_from(f"<{ndim}IQ", view, at + 2)
    return LayerEntry(name, tuple(shape), coding, nbytes), at + 2 + 4 * ndim + 8


def _check_entry(entry: LayerEntry, who: str) -> None:
    if entry.coding not in CODINGS:
        raise _future(who, f"coding {entry.coding} in layer {entry.name!r}")
    if not _shape_fits(entry.shape):
        raise _corrupt(who, f"layer {entry.name!r} has the impossible shape {entry.shape}")
    needed = CODINGS[entry.coding].nbytes(math.prod(entry.shape))  # Python ints: nothing overflows
    if needed != entry.nbytes:
        raise _corrupt(who, f"layer {entry.name!r} needs {needed} bytes of payload and says {entry.nbytes}")


def _unpack_layer(header: FrameHeader, layer: LayerEntry, payload: memoryview) -> Tensor:
    try:
        flat = CODINGS[layer.coding].unpack(payload, math.prod(layer.shape))
    except CorruptFrameError as error:
        raise _corrupt(_who(header.sender, header.round), f"in layer {layer.name!r} {error}") from None
    return flat.reshape(layer.shape)


def _expect_model(
    header: FrameHeader,
    *,
    fingerprint: str | None,
    layers: Mapping[str, tuple[int, ...]] | None,
    dtype: torch.dtype | None,
) -> None:
    who = _who(header.sender, header.round)
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise ForeignFrameError(
            f"a frame must carry the fingerprint of the same frozen weights, {fingerprint}; {who} carries "
            f"{header.fingerprint}. Give both agents the same model and the same seed."
        )
    came = {entry.name: entry.shape for entry in header.layers}
    wanted = came if layers is None else {name: tuple(shape) for name, shape in layers.items()}
    if came != wanted:
        name = min(n for n in {*came, *wanted} if came.get(n) != wanted.get(n))
        raise ForeignFrameError(
            f"a frame must have the receiver's layers; in {who} layer {name!r} has shape "
            f"{came.get(name, 'none')} instead of {wanted.get(name, 'none')}. Give both agents one model."
        )
    for entry in header.layers:
        if dtype is not None and entry.dtype != dtype:
            raise ForeignFrameError(
                f"the receiver takes {dtype} only; {who} has {entry.dtype} in layer {entry.name!r}. "
                "Give both agents the same algorithm."
            )


def _expect_origin(header: FrameHeader, *, sender: int | None, latest_round: int | None) -> None:
    who = _who(header.sender, header.round)
    if sender is not None and header.sender != sender:
        raise ForeignFrameError(
            f"a frame must come from the agent it is filed under, {sender}; this is {who}. Look at the routing."
        )
    if latest_round is not None and header.round > latest_round:
        raise FutureFrameError(
            f"a frame must come from a round that has begun, at most {latest_round}; this is {who}. "
            "It may belong to another run; if not, keep it until that round."
        )


def _who(sender: int, round: int) -> str:
    return f"the frame of sender {sender} in round {round}"


def _corrupt(who: str, what: str) -> CorruptFrameError:
    return CorruptFrameError(f"a frame must arrive as it was written; {who} is damaged: {what}. Have it sent again.")


def _future(who: str, what: str) -> FutureFrameError:
    return FutureFrameError(
        f"this flower_mcepl reads frames up to version {WIRE_VERSION} and knows no {what}; {who} was "
        "written by a newer one. Update flower_mcepl here."
    )
