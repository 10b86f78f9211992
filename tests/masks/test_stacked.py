"""Masks and steps of a stack of agents against those of each agent alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl import DivergedError, MaskedModel, MceplConfig
from flower_mcepl.agents.parts.score_step import ScoreStep
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import CONV, LayerSpec
from flower_mcepl.masks.stacked import StackedModel
from flower_mcepl.models import local_response_norm

RANKINGS = (maths.largest_masks, maths.masks_by_sorting)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Tensors with many ties, and numbers to keep, none and all among them."""
    agents = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    numel = int(torch.Size(shape).numel())
    size = agents * numel
    values = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
    keep = draw(st.lists(st.integers(0, numel), min_size=agents, max_size=agents))
    return torch.tensor(values, dtype=torch.float32).view(agents, *shape), keep


@given(stack=stacks(), ranking=st.sampled_from(RANKINGS))
def test_masks_of_a_stack_are_those_of_each(stack: tuple[Tensor, list[int]], ranking) -> None:
    y, keep = stack
    masks = ranking(y, keep=keep)
    for mask, part, number in zip(masks, y, keep, strict=True):
        assert torch.equal(mask, maths.largest_mask(part, keep=number))


@pytest.mark.parametrize("ranking", RANKINGS)
def test_nan_is_never_ranked_in_a_stack(ranking) -> None:
    with pytest.raises(DivergedError, match="holds NaN"):
        ranking(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), keep=[1, 1])


@given(
    seed=st.integers(0, 999),
    agents=st.integers(1, 4),
    settings=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "score_gradient": st.sampled_from(["raw", "normalized", "filter-normalized"]),
            "score_form": st.sampled_from(["signed", "magnitude"]),
            "group_lasso": st.sampled_from([0.0, 0.3]),
            "lasso_step": st.sampled_from(["gradient", "proximal"]),
        }
    ),
    moving=st.booleans(),
)
def test_steps_of_a_stack_are_those_of_each(
    seed: int, agents: int, settings: dict[str, object], moving: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, g, v = torch.randn(3, agents, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    g[0] = 0  # an agent without a gradient
    step = ScoreStep(MceplConfig(**settings))
    layer = LayerSpec("conv", CONV, z[0].shape)

    def stepped(z: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return step(z, g, v if moving else None, layer=layer, lr=0.2)

    together = torch.vmap(stepped)(z, g, v)
    for i in range(agents):
        alone = stepped(z[i], g[i], v[i])
        for one, stack in zip(alone, together, strict=True):
            assert_close(stack[i], one, rtol=0, atol=1e-12)


def test_local_response_norm_of_a_stack_is_that_of_each() -> None:
    x = torch.randn(3, 2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    for axis in (0, 1):

        def normed(part: Tensor) -> Tensor:
            return local_response_norm(part, size=4, alpha=0.5)

        together = torch.vmap(normed, in_dims=axis)(x)
        alone = torch.stack([normed(part) for part in x.unbind(axis)])
        assert_close(together, alone)
        weights = torch.randn(alone.shape, dtype=torch.float64)
        gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (together, alone)]
        assert_close(*gradients)


def test_buffers_come_back_and_the_network_stays_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    models = [MaskedModel(net, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before = [{n: t.clone() for n, t in m.module.state_dict().items()} for m in models]
    stack = StackedModel(models)
    x = torch.randn(2, 5, 4)
    outputs, buffers = stack.run(stack.masked_weights(), x, lambda network, batch: network(batch))
    for i, model in enumerate(models):
        after = model.module.state_dict()
        assert all(torch.equal(before[i][name], tensor) for name, tensor in after.items())
        assert isinstance(model.module[0].weight, nn.Parameter)
        assert_close(outputs[i], model(x[i]))
        own = dict(model.module.named_buffers())
        assert own.keys() == buffers.keys()
        for name, tensor in own.items():
            assert_close(buffers[name][i], tensor)
