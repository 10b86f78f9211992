import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl.errors import ConfigError, DivergedError
from flower_mcepl.masks import formulas as masks
from flower_mcepl.masks.formulas import (
    aggregate_scores,
    group_lasso,
    kept_weights,
    neighbor_mean,
    neighbor_step,
    topk_mask,
)
from tests.oracles import masks as oracles

ratios = st.floats(0, 1, exclude_min=True)
shapes = hnp.array_shapes(max_dims=4, max_side=6)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(shape=shapes, retention=ratios, seed=st.integers(0, 999))
def test_topk_equals_the_full_ranking(shape: tuple[int, ...], retention: float, seed: int) -> None:
    y = normal(shape, seed)
    mask = topk_mask(y, retention=retention)
    assert mask.shape == y.shape
    assert mask.dtype == torch.bool
    assert (
        mask.sum()
        == y.numel() - int((1 - retention) * y.numel())
        == kept_weights(y.numel(), retention=retention)
    )
    assert torch.equal(mask, torch.from_numpy(oracles.topk_mask(y.numpy(), retention)))


@given(
    y=hnp.arrays(
        np.float32, shapes, elements=st.sampled_from([-2.0, -1.0, 0.0, -0.0, 1.0, 2.0, math.inf])
    ),
    retention=ratios,
)
def test_among_equal_magnitudes_the_lower_index_stays(y: np.ndarray, retention: float) -> None:
    assert torch.equal(
        topk_mask(torch.from_numpy(y), retention=retention),
        torch.from_numpy(oracles.topk_mask(y, retention)),
    )


def test_ties_count_in_c_order_whatever_the_memory_format() -> None:
    y = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    mask = topk_mask(y, retention=0.5)
    assert mask.flatten().tolist() == [True] * 48 + [False] * 48
    assert topk_mask(torch.ones(3, 2).T, retention=0.5).tolist() == [[True] * 3, [False] * 3]


@given(y=hnp.arrays(np.float32, shapes, elements=st.integers(-3, 3).map(float)), data=st.data())
def test_both_ways_to_find_the_threshold_agree(y: np.ndarray, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, y.size - 1))
    magnitude = torch.from_numpy(np.abs(y))
    with_numpy = masks._order_statistic(magnitude, rank)
    with_torch = magnitude.flatten().kthvalue(rank + 1).values
    assert with_numpy == with_torch == sorted(np.abs(y).ravel())[rank]


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]),
    y=hnp.arrays(np.float64, shapes, elements=st.integers(-100, 100).map(float)),
    retention=ratios,
)
def test_other_dtypes_give_the_same_mask(
    dtype: torch.dtype, y: np.ndarray, retention: float
) -> None:
    # small integers are exact in all of them
    mask = topk_mask(torch.from_numpy(y).to(dtype), retention=retention)
    assert torch.equal(mask, torch.from_numpy(oracles.topk_mask(y, retention)))


@pytest.mark.parametrize("retention", [0.0, 1.5, math.nan, -0.1, math.inf])
def test_retention_out_of_range_says_what_came(retention: float) -> None:
    with pytest.raises(ConfigError, match=rf"must be in \(0, 1\]; got {retention!r}"):
        topk_mask(torch.ones(4), retention=retention)
    with pytest.raises(ConfigError, match="retention ratio"):
        masks.bernoulli_mask(torch.Size((4,)), retention=retention, generator=torch.Generator())


