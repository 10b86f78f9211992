"""A payload's layers as both ends of the wire see them: which weights are on, their values, what is known of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.wire.range_coding import Bits, Ints
from flower_mcepl.wire.support import Known, Prior
from flower_mcepl.wire.values import FLOAT32, Codec, Values


@dataclass(frozen=True)
class Reference:
    """An earlier payload of the same sender, as both ends hold it.

    Round 0 stands for the common first payload, which everyone knows without hearing of
    it.
    """

    round: int
    tensors: Mapping[str, Tensor]
    flips: Mapping[str, Ints] = field(default_factory=dict)
    """Layer name to the weights (flat, ascending) that flipped when it was sent; not of layers that came whole."""
    content: str = ""
    """The digest of the content that its frame told, 16 hex digits; empty if it came in no frame."""


def support_of(tensor: Tensor) -> Bits | None:
    """Return which weights of a payload's tensor are on, flat; None where all are (a dense tensor of floats)."""
    if tensor.layout is torch.sparse_coo:
        bits = np.zeros(tuple(tensor.shape), np.bool_)
        if len(tensor.values()):  # without indices a scalar would be set, too
            bits[tuple(tensor.indices().cpu().numpy())] = True
        return bits.reshape(-1)
    if tensor.dtype == torch.bool:
        octets = tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)
        return np.asarray(octets != 0)  # a view of other bytes as bool may hold more than 0 and 1
    return None


def values_of(tensor: Tensor) -> Values | None:
    """Return the values of a payload's tensor, flat, of a sparse one those that are on; None of a mask."""
    if tensor.dtype == torch.bool:
        return None
    values = tensor.values() if tensor.layout is torch.sparse_coo else tensor
    return np.asarray(values.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1))


def join_support(bits: Bits, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the coalesced sparse COO tensor with ``values`` where ``bits`` (flat) are on."""
    on = np.flatnonzero(bits)
    if len(on) != len(values):
        raise CorruptFrameError(f"{len(values)} values came for {len(on)} weights")
    places = (
        np.stack(np.unravel_index(on, tuple(shape))) if shape else np.zeros((0, len(on)), np.int64)
    )
    found = torch.from_numpy(places), values, tuple(shape)
    return torch.sparse_coo_tensor(*found, is_coalesced=True, check_invariants=False)


def known_of(
    name: str, shape: Sequence[int], reference: Reference | None, prior: Prior | None
) -> Known:
    """Return what both ends know of a layer's support."""
    numel = math.prod(shape)
    last = None
    if (
        reference is not None
        and name in reference.tensors
        and tuple(reference.tensors[name].shape) == tuple(shape)
    ):
        last = support_of(reference.tensors[name])
    recent = None if last is None or reference is None else reference.flips.get(name)
    return Known(numel, last, recent, None if prior is None else prior.classes(name))


def base_of(name: str, shape: Sequence[int], reference: Reference | None) -> Values | None:
    """Return the values of a layer, flat, that both ends hold and differences are told against; None without any."""
    tensor = None if reference is None else reference.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != tuple(shape) or support_of(tensor) is not None:
        return None
    return values_of(tensor)


def canonical_values(values: Values) -> list[bytes | memoryview]:
    """Return what stands for a dense layer that was told as differences: what it decodes to, as float32."""
    return canonical_pieces(None, FLOAT32, FLOAT32.encode(values))


def canonical_pieces(
    support: bytes | memoryview | None, precision: Codec | None, values: bytes | memoryview
) -> list[bytes | memoryview]:
    """What stands for a layer in the content digest.

    It names the layer only together with its shape and kind, which `bind` covers.
    """
    parts = [] if support is None else [support]
    if precision is not None:
        parts += [bytes([precision.code | (support is not None) << 3]), precision.tag, values]
    return parts
