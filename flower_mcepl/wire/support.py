"""Which weights of a layer are on: bit by bit, on its own, or as flips against an earlier frame; the cheapest wins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.errors import ConfigError
from flower_mcepl.wire.range_coding import (
    BitReader,
    Bits,
    BitWriter,
    Classes,
    Groups,
    Ints,
    estimate_bits,
    read_positions,
    write_positions,
)

PACKED, ALONE, DELTA = 1, 2, 3  # as on the wire
FEW = 16  # recent flips have groups of their own where at most one weight in so many flipped
NOTHING = np.zeros(0, np.int64)


class Prior:
    """What everyone knows of every weight before anything is sent: classes of weights that flip about equally often.

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
        """Return the classes of a layer, None if it has none."""
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
    recent: Ints | None = None  # the weights that flipped when the reference was sent, ascending
    classes: Classes | None = None


@dataclass(frozen=True)
class Plan:
    """How a layer's bits are going to be told."""

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


def plan_support(bits: Bits, known: Known) -> Plan:
    """Choose the cheapest way to tell ``bits`` [numel] to someone who knows ``known``."""
    options = [Plan(PACKED, 8.0 * packed_bytes(known.numel))]
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
    return min(options, key=lambda plan: plan.num_bits)


def _coded(kind: int, weights: Ints, known: Known) -> Plan:
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    counts, ranks = groups.ranks(weights)
    return Plan(
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
    """Read range-coded bits, as flips where ``known.last`` is given; return them and the weights that were told.

    ``count`` is the number of weights that are told; ``known`` holds exactly what the
    sender used.
    """
    groups = Groups(known.numel, last=known.last, recent=known.recent, classes=known.classes)
    weights = groups.weights(*read_positions(reader, groups.sizes, count))
    bits = np.zeros(known.numel, np.bool_) if known.last is None else known.last.copy()
    bits[weights] ^= True
    return bits, weights


def packed_bytes(numel: int) -> int:
    """Return how many bytes hold so many bits."""
    return (numel + 7) // 8


def pack(bits: Bits) -> bytes:
    """Return 8 bits a byte, most significant first; the padding is zero."""
    return np.packbits(bits, bitorder="big").tobytes()


def unpack(data: memoryview | NDArray[np.uint8], numel: int) -> Bits:
    """Return the bits; the padding is not looked at."""
    return np.unpackbits(np.frombuffer(data, np.uint8), count=numel, bitorder="big").view(np.bool_)
