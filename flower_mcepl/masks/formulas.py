"""The mathematics of MCE-PL, one pure function per formula, each for one layer.

Symbols, as in the paper (Tian, Zhang, Li, Bennis 2025, arXiv:2504.17520)::

    w  frozen weights, the same on every agent
    z  mask scores, one per weight, private to an agent
    m  mask in {0, 1}
    n  mean of the neighbors' masks, in [0, 1]
    y  aggregation tensor
    r  retention ratio: fraction of a layer's weights that stays
    g  gradient of the loss on z
    η  step size

Two-level masks, beyond the paper, add to a layer of F filters (output channels or
neurons; a filter f holds the weights e of one row)::

    s  gate scores, one per filter
    q  gates in {0, 1}: the top ceil(ρ F) of |a|, where a fuses s and the
       neighbors' gates as y fuses z and their masks
    ρ  share of the filters that stays
    t  smallest |y| that the mask keeps; it keeps the top share r of the weights that
       lie in filters with q = 1, and nothing in the others
    u  what the mask would be if all gates were open: u = 1 where |y| >= t

The network runs under ``W = w * u * q / sqrt(ρ)``, whose mask is ``m = u * q``. With
``dL/dW = G`` and ``du/d|y| := 1``, ``dq/d|a| := 1`` the product rule gives::

    dL/d|y_e| = G_e w_e q_f / sqrt(ρ)
    dL/d|a_f| = sum over e in f of G_e w_e u_e / sqrt(ρ)

A filter that is off has ``u``, so its gate still feels what it would contribute.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Real
from torch import Tensor

from flower_mcepl.errors import ConfigError, DivergedError


def kept_weights(numel: int, *, retention: float) -> int:
    """Number of weights that a mask keeps: ``numel - int((1 - r) * numel)``.

    Raises
    ------
    ConfigError
        If ``retention`` is not in (0, 1].
    """
    check_retention(retention)
    return numel - int((1 - retention) * numel)


def check_retention(retention: float, *, of: str = "a layer") -> None:
    """Raise ConfigError unless ``0 < retention <= 1``."""
    if not 0 < retention <= 1:  # also refuses NaN
        raise ConfigError(
            f"the retention ratio of {of} is the fraction of weights that stays and must be in "
            f"(0, 1]; got {retention!r}. Use for example 0.3 to keep 30 % of the weights."
        )


def topk_mask(y: Float[Tensor, "*layer"], *, retention: float) -> Bool[Tensor, "*layer"]:
    """Keep the ``numel - int((1 - r) * numel)`` entries of largest magnitude ``|y|``.

    Ties are broken by position: among equal magnitudes the lower flat index (C order)
    stays.

    Raises
    ------
    ConfigError
        If ``retention`` is not in (0, 1].
    DivergedError
        If ``y`` holds NaN.
    """
    return largest_mask(y, keep=kept_weights(y.numel(), retention=retention))


def largest_mask(y: Float[Tensor, "*layer"], *, keep: int) -> Bool[Tensor, "*layer"]:
    """Keep the ``keep`` entries of largest magnitude; ties as in `topk_mask`."""
    magnitude = _magnitude(y)
    if keep == y.numel():
        return torch.ones_like(magnitude, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    smallest_kept = _order_statistic(magnitude, y.numel() - keep)
    mask = _at_least(magnitude, smallest_kept)
    surplus = int(mask.count_nonzero()) - keep
    if surplus > 0:
        ties = (magnitude == smallest_kept).flatten().nonzero().squeeze(1)
        mask.view(-1)[ties[-surplus:]] = False
    return mask


def largest_masks(
    y: Float[Tensor, " agents *layer"], *, keep: Sequence[int]
) -> Bool[Tensor, " agents *layer"]:
    """`largest_mask` of each agent in a stack, with a number for each."""
    if y.device.type == "cpu":  # a quickselect each, see `_order_statistic`
        return torch.stack([largest_mask(part, keep=k) for part, k in zip(y, keep, strict=True)])
    return masks_by_sorting(y, keep=keep)


def masks_by_sorting(
    y: Float[Tensor, " agents *layer"], *, keep: Sequence[int]
) -> Bool[Tensor, " agents *layer"]:
    """`largest_masks` by one sort of all, without a word from the device."""
    magnitude = _magnitude(y).reshape(len(keep), y[0].numel())
    places = magnitude.sort(dim=1, descending=True, stable=True).indices
    kept = torch.tensor(keep, device=y.device)[:, None]
    first = torch.arange(magnitude.shape[1], device=y.device) < kept
    return torch.zeros_like(first).scatter_(1, places, first).view(y.shape)


def two_of_four(y: Float[Tensor, "*layer"]) -> Bool[Tensor, "*layer"]:
    """Keep the 2 largest ``|y|`` of every 4 inputs in a row; ties as in `topk_mask`.

    The last axis is that of the inputs, and a multiple of 4.
    """
    size = _magnitude(y).reshape(-1, 4)
    first = size.sort(dim=1, descending=True, stable=True).indices[:, :2]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, first, True).view(y.shape)


def _magnitude(y: Tensor) -> Tensor:
    """``|y|`` in C order, without NaN."""
    magnitude = y.detach().abs().contiguous()  # channels_last too: positions count in C order
    if magnitude.sum().isnan():
        raise DivergedError(
            "a mask cannot be ranked: the aggregation tensor holds NaN. Lower the score step size "
            "(score-lr)."
        )
    return magnitude


def _order_statistic(magnitude: Tensor, rank: int) -> Tensor:
    """Value at ``rank`` (from 0) of the magnitudes, sorted upwards."""
    flat = magnitude.flatten()
    if _numpy_has(flat):
        # NumPy's vectorised quickselect took a small fraction of the time of
        # torch.kthvalue on a CPU.
        return torch.tensor(np.partition(flat.numpy(), rank)[rank], dtype=flat.dtype)
    return flat.sort().values[rank]  # on every device; kthvalue is missing on some


def _at_least(magnitude: Tensor, least: Tensor) -> Tensor:
    """``magnitude >= least``; in NumPy in less than half of torch's time on a CPU."""
    if _numpy_has(magnitude):
        flat = torch.from_numpy(magnitude.flatten().numpy() >= least.item())
        return flat.view(magnitude.shape)
    return magnitude >= least


