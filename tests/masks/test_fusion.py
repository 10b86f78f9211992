"""Rules of fusion: those that are built in against slow ones, and one of somebody's own
in an agent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from flower_mcepl import (
    ConfigError,
    MaskedModel,
    MceplAgent,
    MceplConfig,
    StateError,
    shared_module,
)
from flower_mcepl.agents import AgentState
from flower_mcepl.masks import FUSIONS, Fusion
from flower_mcepl.masks.formulas import count_of_mean, mean_with_own, neighbor_mean
from flower_mcepl.masks.fusion import MASK_AVERAGING, MCEPL, NONE
from tests.fleet.agents import make_agent, same_tensors, small_net
from tests.oracles import masks as oracles


def draw(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) < 0.5 for _ in range(count)]


def inbox_of(agent: MceplAgent, count: int, seed: int = 0) -> dict[int, dict[str, Tensor]]:
    """Masks of ``count`` neighbors."""
    drawn = {name: draw(shape, count, seed) for name, shape in agent.layers.items()}
    return {1 + j: {name: masks[j] for name, masks in drawn.items()} for j in range(count)}


# --- formulas ---


@given(count=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_rule_of_the_paper_hears_the_mean(count: int, seed: int) -> None:
    masks = draw((3, 5), count, seed)
    n = MCEPL.hear(masks, torch.ones(3, 5, dtype=torch.bool))
    slow = oracles.neighbor_mean([mask.numpy() for mask in masks])
    assert_close(n.double(), torch.from_numpy(slow), rtol=1e-6, atol=0)
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    assert_close(
        MCEPL.rank(z, n).double(),
        torch.from_numpy(oracles.aggregation(z.numpy(), n.numpy())).double(),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("count", [1, 3, 7, 255, 256, 1000])
def test_a_mean_tells_the_count_that_it_is_of(count: int) -> None:
    masks = draw((40, 25), count)
    n = MCEPL.hear(masks, masks[0])
    total = count_of_mean(n, num_neighbors=count)
    assert total is not None
    assert torch.equal(total.long(), torch.stack(masks).sum(dim=0))
    assert total.dtype == (torch.uint8 if count < 256 else torch.int16)
    assert torch.equal(neighbor_mean(total, num_neighbors=count), n)


@pytest.mark.parametrize("value", [0.3, -0.5, 1e9, float("nan"), float("inf")])
def test_what_is_no_mean_of_so_many_masks_has_no_count(value: float) -> None:
    assert count_of_mean(torch.tensor([1.0, value]), num_neighbors=2) is None


def test_the_mean_with_the_own_mask_is_that_of_all() -> None:
    own, *others = draw((6, 4), 4)
    n = MCEPL.hear(others, own)
    slow = oracles.neighbor_mean([mask.numpy() for mask in (own, *others)])
    blended = mean_with_own(own.float(), n, num_neighbors=3)
    assert_close(blended.double(), torch.from_numpy(slow), rtol=1e-6, atol=0)


def test_the_built_in_rules_are_these() -> None:
    assert dict(FUSIONS) == {"mcepl": MCEPL, "mask-averaging": MASK_AVERAGING, "none": NONE}
    with pytest.raises(ConfigError, match=r"unknown fusion rule 'mcpl'; .*Did you mean 'mcepl'\?"):
        MceplConfig(fusion="mcpl")


# --- a rule of one's own ---


def overlap_mean(masks: Sequence[Tensor], own: Tensor) -> Tensor:
    """Weigh each neighbor's mask by its overlap with the own one."""
    weights = [float((mask & own).sum() / (mask | own).sum()) for mask in masks]
    return sum(w * mask.float() for w, mask in zip(weights, masks, strict=True)) / sum(weights)


OVERLAP = Fusion(hear=overlap_mean)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Fusion], None]:
    """Adds a rule by name, as an installed package does."""
    return lambda name, rule: monkeypatch.setitem(FUSIONS._loaded, name, rule)


