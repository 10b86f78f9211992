"""How one layer lies in a frame: 1 bit a weight for masks, 32 for floats; see ``docs/wire-format.md``."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import CorruptFrameError


@dataclass(frozen=True, kw_only=True)
class Coding:
    """One way to store a layer; the registry below knows it by ``code``, the byte on the wire."""

    code: int
    dtype: torch.dtype
    nbytes: Callable[[int], int]  # of a layer with that many elements
    pack: Callable[[Tensor], bytes]  # from a contiguous tensor on the CPU
    unpack: Callable[[memoryview, int], Tensor]  # to a flat tensor with that many elements


def _pack_bits(mask: Tensor) -> bytes:
    return np.packbits(mask.numpy().reshape(-1), bitorder="big").tobytes()


def _unpack_bits(payload: memoryview, numel: int) -> Tensor:
    padding = -numel % 8
    if padding and payload[-1] & ((1 << padding) - 1):
        raise CorruptFrameError(f"the {padding} padding bits must be zero; the last byte is {payload[-1]:#04x}")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=numel, bitorder="big")
    return torch.from_numpy(bits.view(np.bool_))


def _pack_float32(tensor: Tensor) -> bytes:
    return tensor.numpy().reshape(-1).astype("<f4", copy=False).tobytes()


def _unpack_float32(payload: memoryview, numel: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(payload, "<f4", numel).astype(np.float32, copy=True))


CODINGS = {  # by the byte on the wire
    coding.code: coding
    for coding in (
        Coding(code=1, dtype=torch.bool, nbytes=lambda n: (n + 7) // 8, pack=_pack_bits, unpack=_unpack_bits),
        Coding(code=2, dtype=torch.float32, nbytes=lambda n: 4 * n, pack=_pack_float32, unpack=_unpack_float32),
    )
}
BY_DTYPE = {coding.dtype: coding for coding in CODINGS.values()}