def _numpy_has(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def aggregate_scores(
    z: Float[Tensor, "*layer"], n: Float[Tensor, "*layer"]
) -> Float[Tensor, "*layer"]:
    """Fuse scores with the neighbors' masks: ``y = z + mean(|z|) * sign(z) * n``.

    ``mean`` and ``sign`` carry no gradient, so ``dy/dz = 1``; and ``|y| = |z| +
    mean(|z|) * n``: a weight that the neighbors keep is lifted in the ranking, whatever
    the sign of its score.

    Source: DESIGN.md section 1; arXiv:2504.17520.
    """
    pull = z.detach().abs().mean() * z.detach().sign()
    return z + pull * n


def neighbor_mean(count: Real[Tensor, "*layer"], *, num_neighbors: int) -> Float[Tensor, "*layer"]:
    """Average the neighbors' masks, ``n = 1/|N| Σ m_j``, from their sum ``Σ m_j``.

    The agent itself is not among its neighbors. One without neighbors has ``n = 0``.
    """
    if num_neighbors == 0:
        return torch.zeros_like(count, dtype=torch.float32)
    return count.to(torch.float32) / num_neighbors


def mask_counts(
    times: Float[Tensor, "agents senders"], masks: Bool[Tensor, " senders *layer"]
) -> Float[Tensor, " agents *layer"]:
    """Sum what each agent of a stack hears, ``Σ m_j``, as one matrix product.

    ``times`` is how often a mask counts. Whole numbers below 2**24: exact in any order.
    """
    flat = masks.reshape(len(masks), -1)
    blocks = torch.split(flat, 1 << 20, dim=1)  # as floats they take four times as much
    counts = torch.cat([times @ block.to(times.dtype) for block in blocks], dim=1)
    return counts.view(len(times), *masks.shape[1:])


def faded_mean(
    votes: Iterable[Float[Tensor, "*layer"]], *, num_neighbors: int
) -> Float[Tensor, "*layer"]:
    """Average masks that count by votes, ``n = 1/|N| Σ v_j m_j``, from the ``v_j m_j``.

    What a vote lacks falls to the agent itself: ``n`` pulls less.
    """
    total = functools.reduce(torch.add, votes)  # in order, which float sums depend on
    return total / num_neighbors


def count_of_mean(
    n: Float[Tensor, "*layer"], *, num_neighbors: int
) -> Integer[Tensor, "*layer"] | None:
    """Undo `neighbor_mean`: ``Σ m_j``, or None where ``n`` is no mean of so many masks.

    What comes back gives ``n`` again, bit for bit.
    """
    count = (n * num_neighbors).round().to(count_dtype(num_neighbors))
    return count if torch.equal(neighbor_mean(count, num_neighbors=num_neighbors), n) else None


def count_dtype(most: int) -> torch.dtype:
    """Smallest type that holds a count up to ``most``."""
    return torch.uint8 if most < 256 else torch.int16


def mean_with_own(
    m: Float[Tensor, "*layer"], n: Float[Tensor, "*layer"], *, num_neighbors: int
) -> Float[Tensor, "*layer"]:
    """Average an agent's own mask with its neighbors': ``(m + Σ m_j) / (1 + |N|)``."""
    own_share = 1 / (1 + num_neighbors)
    return own_share * m + (1 - own_share) * n


def neighbor_step(
    z: Float[Tensor, "*layer"],
    g: Float[Tensor, "*layer"],
    n: Float[Tensor, "*layer"],
    *,
    finetune_lr: float,
) -> Float[Tensor, "*layer"]:
    """Fine-tune to the own data where neighbors keep weights: ``z - η_f * g * n``.

    ``g`` is the gradient of the last local step, ``n`` the mean of the masks that have
    just arrived.
    """
    return z - finetune_lr * g * n


def normalized_gradient(g: Float[Tensor, "*layer"]) -> Float[Tensor, "*layer"]:
    """Divide a gradient by its root mean square, ``g / sqrt(mean(g²))``.

    A gradient that is zero everywhere stays zero. The squares are taken of ``g /
    max(|g|)``, so that none of them under- or overflows, however small or large the
    loss.

    Source: no paper of masks; a scale of its own for each layer as in LARS (You et al.
    2017, arXiv:1708.03888), without its factor ``‖w‖``.
    """
    largest = g.abs().max() if g.numel() else torch.ones((), device=g.device)
    unit = g / torch.where(largest == 0, torch.ones_like(largest), largest)
    rms = unit.square().mean().sqrt()  # at least 1 / sqrt(numel) where any is not zero
    return unit / torch.where(rms == 0, torch.ones_like(rms), rms)


def evening_factors(
    unit_rows: Float[Tensor, "filters weights"],
) -> Float[Tensor, " filters"]:
    """Factors ``2 / (1 + rms_f)`` on the filters of a normalized gradient.

    ``rms_f`` is the root mean square of a filter's own gradient, where that of the
    layer is 1. A filter that learns much then takes at most twice the layer's step, and
    one that learns little comes nearer to it. A gradient ``g`` becomes ``2 g / (rms +
    rms_f)``.
    """
    rms: Tensor = unit_rows.square().mean(dim=1).sqrt()
    return 2 / (1 + rms)


def reflected(z: Float[Tensor, "*layer"]) -> Float[Tensor, "*layer"]:
    """Magnitude of scores: those below zero bounce off it, ``|z|``.

    Zero itself, which has no sign and so neither gradient nor lift from neighbors,
    becomes the smallest normal number.
    """
    return z.abs().clamp_min(torch.finfo(z.dtype).tiny)


def group_lasso(rows: Float[Tensor, "filters weights"]) -> Float[Tensor, ""]:
    """Sum of norms ``Σ ‖z_filter‖₂``; one row per neuron or output filter.

    The gradient of an all-zero filter is zero (a subgradient).
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.sum()


def masked_weight(
    w: Float[Tensor, "*layer"],
    y: Float[Tensor, "*layer"],
    *,
    retention: float,
    blend: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*layer"]:
    """Multiply weights by their mask, ``w * m``, or by ``blend(m)`` in its place.

    The gradient goes straight through, ``dL/dy = dL/d(w * m) * w * sign(y)``, and
    through a blend as if it were the mask.
    """
    m = straight_through(y, topk_mask(y, retention=retention))
    if blend is not None:
        m = m + (blend(m.detach()) - m).detach()  # the bracket carries no gradient
    return w * m


def straight_through(y: Float[Tensor, "*layer"], m: Bool[Tensor, "*layer"]) -> Tensor:
    """``m`` as floats, whose gradient goes to ``|y|`` as if they were equal."""
    floats: Tensor = StraightThrough.apply(y, m)
    return floats


class StraightThrough(torch.autograd.Function):
    """A mask as floats: forward ``m``, backward ``dm/d|y| := 1``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, m: Tensor) -> Tensor:
        """Return the mask in the type of ``y``."""
        return m.view(torch.uint8).to(y.dtype)  # a third of the time that a bool takes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep ``y`` for its sign."""
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        """Hand the gradient on to ``|y|``."""
        (y,) = ctx.saved_tensors
        return grads[0] * y.sgn(), None


