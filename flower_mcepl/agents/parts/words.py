"""Floats of other sizes as they travel: in 32-bit words, the only floats of a frame."""

import torch
from torch import Tensor


def to_words(x: Tensor) -> Tensor:
    """Return an array as it travels: a float64 as two words, bit for bit."""
    if x.dtype == torch.float64:
        return x.reshape(*x.shape, 1).contiguous().view(torch.float32).clone()
    return x.to(torch.float32, copy=True)


# A word of a float64 is no number: one in some hundred has the bits of a NaN. So who
# looks at the numbers must know their type.
def from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_words`; the two words of a float64 leave an axis of length 1."""
    words = words.to_dense().to(torch.float32)
    return words.contiguous().view(dtype) if dtype == torch.float64 else words.to(dtype)
