"""Turn masks and float tensors into framed bytes.

Byte by byte in ``docs/wire-format.md``. A frame is one agent's payload of one round. It
says who sent it, when, and for which frozen weights, and it ends in a checksum. As in
video, it is whole (a key frame) or holds what changed against an earlier frame of the
same sender (a delta frame).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_mcepl.errors import ConfigError
from flower_mcepl.wire.digits import Bits, Ints
from flower_mcepl.wire.layout import (
    CONTENT,
    DESCRIBED,
    DIGEST_NBYTES,
    FIXED,
    GATES,
    MAGIC,
    NO_REFERENCE,
    U16,
    U32,
    WIRE_VERSION,
    LayerEntry,
    bind,
    describe,
    digest,
    model_digest,
    varint,
)
from flower_mcepl.wire.payload import (
    Reference,
    base_of,
    canonical_pieces,
    canonical_values,
    coding_order,
    known_of,
    live_weights,
    support_of,
    values_of,
)
from flower_mcepl.wire.range_coding import BitWriter
from flower_mcepl.wire.support import (
    DELTA,
    PACKED,
    Prior,
    SupportCode,
    choose_code,
    pack,
    unpack,
)
from flower_mcepl.wire.values import (
    FLOAT32,
    Codec,
    Values,
    add_difference,
    difference,
    find_precision,
)


@dataclass(frozen=True)
class WrittenFrame:
    """An encoded frame and what its sender must know of it."""

    data: bytes
    reference: int | None  # the round it builds on; None: it is whole
    header_bytes: int  # of ``data``; the rest is payload
    content: str  # 16 hex digits that stand for what it decodes to
    flips: dict[str, Ints]  # as in `Frame`
    # where the precision is of differences: the dense layers as they come out, float32
    decoded: dict[str, Tensor]


def encode_frame(
    tensors: Mapping[str, Tensor],
    *,
    sender: int,
    round: int,
    fingerprint: str,
    reference: Reference | None = None,
    prior: Prior | None = None,
    precision: str = "float32",
    packed: bool = False,
    run: str = "",
) -> bytes:
    """Frame one agent's payload.

    The same tensors give the same bytes, whatever the order of the mapping.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Layer name to bool tensor (a mask), float tensor, or coalesced sparse COO tensor
        of floats (a mask and the values under it; explicit zeros count as kept).
        Scalars, empty layers and no layers at all are fine.
    sender : int
        Index of the agent that sends, 0 to 2**32 - 1.
    round : int
        The round it is sent in, 0 to 2**32 - 2.
    fingerprint : str
        Fingerprint of the shared frozen weights, 32 lower-case hex digits.
    reference : Reference | None (default: None)
        What the receivers hold of this sender, or the common first payload. None makes
        the frame whole.
    prior : Prior | None (default: None)
        Classes of weights that the receivers know, too.
    precision : str (default: "float32")
        How floats travel: "float32", "float16", "bfloat16", "int8" (127 steps up to the
        layer's largest value), "int8-differences" (127 steps up to the largest change
        against the reference, for dense layers alone; what has no reference travels as
        float32), or the name of a `Codec` that an installed package adds. Whatever it
        is, float32 comes out at the other end.
    packed : bool (default: False)
        Spend one bit on every weight of a mask, without range coding.
    run : str (default: "")
        Id of the run that it belongs to, 16 lower-case hex digits; empty: to none.

    Raises
    ------
    ConfigError
        If a value does not fit the format.
    """
    return write_frame(
        tensors,
        sender=sender,
        round=round,
        fingerprint=fingerprint,
        reference=reference,
        prior=prior,
        precision=precision,
        packed=packed,
        run=run,
    ).data


def write_frame(
    tensors: Mapping[str, Tensor],
    *,
    sender: int,
    round: int,
    fingerprint: str,
    reference: Reference | None = None,
    prior: Prior | None = None,
    precision: str = "float32",
    packed: bool = False,
    run: str = "",
) -> WrittenFrame:
    """The frame that `encode_frame` gives, with what its sender must know of it."""
    for word, value, most in (("sender", sender, U32), ("round", round, U32 - 1)):
        if not 0 <= value <= most:
            raise ConfigError(f"the {word} of a frame must lie in 0 to {most}; got {value}.")
    if len(tensors) > U16:
        raise ConfigError(
            f"a frame holds at most {U16} layers; got {len(tensors)}. Send them in several frames."
        )
    description = describe(
        fingerprint, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    )
    codec = find_precision(precision)
    parts = [_Part.of(name, tensors[name], codec, reference) for name in sorted(tensors)]
    inside = _Inside.of(parts, description, reference, prior, packed=packed)
    # at the worst a mask is one bit per weight
    if not packed and any(part.support is not None for part in parts):
        inside = min(_Inside.of(parts, description, reference, None, packed=True), inside, key=len)
    total = FIXED.size + len(inside) + DIGEST_NBYTES
    if total > U32:
        raise ConfigError(
            f"a frame has at most {U32} bytes; this one would have {total}. Send it in several "
            "frames."
        )
    fixed = FIXED.pack(
        MAGIC,
        WIRE_VERSION,
        DESCRIBED if inside.described else 0,
        len(parts),
        sender,
        round,
        NO_REFERENCE if inside.builds_on is None else inside.builds_on,
        model_digest(description, prior, run),
        bytes(DIGEST_NBYTES),
        total,
    )
    content = digest(piece for part in parts for piece in part.canonical())
    header = fixed + inside.header
    bound = bind(content, header)
    pieces = [header[: CONTENT.start], bound, header[CONTENT.stop :], *inside.payload]
    data = b"".join([*pieces, digest(pieces)])
    decoded = {
        p.name: torch.from_numpy(p.decoded).reshape(p.shape) for p in parts if p.decoded is not None
    }
    return WrittenFrame(
        data, inside.builds_on, len(header) + DIGEST_NBYTES, content.hex(), inside.flips, decoded
    )


@dataclass(frozen=True)
class _Inside:
    """What lies between the fixed header and the checksum."""

    header: bytes
    payload: list[bytes]  # in pieces: it is as large as the frame
    builds_on: int | None
    flips: dict[str, Ints]

    @classmethod
    def of(
        cls,
        parts: Sequence["_Part"],
        description: bytes,
        reference: Reference | None,
        prior: Prior | None,
        *,
        packed: bool,
    ) -> "_Inside":
        """Code every layer the cheapest way, or packed."""
        gates = {part.name: part for part in parts if part.is_mask and len(part.shape) == 1}
        coder, flips, entries, raw = BitWriter(), {}, {}, {}
        # one layer after the other: positions take many times the memory of bits
        for part in sorted(parts, key=lambda part: coding_order(part.name)):
            code = part.code(reference, prior, packed=packed, gates=gates.get(part.name + GATES))
            entries[part.name], raw[part.name] = part.entry(code), part.raw(code)
            if code is not None:
                code.write(coder)
                if code.kind == DELTA:
                    flips[part.name] = code.weights
        coded = coder.to_bytes()
        in_order = [part.name for part in parts]
        builds_on = (
            reference.round
            if reference and any(entry.is_change for entry in entries.values())
            else None
        )
        header = b"".join(entries[name].line() for name in in_order) + varint(len(coded))
        if not builds_on:  # also against the first payload: a key frame says what it is
            header = description + header
        payload = [piece for name in in_order for piece in raw[name]]
        return cls(header, [*payload, coded], builds_on, flips)

    def __len__(self) -> int:
        return len(self.header) + sum(map(len, self.payload))

    @property
    def described(self) -> bool:
        """Whether fingerprint, names and shapes are in the header."""
        return not self.builds_on


@dataclass(frozen=True)
class _Part:
    """A layer on its way into a frame."""

    name: str
    shape: tuple[int, ...]
    support: bytes | None  # packed; None: all weights
    num_values: int
    values: bytes  # as they travel
    precision: Codec | None  # None: a mask, without values
    # where a precision of differences was asked for: what comes out, flat
    decoded: Values | None = None

    @classmethod
    def of(
        cls, name: str, tensor: Tensor, precision: Codec, reference: Reference | None
    ) -> "_Part":
        sparse = (
            tensor.layout is torch.sparse_coo and tensor.is_coalesced() and tensor.dense_dim() == 0
        )
        known = torch.float32, torch.float16, torch.bfloat16
        good = tensor.dtype in known if sparse else tensor.dtype in (torch.bool, *known)
        if not (sparse or tensor.layout is torch.strided) or not good or tensor.is_meta:
            raise ConfigError(
                "a frame carries dense bool tensors, and dense or coalesced sparse COO tensors of "
                f"float32, float16 or bfloat16; layer {name!r} is {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device}. Convert it first: `.bool()` for a mask, "
                "`.float()` for values, `.coalesce()` for sparse ones."
            )
        shape, bits = tuple(tensor.shape), support_of(tensor)
        support = None if bits is None else pack(bits)
        values = values_of(tensor)
        if values is None:
            return cls(name, shape, support, 0, b"", None)
        if precision.of_differences:
            if support is not None:
                raise ConfigError(
                    f"precision {precision.name} is for dense layers, whose every weight has a "
                    f"value before and after; layer {name!r} is sparse. Send it with another "
                    "precision, such as int8."
                )
            return cls._of_differences(
                name, shape, values, precision, base_of(name, shape, reference)
            )
        return cls(name, shape, support, values.size, precision.encode(values), precision)

    @classmethod
    def _of_differences(
        cls,
        name: str,
        shape: tuple[int, ...],
        values: Values,
        precision: Codec,
        base: Values | None,
    ) -> "_Part":
        """Differences from what receivers hold, where that is possible and shorter."""
        if base is None or precision.size(values.size) >= FLOAT32.size(values.size):
            return cls(
                name, shape, None, values.size, FLOAT32.encode(values), FLOAT32, values.copy()
            )
        packed = precision.encode(difference(values, base))
        decoded = add_difference(base, precision.decode(memoryview(packed), values.size))
        return cls(name, shape, None, values.size, packed, precision, decoded)

    @property
    def is_mask(self) -> bool:
        """Whether it has bits and no values."""
        return self.support is not None and self.precision is None

    @property
    def bits(self) -> Bits | None:
        """The support, flat; None: all weights."""
        if self.support is None:
            return None
        return unpack(memoryview(self.support), math.prod(self.shape))

    def canonical(self) -> list[bytes | memoryview]:
        """What stands for it in the content digest."""
        if self.decoded is not None:
            return canonical_values(self.decoded)
        return canonical_pieces(self.support, self.precision, self.values)

    def code(
        self,
        reference: Reference | None,
        prior: Prior | None,
        *,
        packed: bool,
        gates: "_Part | None" = None,
    ) -> SupportCode | None:
        """How its bits are coded, whose rows ``gates`` turn on; None without any."""
        bits = None if packed else self.bits
        if self.support is None:
            return None
        if bits is None:
            return SupportCode(PACKED, 8.0 * len(self.support))
        known = known_of(self.name, self.shape, reference, prior)
        if known.classes is not None and len(known.classes.order) != known.numel:
            raise ConfigError(
                f"classes are for every weight of a layer; layer {self.name!r} has {known.numel} "
                f"weights and classes for {len(known.classes.order)}. Make the classes from the "
                "model that is sent."
            )
        live = live_weights(self.shape, gates.bits) if self.is_mask and gates else None
        if live is not None and bits[~live].any():
            live = None
        return choose_code(bits, known, live)

    def entry(self, code: SupportCode | None) -> LayerEntry:
        """Its place in the header."""
        if code is None:
            return LayerEntry(self.name, self.shape, 0, self.precision)
        return LayerEntry(
            self.name,
            self.shape,
            code.kind,
            self.precision,
            code.with_classes,
            code.with_recent,
            code.among_live,
            len(code.weights),
            self.num_values,
        )

    def raw(self, code: SupportCode | None) -> list[bytes]:
        """What lies in the frame as it is."""
        if self.support is None or code is None or code.kind != PACKED:
            return [self.values]
        return [self.support, self.values]
