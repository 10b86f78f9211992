"""Masks of sparse weights: the first ones, how they move, and averages under them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def erk_densities(shapes: Mapping[str, tuple[int, ...]], *, density: float) -> dict[str, float]:
    """Divide a density among layers by Erdős-Rényi-Kernel (ERK).

    A layer's density is proportional to ``Σ dims / Π dims``. Layers that would be more
    than full are full, and the others divide what is left, so that the layers together
    keep ``density`` of all weights.

    Source: Evci et al. 2020 (RigL, arXiv:1911.11134), section 3.
    """
    full: set[str] = set()
    while len(full) < len(shapes):
        budget = sum(density * math.prod(shape) for shape in shapes.values())
        budget -= sum(math.prod(shapes[name]) for name in full)
        scale = budget / sum(sum(shape) for name, shape in shapes.items() if name not in full)
        shares = {
            name: scale * sum(shape) / math.prod(shape)
            for name, shape in shapes.items()
            if name not in full
        }
        if max(shares.values()) <= 1:
            return {name: shares.get(name, 1.0) for name in shapes}
        full |= {name for name, share in shares.items() if share > 1}
    return dict.fromkeys(shapes, 1.0)


def random_mask(shape: tuple[int, ...], *, density: float, generator: torch.Generator) -> Tensor:
    """Draw a bool mask with ``density`` of the entries, rounded; at least one."""
    numel = math.prod(shape)
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[: max(1, round(density * numel))]] = True
    return mask.view(shape)


def drop_share(round: int, *, drop_fraction: float, anneal_rounds: int) -> float:
    """Share of weights that moves in ``round``: ``α_t = α/2 (1 + cos(π t/T))``.

    t is round - 1, rounds being 1, 2, ...; the share is zero from ``t = T`` on.

    Source: Dai et al. 2022 (Dis-PFL, arXiv:2206.00187), algorithm 2.
    """
    return drop_fraction / 2 * (1 + math.cos(math.pi * min((round - 1) / anneal_rounds, 1.0)))


def drop_smallest(weight: Tensor, mask: Tensor, *, count: int) -> Tensor:
    """Mask without the ``count`` smallest of its weights; of equals the earlier go."""
    magnitude = torch.where(mask, weight.detach().abs(), math.inf).flatten()
    return _flipped(mask, magnitude.sort(stable=True).indices[:count])


def grow_largest(gradient: Tensor, mask: Tensor, *, count: int) -> Tensor:
    """Mask with ``count`` more weights, of largest gradient; of equals the earlier."""
    magnitude = torch.where(mask, -1.0, gradient.abs()).flatten()
    return _flipped(mask, magnitude.sort(stable=True, descending=True).indices[:count])


def grow_random(mask: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Mask with ``count`` more weights, drawn evenly from those that it lacks."""
    free = (~mask).flatten().nonzero().squeeze(1)
    chosen = torch.randperm(len(free), generator=generator)[:count]
    return _flipped(mask, free[chosen.to(free.device)])


def _flipped(mask: Tensor, places: Tensor) -> Tensor:
    flipped = mask.flatten().clone()
    flipped[places] = ~flipped[places]
    return flipped.view_as(mask)


def overlap_mean(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Average each weight over those that hold it, ``Σ_j w_j ⊘ Σ_j m_j``.

    One that nobody holds is zero. ``values`` are zero outside their masks.
    """
    total, count = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for value, mask in zip(values, masks, strict=True):
        total += value
        count += mask
    return total / count.clamp(min=1)


def to_sparse(weight: Tensor, mask: Tensor) -> Tensor:
    """Coalesced sparse tensor of the weights at the mask's places, with their zeros."""
    return torch.sparse_coo_tensor(
        mask.nonzero().T, weight[mask], weight.shape, is_coalesced=True, check_invariants=True
    )


def from_sparse(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and mask of a tensor; a dense one holds what is not zero."""
    if tensor.layout is not torch.sparse_coo:
        return tensor, tensor != 0
    coalesced = tensor.coalesce()
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    mask[tuple(coalesced.indices())] = True
    return coalesced.to_dense(), mask
