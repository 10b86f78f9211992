"""The support of a layer (which weights are on), coded in the cheapest of three ways.

Bit by bit, on its own, or as flips against an earlier frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.errors import ConfigError
from flower_mcepl.wire.digits import Bits, Ints
from flower_mcepl.wire.groups import Classes, Groups, Sorted
from flower_mcepl.wire.range_coding import (
    BitReader,
    BitWriter,
    estimate_bits,
    read_positions,
    write_positions,
)

PACKED, ALONE, DELTA = 1, 2, 3  # as on the wire
FEW = 16  # recent flips have groups of their own where at most one weight in so many is one
NOTHING = np.zeros(0, np.int64)


class Prior:
    """Classes of weights that flip about equally often, known to all beforehand.

    Parameters
    ----------
    labels : Mapping[str, Tensor]
        Layer name to the class of each weight, uint8, in the layer's shape. Sender and
        receiver must have the same.

    Raises
    ------
    ConfigError
        If a tensor is not uint8.
    """

    def __init__(self, labels: Mapping[str, Tensor]) -> None:
        for name, label in labels.items():
            if label.dtype != torch.uint8:
                raise ConfigError(
                    f"the classes of weights are uint8 tensors; layer {name!r} has {label.dtype}."
                )
        self._labels = {
            name: labels[name].detach().cpu().numpy().reshape(-1) for name in sorted(labels)
        }
        self._classes: dict[str, Classes] = {}

    def classes(self, name: str) -> Classes | None:
        """Classes of a layer's weights; None if it has none."""
        if name in self._labels and name not in self._classes:
            self._classes[name] = Classes.of(self._labels[name])
        return self._classes.get(name)

    @cached_property
    def digest(self) -> bytes:
        """8 bytes that stand for all labels."""
        digest = blake2b(digest_size=8)
        for name, label in self._labels.items():
            digest.update(name.encode() + b"\0" + label.size.to_bytes(8, "little"))
            digest.update(label.tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Known:
    """What sender and receiver both know of a layer of ``numel`` weights."""

    numel: int
    last: Bits | None = None  # its bits in the reference, [numel]
    recent: Ints | None = None  # weights that flipped when the reference was sent, ascending
    classes: Classes | None = None

    def among(self, live: Bits) -> "Known":
        """What is known of the live weights alone, numbered anew in their order."""
        recent = self.recent
        return Known(
            int(live.sum()),
            None if self.last is None else self.last[live],
            None if recent is None else (np.cumsum(live) - 1)[recent[live[recent]]],
            None if self.classes is None else self.classes.among(live),
        )


@dataclass(frozen=True)
class SupportCode:
    """How a layer's bits are going to be coded."""

    kind: int  # PACKED, ALONE or DELTA
    num_bits: float  # about what it costs
    with_classes: bool = False
    with_recent: bool = False
    among_live: bool = False  # the weights of filters that are off are not coded
    # that are on (ALONE) or have flipped (DELTA)
    weights: Ints = field(default_factory=lambda: NOTHING)
    # where they lie, unless packed; ranks cost more than an estimate, and are made last
    groups: Groups | None = None
    taken: Sorted | None = None

    def write(self, writer: BitWriter) -> None:
        """Append the range-coded bits; packed ones lie elsewhere."""
        if self.groups is not None and self.taken is not None:
            ranks = self.groups.ranks(self.taken)
            write_positions(writer, self.groups.sizes, self.taken.counts, ranks)


def choose_code(bits: Bits, known: Known, live: Bits | None = None) -> SupportCode:
    """The cheapest code of ``bits`` [numel] for a receiver who knows ``known``.

    ``live`` are the weights of filters that are on, which the receiver knows, too; all
    others must be off.
    """
    packed = SupportCode(PACKED, 8.0 * packed_bytes(known.numel))
    if live is None:
        return min([packed, *_range_codes(bits, known)], key=lambda code: code.num_bits)
    inside = _range_codes(bits[live], known.among(live))
    places = np.flatnonzero(live)
    codes = [replace(code, among_live=True, weights=places[code.weights]) for code in inside]
    return min([packed, *codes], key=lambda code: code.num_bits)


def _range_codes(bits: Bits, known: Known) -> list[SupportCode]:
    """The ways to range-code ``bits`` that are worth comparing."""
    codes = []
    if known.numel and known.last is not None:
        recent = known.recent
        if recent is not None and not 0 < len(recent) * FEW <= known.numel:
            recent = None
        flips = np.flatnonzero(bits ^ known.last)
        codes.append(_coded(DELTA, flips, Known(known.numel, known.last, recent, known.classes)))
    # a good delta need not be compared
    if known.numel and not (codes and codes[0].num_bits <= 2.0 * packed_bytes(known.numel)):
        codes.append(_coded(ALONE, np.flatnonzero(bits), Known(known.numel, classes=known.classes)))
    return codes


def _coded(kind: int, weights: Ints, known: Known) -> SupportCode:
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    taken = groups.sort(weights)
    return SupportCode(
        kind,
        estimate_bits(groups.sizes, taken.counts),
        with_classes=known.classes is not None,
        with_recent=known.recent is not None,
        weights=weights,
        groups=groups,
        taken=taken,
    )


def read_among(reader: BitReader, count: int, known: Known, live: Bits | None) -> tuple[Bits, Ints]:
    """Read as `read_support` does, of the live weights alone where they are given."""
    if live is None:
        return read_support(reader, count, known)
    inside, weights = read_support(reader, count, known.among(live))
    bits = np.zeros(known.numel, np.bool_)
    bits[live] = inside
    return bits, np.flatnonzero(live)[weights]


def read_support(reader: BitReader, count: int, known: Known) -> tuple[Bits, Ints]:
    """Read range-coded bits, as flips where ``known.last`` is given.

    ``count`` is the number of weights that are coded; ``known`` holds exactly what the
    sender used. Returns the bits and these weights.
    """
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    weights = groups.weights(*read_positions(reader, groups.sizes, count))
    bits = np.zeros(known.numel, np.bool_) if known.last is None else known.last.copy()
    bits[weights] = True if known.last is None else ~bits[weights]
    return bits, weights


def packed_bytes(numel: int) -> int:
    """Size in bytes of ``numel`` packed bits."""
    return (numel + 7) // 8


def pack(bits: Bits) -> bytes:
    """The bits, 8 a byte, most significant first; the padding is zero."""
    return np.packbits(bits, bitorder="big").tobytes()


def unpack(data: memoryview | NDArray[np.uint8], numel: int) -> Bits:
    """The bits; the padding is not looked at."""
    return np.unpackbits(np.frombuffer(data, np.uint8), count=numel, bitorder="big").view(np.bool_)
