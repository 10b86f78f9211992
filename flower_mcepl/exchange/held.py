"""A payload as it is kept until the next frame builds on it: one bit a weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.agents.parts.words import from_words
from flower_mcepl.errors import CorruptFrameError, StateError
from flower_mcepl.files.bundle import Arrays
from flower_mcepl.wire.layout import digest
from flower_mcepl.wire.payload import Reference, join_support, support_of, values_of
from flower_mcepl.wire.support import pack, packed_bytes, unpack

ABSENT, MASK, DENSE, SPARSE = range(4)  # what a layer's tensor is
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)  # bits of each byte


@dataclass(frozen=True)
class Held:
    """A payload of one sender, packed into a few arrays.

    Parameters
    ----------
    round : int
        When it was sent.
    kinds : uint8 array
        What each layer of the model is, the layers sorted by name.
    bits : uint8 array
        The masks, 8 weights a byte, layer after layer, each from a new byte.
    values : float32 array
        The values, layer after layer.
    flips : uint32 array
        The weights that flipped when it was sent, ascending, all layers strung
        together.
    content : str
        The digest of the content that its frame told; empty if it came in no frame.
    came : int, optional
        The holder's round in which it came, where its sender counts rounds of its own.
    """

    round: int
    kinds: NDArray[np.uint8]
    bits: NDArray[np.uint8]
    values: NDArray[np.float32]
    flips: NDArray[np.uint32]
    content: str = ""
    came: int | None = None

    @property
    def since(self) -> int:
        """Round from which on the holder counts its age."""
        return self.round if self.came is None else self.came

    @cached_property
    def identity(self) -> str:
        """Digest of content and flips; empty if it came in no frame."""
        return self.content and self.content + digest([self.flips.data]).hex()

    @classmethod
    def of(cls, reference: Reference, layers: Mapping[str, tuple[int, ...]]) -> "Held":
        """Pack a payload; ``layers`` are the names and shapes of the model."""
        kinds, bits, values, flips = [], [], [], []
        start = 0
        for name in sorted(layers):
            tensor = reference.tensors.get(name)
            support = None if tensor is None else support_of(tensor)
            own = None if tensor is None else values_of(tensor)
            kinds.append(
                ABSENT
                if tensor is None
                else (support is not None) * MASK + (own is not None) * DENSE
            )
            bits.append(b"" if support is None else pack(support))
            values.append(np.zeros(0, np.float32) if own is None else own)
            flips.append(np.asarray(reference.flips.get(name, ()), np.int64) + start)
            start += math.prod(layers[name])
        return cls(
            reference.round,
            np.array(kinds, np.uint8),
            np.frombuffer(b"".join(bits), np.uint8),
            np.concatenate([np.zeros(0, np.float32), *values]),
            np.concatenate([np.zeros(0, np.int64), *flips]).astype(np.uint32),
            reference.content,
        )

    def reference(self, layers: Mapping[str, tuple[int, ...]]) -> Reference:
        """Return the payload as it was given, its tensors writable."""
        tensors: dict[str, Tensor] = {}
        flips = {}
        at_bits = at_values = start = 0
        for kind, name in zip(self.kinds, sorted(layers), strict=True):
            shape = layers[name]
            numel = math.prod(shape)
            support = None
            if kind in (MASK, SPARSE):
                end = at_bits + packed_bytes(numel)
                support, at_bits = unpack(self.bits[at_bits:end], numel), end
            if kind in (DENSE, SPARSE):
                end = at_values + (numel if support is None else int(support.sum()))
                values = torch.from_numpy(self.values[at_values:end].copy())
                at_values = end
                tensors[name] = (
                    values.reshape(shape)
                    if support is None
                    else join_support(support, values, shape)
                )
            elif support is not None:
                tensors[name] = torch.from_numpy(support).reshape(shape)
            begin, end = np.searchsorted(self.flips, [start, start + numel])
            if end > begin:
                flips[name] = self.flips[begin:end].astype(np.int64) - start
            start += numel
        return Reference(self.round, tensors, flips, self.content)

    def names(self, layers: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Layers that the payload has, sorted by name."""
        in_order = zip(sorted(layers), self.kinds, strict=True)
        return [name for name, kind in in_order if kind != ABSENT]

    def counts(self, layers: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Number of weights that each layer of `names` keeps."""
        counts, at = [], 0
        for kind, name in zip(self.kinds, sorted(layers), strict=True):
            numel = math.prod(layers[name])
            size = packed_bytes(numel) if kind in (MASK, SPARSE) else 0
            on = int(_ONES[self.bits[at : at + size]].sum(dtype=np.int64))
            if kind != ABSENT:
                counts.append(numel if kind == DENSE else on)
            at += size
        return counts

    def keeps(self, due: Sequence[int], layers: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the layers of `names` keep so many weights, and none of them none."""
        # no retention is 0: a layer that has weights keeps one at least
        sizes = [math.prod(layers[name]) for name in self.names(layers)]
        return self.counts(layers) == [*due] and not any(
            count == 0 < size for count, size in zip(due, sizes, strict=True)
        )

    def arrays(self) -> Arrays:
        """Return what must be saved; `from_arrays` takes it back."""
        content = (
            {"content": np.frombuffer(bytes.fromhex(self.content), np.uint8)}
            if self.content
            else {}
        )
        came = {} if self.came is None else {"came": np.array([self.came], np.int64)}
        return {
            "round": np.array([self.round], np.int64),
            "kinds": self.kinds,
            "bits": self.bits,
            "values": self.values,
            "flips": self.flips,
            **content,
            **came,
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], layers: Mapping[str, tuple[int, ...]]
    ) -> "Held":
        """Take back what `arrays` gave.

        Raises
        ------
        StateError
            If it is damaged or belongs to other layers.
        """
        try:
            (round,) = arrays["round"].tolist()
            content = arrays["content"].tobytes().hex() if "content" in arrays else ""
            came = arrays["came"].tolist() if "came" in arrays else [None]
            held = cls(
                round, arrays["kinds"], arrays["bits"], arrays["values"], arrays["flips"], content
            )
            held = replace(held, came=came[0])
            held._check(layers)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StateError(
                "a saved payload must be whole and of this model's layers; this one is not "
                f"({error!r}). Use the state that this agent saved for this model, or start "
                "afresh."
            ) from error
        return held

    def _check(self, layers: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless all arrays fit the layers and each other."""
        for name, dtype in (("kinds", "u1"), ("bits", "u1"), ("values", "f4"), ("flips", "u4")):
            array = getattr(self, name)
            if array.dtype != np.dtype(dtype) or array.ndim != 1:
                raise ValueError(f"{name} is {array.dtype} with {array.ndim} dimensions")
        if len(self.content) not in (0, 16):
            raise ValueError(f"a content of {len(self.content)} hex digits")
        sizes = np.array([math.prod(layers[name]) for name in sorted(layers)], np.int64)
        if len(self.kinds) != len(sizes) or np.any(self.kinds > SPARSE):
            raise ValueError(f"kinds {self.kinds.tolist()} for {len(sizes)} layers")
        masked = np.isin(self.kinds, (MASK, SPARSE))
        if len(self.bits) != sum(packed_bytes(size) for size in sizes[masked].tolist()):
            raise ValueError(f"{len(self.bits)} bytes of bits")
        num_values, at = 0, 0
        for kind, size in zip(self.kinds.tolist(), sizes.tolist(), strict=True):
            if kind == DENSE:
                num_values += size
            elif kind == SPARSE:
                num_values += int(unpack(self.bits[at : at + packed_bytes(size)], size).sum())
            at += packed_bytes(size) if kind in (MASK, SPARSE) else 0
        if len(self.values) != num_values:
            raise ValueError(f"{len(self.values)} values")
        if np.any(np.diff(self.flips.astype(np.int64)) <= 0) or np.any(self.flips >= sizes.sum()):
            raise ValueError("flips that do not ascend or lie beyond the model")


def restore_held(
    arrays: Mapping[str, NDArray[Any]], layers: Mapping[str, tuple[int, ...]], where: str
) -> dict[int, Held]:
    """Payload held under each number, from arrays by names such as ``"3/bits"``."""
    grouped: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        number, _, part = name.partition("/")
        grouped.setdefault(number, {})[part] = array
    held = {}
    for number, parts in grouped.items():
        try:
            held[int(number)] = Held.from_arrays(parts, layers)
        except (StateError, ValueError) as error:
            raise StateError(f"{where}, number {number}: {error}") from error
    return held


def check_finite(
    tensors: Mapping[str, Tensor], who: str, *, types: Mapping[str, torch.dtype]
) -> None:
    """Refuse values from which an average would never recover.

    ``types`` say what floats stand for, where that is not float32.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool:
            continue
        values = from_words(tensor, types.get(name, torch.float32))
        if not bool(values.isfinite().all()):
            raise CorruptFrameError(
                f"values must be finite; {who} has some in layer {name!r} that are infinite or "
                "not a number. Look at why its training left the finite numbers."
            )