def test_an_agent_hears_and_ranks_by_the_rule(rules: Any) -> None:
    rules("overlap", OVERLAP)
    agent, plain = make_agent(0, fusion="overlap"), make_agent(0)
    for each in (agent, plain):
        each.train(round=1)
    sent, g = agent.outgoing(), {name: g.clone() for name, g in agent.gradient.items()}
    z = {name: scores.detach().clone() for name, scores in agent.model.scores.items()}
    inbox = inbox_of(agent, 3)
    for each in (agent, plain):
        each.fuse(inbox, round=1)
    for name, scores in agent.model.scores.items():
        # the own mask is the one that was sent, at the old n
        n = overlap_mean([payload[name] for payload in inbox.values()], sent[name])
        assert torch.equal(agent.model.neighbor_means[name], n)
        assert_close(scores.detach(), z[name] - g[name] * n, rtol=1e-5, atol=1e-6)
    assert not same_tensors(agent.state().tensors, plain.state().tensors)


def test_what_a_rule_makes_survives_in_the_state(rules: Any) -> None:
    rules("overlap", OVERLAP)
    agent, later = (make_agent(0, fusion="overlap") for _ in range(2))
    agent.train(round=1)
    agent.fuse(inbox_of(agent, 3), round=1)
    state = agent.state()
    assert {name.partition("/")[0] for name in state.tensors} == {"scores", "neighbor-mean"}
    later.restore(state)
    assert same_tensors(agent.outgoing(), later.outgoing())
    assert same_tensors(state.tensors, later.state().tensors)
    for each in (agent, later):
        each.train(round=2)
        each.fuse(inbox_of(each, 2, seed=1), round=2)
    assert same_tensors(agent.state().tensors, later.state().tensors)
    del state.arrays["neighbor-mean/0.weight"]
    with pytest.raises(StateError, match="agent 0 is incomplete: its neighbor-mean must hold"):
        later.restore(state)


def test_a_state_that_lost_what_was_heard_is_refused() -> None:
    agent = make_agent(0)
    state = agent.state()
    kept = {name: t for name, t in state.arrays.items() if not name.startswith("neighbor-")}
    with pytest.raises(StateError, match="agent 0 is incomplete: its neighbor-count must hold"):
        agent.restore(AgentState(state.facts, kept))


def test_a_rule_without_exchange_sends_and_hears_nothing() -> None:
    agent = make_agent(0, fusion="none")
    assert (agent.layers, agent.first_payload(), agent.outgoing()) == ({}, None, {})
    agent.train(round=1)
    before = agent.state().tensors
    agent.fuse(inbox_of(make_agent(1), 2), round=1)
    assert agent.model.num_neighbors == 0
    assert same_tensors(
        agent.state().tensors,
        {name: tensor for name, tensor in before.items() if not name.startswith("gradient/")},
    )


def model_of(rule: Fusion) -> MaskedModel:
    module = shared_module(small_net, seed=1)
    return MaskedModel(module, fusion=rule, generator=torch.Generator().manual_seed(0))


def masks_for(model: MaskedModel, count: int) -> list[dict[str, Tensor]]:
    drawn = {name: draw(tuple(spec.shape), count) for name, spec in model.layers.items()}
    return [{name: masks[j] for name, masks in drawn.items()} for j in range(count)]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Fusion(hear=lambda masks, own: masks[0]), r"hear must return .* got torch\.bool \(4, 1"),
        (
            Fusion(hear=lambda masks, own: own.float().mean()),
            r"hear must .* got torch.float32 \(\)",
        ),
        (Fusion(hear=lambda masks, own: 0.5), r"hear must return a tensor of floats .* got float"),  # type: ignore[arg-type,return-value]
        (Fusion(hear=lambda masks, own: own / 0), r"hear must return finite numbers; .* 2 masks"),
        (Fusion(rank=lambda z, n: z.flatten()), r"rank must .* \(4, 1, 3, 3\); got .* \(36,\)"),
        (Fusion(blend=lambda m, n, *, num_neighbors: m.mean()), r"blend must .* got .* \(\)"),
    ],
)
def test_a_rule_that_gives_something_else_is_refused(rule: Fusion, message: str) -> None:
    model = model_of(rule)

    def use() -> None:
        model.hear(masks_for(model, 2))
        model.masked_weights()

    with pytest.raises(ConfigError, match=message):
        use()


