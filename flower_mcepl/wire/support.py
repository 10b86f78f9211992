"""The support of a layer (which weights are on), coded in the cheapest of three ways.

Bit by bit, on its own, or as flips against an earlier frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.errors import ConfigError
from flower_mcepl.wire.digits import Bits, Ints
from flower_mcepl.wire.range_coding import (
    BitReader,
    BitWriter,
    Classes,
    Groups,
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


@dataclass(frozen=True)
class SupportCode:
    """How a layer's bits are going to be coded."""

    kind: int  # PACKED, ALONE or DELTA
    num_bits: float  # about what it costs
    with_classes: bool = False
    with_recent: bool = False
    # that are on (ALONE) or have flipped (DELTA)
    weights: Ints = field(default_factory=lambda: NOTHING)
    sizes: Ints = field(default_factory=lambda: NOTHING)  # as in range_coding
    counts: Ints = field(default_factory=lambda: NOTHING)
    ranks: Ints = field(default_factory=lambda: NOTHING)

    def write(self, writer: BitWriter) -> None:
        """Append the range-coded bits; packed ones lie elsewhere."""
        if self.kind != PACKED:
            write_positions(writer, self.sizes, self.counts, self.ranks)


def choose_code(bits: Bits, known: Known) -> SupportCode:
    """The cheapest code of ``bits`` [numel] for a receiver who knows ``known``."""
    options = [SupportCode(PACKED, 8.0 * packed_bytes(known.numel))]
    if known.numel and known.last is not None:
        recent = known.recent
        if recent is not None and not 0 < len(recent) * FEW <= known.numel:
            recent = None
        flips = np.flatnonzero(bits ^ known.last)
        options.append(_coded(DELTA, flips, Known(known.numel, known.last, recent, known.classes)))
    # a good delta need not be compared
    if known.numel and options[-1].num_bits > options[0].num_bits / 4:
        options.append(
            _coded(ALONE, np.flatnonzero(bits), Known(known.numel, classes=known.classes))
        )
    return min(options, key=lambda code: code.num_bits)


def _coded(kind: int, weights: Ints, known: Known) -> SupportCode:
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    counts, ranks = groups.ranks(weights)
    return SupportCode(
        kind,
        estimate_bits(groups.sizes, counts),
        with_classes=known.classes is not None,
        with_recent=known.recent is not None,
        weights=weights,
        sizes=groups.sizes,
        counts=counts,
        ranks=ranks,
    )


def read_support(reader: BitReader, count: int, known: Known) -> tuple[Bits, Ints]:
    """Read range-coded bits, as flips where ``known.last`` is given.

    ``count`` is the number of weights that are coded; ``known`` holds exactly what the
    sender used. Returns the bits and these weights.
    """
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    weights = groups.weights(*read_positions(reader, groups.sizes, count))
    bits = np.zeros(known.numel, np.bool_) if known.last is None else known.last.copy()
    bits[weights] ^= True
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