def kept_filters(filters: int, *, share: float) -> int:
    """Number of filters that stay on, ``ceil(ρ F)``, at least one."""
    return max(1, math.ceil(share * filters - 1e-9))  # 0.7 * 10 is 7.000000000000001


def live_mask(
    y: Float[Tensor, "*layer"], live: Bool[Tensor, "*layer"], *, keep: int
) -> Bool[Tensor, "*layer"]:
    """Keep the ``keep`` largest ``|y|`` among the weights of filters that are on."""
    mask = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
    mask[live] = largest_mask(y[live], keep=keep)
    return mask


def as_if_open(
    y: Float[Tensor, "*layer"], mask: Bool[Tensor, "*layer"], live: Bool[Tensor, "*layer"]
) -> Bool[Tensor, "*layer"]:
    """``u``: the mask, and in filters that are off what reaches its least ``|y|``."""
    magnitude = y.detach().abs()
    least = magnitude[mask].min() if bool(mask.any()) else magnitude.new_tensor(math.inf)
    return mask | (~live & (magnitude >= least))


def gated_weight(
    w: Float[Tensor, "*layer"],
    y: Float[Tensor, "*layer"],
    u: Bool[Tensor, "*layer"],
    *,
    a: Float[Tensor, "*layer"],
    q: Bool[Tensor, "*layer"],
    scale: float,
) -> Float[Tensor, "*layer"]:
    """Multiply weights by mask, gates and scale, ``w * u * q * scale``.

    ``a`` and ``q`` are those of each weight's filter. The gradient goes straight
    through mask and gates, as in this module's docstring.
    """
    return w * straight_through(y, u) * straight_through(a, q) * scale


