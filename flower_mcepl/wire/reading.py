"""Turn framed bytes back into masks and float tensors.

Byte by byte in ``docs/wire-format.md``. Bytes from the network are never trusted: no
declared length is believed before it is compared with the number of bytes that are
there, and a refused frame always raises a ``FrameError``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import (
    ConfigError,
    CorruptFrameError,
    MissingReferenceError,
)
from flower_mcepl.wire.digits import Bits, Ints
from flower_mcepl.wire.groups import ascending
from flower_mcepl.wire.layout import (
    FREE_WEIGHTS,
    GATES,
    WEIGHTS_PER_BYTE,
    FrameBytes,
    FrameHeader,
    LayerEntry,
    corrupt,
    digest,
    name_frame,
)
from flower_mcepl.wire.opening import check_frame, undecodable
from flower_mcepl.wire.payload import (
    Reference,
    base_of,
    canonical_pieces,
    canonical_values,
    coding_order,
    join_support,
    known_of,
    live_weights,
    support_of,
)
from flower_mcepl.wire.range_coding import BitReader
from flower_mcepl.wire.support import (
    DELTA,
    PACKED,
    Known,
    Prior,
    pack,
    packed_bytes,
    read_among,
    unpack,
)
from flower_mcepl.wire.values import Codec, Values, add_difference


@dataclass(frozen=True)
class Frame:
    """A decoded frame; its tensors are on the CPU, writable, in memory of their own."""

    header: FrameHeader
    tensors: dict[str, Tensor]
    flips: dict[str, Ints]  # of the layers that came as changes

    def as_reference(self) -> Reference:
        """The frame as what the sender's next one may build on."""
        return Reference(self.header.round, self.tensors, self.flips, self.header.content)


def decode_frame(
    data: FrameBytes,
    *,
    fingerprint: str | None = None,
    layers: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype | None = None,
    sender: int | None = None,
    latest_round: int | None = None,
    references: Sequence[Reference] = (),
    prior: Prior | None = None,
    run: str | None = "",
) -> Frame:
    """Check a frame and unpack its tensors.

    Parameters
    ----------
    data : bytes, bytearray, memoryview or numpy uint8 array
        The frame, as it came.
    fingerprint : str | None (default: None)
        The fingerprint it must have. None leaves this and each of the following
        unchecked.
    layers : Mapping[str, tuple[int, ...]] | None (default: None)
        The names and shapes it must have, in any order. A delta frame does not repeat
        them: it needs this.
    dtype : torch.dtype | None (default: None)
        ``torch.bool`` takes masks only, ``torch.float32`` floats only (dense or
        sparse).
    sender : int | None (default: None)
        The agent it must come from.
    latest_round : int | None (default: None)
        The newest round it may come from.
    references : Sequence[Reference] (default: ())
        What the receiver holds that the frame may build on: earlier payloads of this
        sender, the first payload.
    prior : Prior | None (default: None)
        The classes of weights that the sender knew.
    run : str | None (default: "")
        Id of the run that it must belong to, 16 lower-case hex digits; empty: to none.
        It is checked together with fingerprint and layers.

    Raises
    ------
    FrameError
        One subclass per remedy: truncated, corrupt, foreign, future, or a missing
        reference. Nothing else, whatever the bytes are.
    """
    payload, header = check_frame(
        data,
        fingerprint=fingerprint,
        layers=layers,
        dtype=dtype,
        sender=sender,
        latest_round=latest_round,
        prior=prior,
        run=run,
    )
    who = name_frame(header.sender, header.round)
    declared = sum(math.prod(entry.shape or ()) for entry in header.layers)
    if layers is None and declared > FREE_WEIGHTS + WEIGHTS_PER_BYTE * header.total:
        raise corrupt(
            who,
            f"it declares {declared} weights in {header.total} bytes (if it may, pass the "
            "layers to be expected)",
        )
    return unpack_frame(payload, header, references=references, prior=prior)


def unpack_frame(
    payload: memoryview,
    header: FrameHeader,
    *,
    references: Sequence[Reference] = (),
    prior: Prior | None = None,
) -> Frame:
    """Unpack the tensors of a frame that `check_frame` has passed."""
    reference = _find_reference(header, references)
    who = name_frame(header.sender, header.round)
    split = len(payload) - header.coded_bytes
    coder, at = BitReader(payload[split:]), 0
    raws: dict[str, memoryview] = {}
    layers: dict[str, _ReadLayer] = {}
    for entry in header.layers:
        assert entry.name is not None
        raws[entry.name] = payload[at : at + entry.raw_bytes()]
        at += len(raws[entry.name])
    for entry in sorted(header.layers, key=lambda entry: coding_order(str(entry.name))):
        assert entry.name is not None
        gates = layers.get(entry.name + GATES)
        try:
            layers[entry.name] = _read_layer(
                entry,
                raws[entry.name],
                coder,
                reference,
                prior,
                None if gates is None else gates.tensor,
            )
        except CorruptFrameError as error:
            # Range-coded bits also turn out unreadable where the two ends do not know
            # the same.
            raise _unfit(header, f"in layer {entry.name!r} {error}") from None
        except ConfigError as error:
            raise undecodable(who, f"layer {entry.name!r}", error) from error
    if not coder.at_end():
        raise _unfit(header, "range-coded bits are left over")
    in_order = [(entry, layers[str(entry.name)]) for entry in header.layers]
    content = digest(piece for _, layer in in_order for piece in layer.canonical())
    if content.hex() != header.content:
        raise _unfit(header, "it decodes to something else than was encoded")
    return Frame(
        header,
        {str(entry.name): layer.tensor for entry, layer in in_order},
        {str(entry.name): layer.flipped for entry, layer in in_order if entry.kind == DELTA},
    )