def test_a_blend_takes_the_place_of_the_mask_and_lets_the_gradient_through() -> None:
    def half(m: Tensor, n: Tensor, *, num_neighbors: int) -> Tensor:
        assert num_neighbors == 2
        return 0.5 * m + 0.25

    model, plain = model_of(Fusion(blend=half)), model_of(MCEPL)
    for each in (model, plain):
        each.hear(masks_for(each, 2))
    for name, weight in model.masked_weights().items():
        w, mask = model.module.get_parameter(name), model.masks()[name]
        assert torch.equal(mask, plain.masks()[name])
        assert_close(weight.detach(), w * (0.5 * mask + 0.25))
        assert_close(model.live_masks()[name], 0.5 * mask + 0.25)
        assert_close(model.bake().get_parameter(name), w * (0.5 * mask + 0.25))
        (g,) = torch.autograd.grad(weight.sum(), model.scores[name])
        (straight,) = torch.autograd.grad(plain.masked_weights()[name].sum(), plain.scores[name])
        assert torch.equal(g, straight)


def test_neighbors_that_are_gone_count_no_more() -> None:
    model = model_of(MASK_AVERAGING)
    model.hear(masks_for(model, 3))
    assert model.num_neighbors == 3
    assert not np.isin(model.live_masks()["3.weight"].numpy(), (0, 1)).all()
    model.hear([])
    assert (model.num_neighbors, set(model.neighbor_means.values())) == (0, {None})
    assert np.isin(model.live_masks()["3.weight"].numpy(), (0, 1)).all()


# --- mistakes of a rule of somebody's own ---


def flipping(masks: Sequence[Tensor], own: Tensor) -> Tensor:
    return masks[0].logical_not_().float()


def failing(masks: Sequence[Tensor], own: Tensor) -> Tensor:
    raise KeyError("mask")


def heard(rule: Fusion) -> MaskedModel:
    model = MaskedModel(small_net(), fusion=rule, generator=torch.Generator().manual_seed(0))
    model.hear([{name: mask.clone() for name, mask in model.masks().items()}])
    return model


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Fusion(hear=flipping), "must leave the masks as they are.*flipping"),
        (Fusion(hear=failing), "test_fusion.failing raised KeyError: 'mask'. Mend the rule"),
        (Fusion(rank=lambda z, n: (z + n).detach()), "rank must be differentiable"),
        (Fusion(rank=lambda z: z), "a fusion rule's rank must take every layer.*TypeError"),
        (Fusion(blend=lambda m, n: m), "rule's blend must take every layer.*num_neighbors"),
    ],
)
def test_a_rule_that_fails_is_named(rule: Fusion, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heard(rule)(torch.zeros(2, 1, 6, 6))


def test_a_rule_is_made_of_functions() -> None:
    with pytest.raises(ConfigError, match="a fusion rule's hear must be a function; got 3"):
        Fusion(hear=3)  # type: ignore[arg-type]


def test_a_rule_may_fill_one_tensor_each_time() -> None:
    buffers: dict[torch.Size, Tensor] = {}

    def counting(masks: Sequence[Tensor], own: Tensor) -> Tensor:
        return buffers.setdefault(own.shape, torch.zeros(own.shape)).add_(1)

    one, two = heard(Fusion(hear=counting)), heard(Fusion(hear=counting))
    assert {float(n.unique()) for n in one.neighbor_means.values() if n is not None} == {1.0}
    assert {float(n.unique()) for n in two.neighbor_means.values() if n is not None} == {2.0}