def keep_variance(share: float) -> float:
    """Factor on the live weights of a layer, ``1 / sqrt(ρ)``.

    A layer whose share ρ of filters is on then sends on as much as the whole one, in
    the mean square.
    """
    return float(share**-0.5)


def proximal_factors(norms: Float[Tensor, " filters"], *, step: float) -> Float[Tensor, " filters"]:
    """Factors of the group lasso's proximal step, ``max(0, 1 - ηλ / ‖z_f‖)``.

    ``step`` is ηλ.
    """
    return (1 - step / norms).clamp_min(0).nan_to_num(0)  # 0 / 0: a filter of zeros stays one


def shrunk(z: Float[Tensor, "*layer"], factors: Float[Tensor, "*layer"]) -> Float[Tensor, "*layer"]:
    """Multiply scores by factors >= 0; what becomes zero keeps its sign.

    It has the smallest normal size, as in `reflected`.
    """
    return torch.copysign(reflected(z * factors), z)


def relative_sizes(y: Float[Tensor, "*layer"]) -> Float[Tensor, "*layer"]:
    """``|y|`` over its mean in the layer, without those that are zero.

    So layers compare whatever their fan-in and fusion, and what a lasso has set to zero
    (to the smallest normal number, see `shrunk`) does not make the others larger.
    """
    size = y.detach().abs()
    counted = size > torch.finfo(size.dtype).tiny
    mean = size.sum() / counted.sum().clamp_min(1)
    return size / torch.where(mean == 0, torch.ones_like(mean), mean)


def budget_masks(
    y: Mapping[str, Float[Tensor, "..."]], *, keep: int
) -> dict[str, Bool[Tensor, "..."]]:
    """Keep the ``keep`` largest ``|y|`` of a whole network, wherever they lie."""
    mask = largest_mask(torch.cat([values.flatten() for values in y.values()]), keep=keep)
    parts = torch.split(mask, [values.numel() for values in y.values()])
    return {name: m.view(y[name].shape) for name, m in zip(y, parts, strict=True)}


def init_scores(shape: torch.Size, *, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Draw scores as PyTorch draws weights: uniform in ``±1/sqrt(fan_in)``.

    That is kaiming_uniform with a = √5. Uniform [-1, 1] and signed-constant scores did
    not train at the reference step sizes (DESIGN.md section 1).
    """
    fan_in = max(1, math.prod(shape[1:]))
    bound = fan_in**-0.5
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def bernoulli_mask(shape: torch.Size, *, retention: float, generator: torch.Generator) -> Tensor:
    """Draw a bool mask, each entry 1 with probability ``retention``."""
    check_retention(retention)
    return torch.rand(shape, generator=generator) < retention