@given(
    y=hnp.arrays(
        np.float32, st.integers(1, 12), elements=st.sampled_from([0.0, 1.0, 2.0, math.inf])
    ),
    place=st.integers(0, 11),
    retention=ratios,
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_nan_is_never_ranked(
    y: np.ndarray, place: int, retention: float, dtype: torch.dtype
) -> None:
    y[place % len(y)] = math.nan
    with pytest.raises(DivergedError, match="holds NaN"):
        topk_mask(torch.from_numpy(y).to(dtype), retention=retention)


def test_smallest_and_largest_cases() -> None:
    assert topk_mask(torch.zeros(0, 3), retention=0.5).shape == (0, 3)
    # numel - int((1 - r) * numel) is 1
    assert topk_mask(torch.tensor(0.5), retention=1e-9).item() is True
    assert topk_mask(torch.zeros(7), retention=1.0).all()


@given(shape=shapes, seed=st.integers(0, 999))
def test_aggregation_tensor(shape: tuple[int, ...], seed: int) -> None:
    z, n = normal(shape, seed), torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    z.view(-1)[0] = 0.0  # the sign of zero is zero
    y = aggregate_scores(z, n)
    assert_close(
        y.double(),
        torch.from_numpy(oracles.aggregation(z.numpy(), n.numpy())),
        rtol=1e-5,
        atol=1e-6,
    )
    lifted = z.abs() + z.abs().mean() * n * (z != 0)
    assert_close(y.abs(), lifted)


def test_neither_mean_nor_sign_carries_a_gradient() -> None:
    z = normal((4, 5), 0).requires_grad_()
    (gradient,) = torch.autograd.grad(aggregate_scores(z, torch.rand(4, 5)).sum(), z)
    assert torch.equal(gradient, torch.ones(4, 5))


@given(count=st.integers(1, 6), seed=st.integers(0, 99))
def test_neighbor_mean(count: int, seed: int) -> None:
    neighbors = [normal((3, 4), seed + j) > 0 for j in range(count)]
    expected = oracles.neighbor_mean([mask.numpy() for mask in neighbors])
    count = torch.stack(neighbors).sum(dim=0)
    assert_close(
        neighbor_mean(count, num_neighbors=len(neighbors)),
        torch.from_numpy(expected).float(),
        rtol=0,
        atol=0,
    )


def test_without_neighbors_the_mean_is_zero() -> None:
    assert not neighbor_mean(torch.zeros(2, 3, dtype=torch.uint8), num_neighbors=0).any()


@given(shape=shapes, seed=st.integers(0, 99), finetune_lr=st.floats(0, 20))
def test_neighbor_step(shape: tuple[int, ...], seed: int, finetune_lr: float) -> None:
    z, g, n = normal(shape, seed), normal(shape, seed + 1), normal(shape, seed + 2).abs()
    expected = oracles.neighbor_step(z.numpy(), g.numpy(), n.numpy(), finetune_lr)
    stepped = neighbor_step(z, g, n, finetune_lr=finetune_lr)
    assert_close(stepped.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@given(rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_group_lasso_and_its_gradient(rows: int, columns: int, seed: int) -> None:
    z = normal((rows, columns), seed)
    z[0] = 0.0  # a filter of zeros has no gradient
    z.requires_grad_()
    value = group_lasso(z)
    (gradient,) = torch.autograd.grad(value, z)
    array = z.detach().numpy()
    assert value.item() == pytest.approx(oracles.group_lasso(array), rel=1e-5)
    assert_close(
        gradient.double(),
        torch.from_numpy(oracles.group_lasso_gradient(array)),
        rtol=1e-5,
        atol=1e-6,
    )


@given(shape=shapes, retention=ratios, seed=st.integers(0, 99))
def test_straight_through_gradient(shape: tuple[int, ...], retention: float, seed: int) -> None:
    w, y, upstream = (
        normal(shape, seed),
        normal(shape, seed + 1).requires_grad_(),
        normal(shape, seed + 2),
    )
    masked = masks.masked_weight(w, y, retention=retention)
    assert torch.equal(masked, w * topk_mask(y, retention=retention))
    (gradient,) = torch.autograd.grad(masked, y, upstream)
    expected = oracles.score_gradient(upstream.numpy(), w.numpy(), y.detach().numpy())
    assert_close(gradient, torch.from_numpy(expected))


def test_scores_start_as_pytorch_starts_weights() -> None:
    for shape in ((4, 3, 3, 3), (5, 24), (2, 1, 7), (3,)):
        z = masks.init_scores(torch.Size(shape), generator=torch.Generator().manual_seed(3))
        if len(shape) > 1:
            expected = nn.init.kaiming_uniform_(
                torch.empty(shape), a=math.sqrt(5), generator=torch.Generator().manual_seed(3)
            )
            assert_close(z, expected, rtol=1e-6, atol=1e-7)
        assert z.abs().max() <= max(1, math.prod(shape[1:])) ** -0.5


def test_first_mask_keeps_the_ratio_on_average() -> None:
    mask = masks.bernoulli_mask(
        torch.Size((100, 1000)), retention=0.3, generator=torch.Generator().manual_seed(0)
    )
    assert mask.dtype == torch.bool
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert masks.bernoulli_mask(torch.Size((50,)), retention=1.0, generator=torch.Generator()).all()


@given(
    shape=shapes,
    seed=st.integers(0, 999),
    scale=st.sampled_from([2.0**-140, 1e-30, 0.3, 7.0, 1e30, 2.0**100]),
)
def test_a_normalized_gradient_has_one_size_whatever_the_losss(
    shape: tuple[int, ...], seed: int, scale: float
) -> None:
    g = normal(shape, seed)
    unit = masks.normalized_gradient(g)
    assert_close(unit, g / g.square().mean().sqrt(), rtol=1e-5, atol=1e-6)
    scaled = masks.normalized_gradient(g.double() * scale)
    assert_close(scaled, masks.normalized_gradient(g.double()), rtol=1e-12, atol=0.0)
    if 1e-36 < scale < 1e36:
        in_float32 = masks.normalized_gradient(g * scale)
        assert_close(in_float32, unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 2)])
def test_a_gradient_of_zero_stays_zero(shape: tuple[int, ...]) -> None:
    assert torch.equal(masks.normalized_gradient(torch.zeros(shape)), torch.zeros(shape))


@given(shape=shapes, seed=st.integers(0, 999))
def test_scores_bounce_off_zero(shape: tuple[int, ...], seed: int) -> None:
    z = normal(shape, seed).round(decimals=1)  # zeros among them
    s = masks.reflected(z)
    assert bool((s > 0).all())
    assert torch.equal(s, torch.where(z == 0, torch.finfo(z.dtype).tiny, z.abs()))
    assert torch.equal(masks.reflected(-z), s)
    assert bool(masks.reflected(torch.tensor(math.nan)).isnan())