@dataclass(frozen=True)
class _ReadLayer:
    tensor: Tensor
    flipped: Ints  # ascending; empty unless it came as flips
    pieces: list[bytes | memoryview]  # of it that came; empty: a range-coded mask

    def canonical(self) -> list[bytes | memoryview]:
        """What stands for it in the content digest."""
        return self.pieces or [pack(self.tensor.numpy().reshape(-1))]


def _read_layer(
    entry: LayerEntry,
    raw: memoryview,
    coder: BitReader,
    reference: Reference | None,
    prior: Prior | None,
    gates: Tensor | None,
) -> _ReadLayer:
    assert entry.name is not None
    assert entry.shape is not None
    numel = math.prod(entry.shape)
    bits, flipped = None, np.zeros(0, np.int64)
    if entry.precision is not None and entry.precision.of_differences:
        values = _read_differences(entry.name, entry.shape, entry.precision, raw, reference)
        return _ReadLayer(
            torch.from_numpy(values).reshape(entry.shape), flipped, canonical_values(values)
        )
    support: bytes | memoryview | None = None
    if entry.kind == PACKED:
        support, raw = raw[: packed_bytes(numel)], raw[packed_bytes(numel) :]
        padding = -numel % 8
        if padding and support[-1] & ((1 << padding) - 1):
            raise CorruptFrameError(
                f"the {padding} padding bits must be zero; the last byte is {support[-1]:#04x}"
            )
        bits = unpack(support, numel)
    elif entry.kind:
        known = known_of(entry.name, entry.shape, reference if entry.kind == DELTA else None, prior)
        _check_known(entry, known)
        known = Known(
            numel,
            known.last,
            known.recent if entry.with_recent else None,
            known.classes if entry.with_classes else None,
        )
        live = _live_weights(entry, gates) if entry.among_live else None
        bits, weights = read_among(coder, entry.num_listed, known, live)
        flipped = ascending(weights, numel) if entry.kind == DELTA else flipped
    if entry.precision is None:
        assert bits is not None
        pieces = [] if support is None else [support]
        return _ReadLayer(torch.from_numpy(bits).reshape(entry.shape), flipped, pieces)
    if bits is not None and support is None:
        support = pack(bits)
    canonical = canonical_pieces(support, entry.precision, raw)
    values = entry.precision.decode(raw, entry.count)
    if bits is None:
        return _ReadLayer(torch.from_numpy(values).reshape(entry.shape), flipped, canonical)
    return _ReadLayer(join_support(bits, torch.from_numpy(values), entry.shape), flipped, canonical)


def _live_weights(entry: LayerEntry, gates: Tensor | None) -> Bits:
    live = None
    if gates is not None and gates.dtype == torch.bool and gates.dim() == 1:
        live = live_weights(entry.shape or (), support_of(gates))
    if live is None:
        raise CorruptFrameError(
            f"its rows are said to be off by a mask {entry.name}{GATES}, and that turns none off, "
            "turns all off, or is no mask of its rows"
        )
    return live


def _read_differences(
    name: str,
    shape: tuple[int, ...],
    precision: Codec,
    raw: memoryview,
    reference: Reference | None,
) -> Values:
    base = base_of(name, shape, reference)
    if base is None:
        raise CorruptFrameError("the receiver does not know its values of an earlier round")
    return add_difference(base, precision.decode(raw, math.prod(shape)))


def _check_known(entry: LayerEntry, known: Known) -> None:
    lacking = None
    if entry.kind == DELTA and known.last is None:
        lacking = "its mask of an earlier round"
    elif entry.with_recent and known.recent is None:
        lacking = "which of its weights flipped in an earlier round"
    elif entry.with_classes and (known.classes is None or len(known.classes.order) != known.numel):
        lacking = "the classes of its weights"
    if lacking:
        raise CorruptFrameError(f"the receiver does not know {lacking}")


def _find_reference(header: FrameHeader, references: Sequence[Reference]) -> Reference | None:
    if header.reference is None:
        return None
    for reference in references:
        if reference.round == header.reference:
            return reference
    held = ", ".join(str(reference.round) for reference in references) or "none"
    raise MissingReferenceError(
        f"a delta frame needs the frame it builds on; {name_frame(header.sender, header.round)} "
        f"builds on round {header.reference}, and the rounds held of this sender are: {held}. The "
        "relay sends what is missing next."
    )


def _unfit(header: FrameHeader, what: str) -> CorruptFrameError | MissingReferenceError:
    """The error of a frame with a good checksum that does not fit what is known."""
    who = name_frame(header.sender, header.round)
    if header.reference is None and not any(entry.with_classes for entry in header.layers):
        return corrupt(who, what)
    return MissingReferenceError(
        "sender and receiver must know the same of earlier rounds and of the classes of weights; "
        f"{who} does not fit: {what}. The relay sends a whole frame next time."
    )
