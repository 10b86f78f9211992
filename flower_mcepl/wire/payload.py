"""A payload's layers as both ends see them: support, values, what is known of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.wire.digits import Bits, Ints
from flower_mcepl.wire.layout import GATES
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
    """Layer name to the weights (flat, ascending) that flipped when it was sent.

    Without the layers that came whole.
    """
    content: str = ""
    """The content digest of its frame, 16 hex digits; empty if it came in none."""


def support_of(tensor: Tensor) -> Bits | None:
    """Which weights of a payload's tensor are on, flat; None of dense floats."""
    if tensor.layout is torch.sparse_coo:
        bits = np.zeros(tuple(tensor.shape), np.bool_)
        if len(tensor.values()):  # without indices a scalar would be set, too
            bits[tuple(tensor.indices().cpu().numpy())] = True
        return bits.reshape(-1)
    if tensor.dtype == torch.bool:
        octets = tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)
        return np.asarray(octets != 0)  # a bool that is a view of other bytes may hold a 2
    return None


def values_of(tensor: Tensor) -> Values | None:
    """Values of a payload's tensor, flat, of those that are on; None of a mask."""
    if tensor.dtype == torch.bool:
        return None
    values = tensor.values() if tensor.layout is torch.sparse_coo else tensor
    return np.asarray(values.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1))


def join_support(bits: Bits, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The coalesced sparse COO tensor with ``values`` where ``bits`` (flat) are on."""
    on = np.flatnonzero(bits)
    if len(on) != len(values):
        raise CorruptFrameError(f"{len(values)} values came for {len(on)} weights")
    places = (
        np.stack(np.unravel_index(on, tuple(shape))) if shape else np.zeros((0, len(on)), np.int64)
    )
    indices = torch.from_numpy(places)
    return torch.sparse_coo_tensor(
        indices, values, tuple(shape), is_coalesced=True, check_invariants=False
    )


def known_of(
    name: str, shape: Sequence[int], reference: Reference | None, prior: Prior | None
) -> Known:
    """What both ends know of a layer's support."""
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


def coding_order(name: str) -> tuple[bool, str]:
    """Key by which layers are range-coded: gates first, which the others need."""
    return not name.endswith(GATES), name


def live_weights(shape: Sequence[int], gates: Bits | None) -> Bits | None:
    """Weights of the rows that are on, flat; None where no row is off, or all are."""
    if gates is None or not shape or len(gates) != shape[0] or gates.all() or not gates.any():
        return None
    return np.repeat(gates, math.prod(shape[1:]))


def base_of(name: str, shape: Sequence[int], reference: Reference | None) -> Values | None:
    """Base of a layer's differences: its values, flat, that both ends hold; or None."""
    tensor = None if reference is None else reference.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != tuple(shape) or support_of(tensor) is not None:
        return None
    return values_of(tensor)


def canonical_values(values: Values) -> list[bytes | memoryview]:
    """What stands for a layer of differences in the content digest: what comes out."""
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
