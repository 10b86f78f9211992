"""Tensors as little-endian bytes, and back."""

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.personal.layout import DTYPES

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size


def dtype_name(name: str, tensor: Tensor) -> str:
    """Name of a tensor's type in the file.

    Raises
    ------
    UnsupportedLayerError
        If the format has no such type, or the tensor is not dense.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout is not torch.strided:
        raise UnsupportedLayerError(
            f"a personal model's file holds dense tensors of {', '.join(DTYPES)}; {name} is "
            f"{dtype}, {tensor.layout}. Convert it in the model function."
        )
    return dtype


def to_bytes(tensor: Tensor) -> bytes:
    """Elements in C order, little endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    size = flat.element_size()
    whole = flat.view(_WHOLE[size]).numpy()
    return whole.astype(f"<i{size}", copy=False).tobytes()


def from_bytes(data: bytes | memoryview, dtype: str) -> Tensor:
    """Undo `to_bytes`; the tensor is flat."""
    size = DTYPES[dtype][1]
    whole = np.frombuffer(data, f"<i{size}").astype(f"=i{size}")
    return torch.from_numpy(whole).view(getattr(torch, dtype))
