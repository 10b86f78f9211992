"""Fusion by overlap: a neighbor counts for as much as its mask resembles one's own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flower_mcepl.masks import Fusion


def overlap_mean(masks: Sequence[Tensor], own: Tensor) -> Tensor:
    """Average the neighbors' masks, weighted by ``|m_j & m_i| / |m_j | m_i|``."""
    overlaps = [(mask & own).sum() / (mask | own).sum().clamp(min=1) for mask in masks]
    weights = torch.stack(overlaps) + 1e-6  # masks apart from one's own: the plain mean
    weights = weights / weights.sum()
    return torch.stack([w * mask for w, mask in zip(weights, masks, strict=True)]).sum(dim=0)


OVERLAP = Fusion(hear=overlap_mean)  # it ranks as MCE-PL does: y = z + mean(|z|) sign(z) n
