"""Classes of arithmetic: what stays equal, and how far the others differ."""

import ctypes
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flower_mcepl import AgentData, ConfigError, MceplAgent, MceplConfig, Topology, simulate
from flower_mcepl import shared_module as build
from flower_mcepl.agents import OwnLoopAgent
from flower_mcepl.agents.parts import arithmetic as classes
from flower_mcepl.agents.parts import winograd
from flower_mcepl.agents.parts.arithmetic import arithmetic, keep_freed_memory
from flower_mcepl.agents.parts.masked_config import MaskedConfig
from flower_mcepl.models import AlexNetCifar
from tests.fleet.agents import SEED, make_agent, same_tensors, split

# --- convolutions by Winograd, against torch in float64 ---


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(32, 40), st.integers(32, 40)),
    size=st.tuples(st.integers(5, 15), st.integers(5, 15)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 10**6),
)
def test_winograd_is_the_convolution_and_has_its_gradients(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    padding: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels[0], *size, generator=generator).requires_grad_()
    w = torch.randn(channels[1], channels[0], 5, 5, generator=generator).requires_grad_()
    assert winograd.fits(x, w, stride=1, dilation=(1, 1), groups=1)
    y = winograd.conv5(x, w, padding=padding)
    exact = nn.functional.conv2d(x.double(), w.double(), padding=padding)
    assert y.shape == exact.shape
    close(y, exact)
    pull = torch.randn(exact.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(y, (x, w), pull),
        torch.autograd.grad(exact, (x, w), pull.double()),
        strict=True,
    ):
        close(one, other)


def close(value: Tensor, exact: Tensor) -> None:
    assert (value - exact).abs().max() <= 3e-4 * exact.abs().max()


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 2},
        {"dilation": (2, 1)},
        {"groups": 2},
        {"shape": (64, 64, 3, 3)},
        {"shape": (64, 3, 5, 5)},
        {"dtype": torch.float64},
    ],
)
def test_winograd_leaves_other_convolutions_to_torch(other: dict[str, Any]) -> None:
    shape, dtype = other.pop("shape", (64, 64, 5, 5)), other.pop("dtype", torch.float32)
    options = {"stride": 1, "dilation": 1, "groups": 1, **other}
    w = torch.zeros(shape, dtype=dtype)
    x = torch.zeros(1, shape[1] * options["groups"], 8, 8, dtype=dtype)
    assert not winograd.fits(x, w, **options)


# --- what is replaced, and where ---


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_faster_elu_is_elu(alpha: float) -> None:
    x = torch.linspace(-30, 30, 4001).requires_grad_()
    exact = nn.functional.elu(x, alpha)
    with arithmetic("fast", device="cpu"):
        y = nn.ELU(alpha)(x)
    assert (y - exact).abs().max() <= 1.2e-7
    ones = torch.ones_like(x)
    gradients = (torch.autograd.grad(value, x, ones)[0] for value in (y, exact))
    torch.testing.assert_close(*gradients, rtol=0, atol=1.2e-7)


class Convolutions(nn.Module):
    """Every way in which torch takes a convolution's padding, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding="same"),
            nn.ELU(inplace=True),
            nn.Conv2d(32, 33, 5, padding=(2, 1)),
            nn.Conv2d(33, 32, 3, stride=2, bias=False),
            nn.Conv2d(32, 32, 5, padding="valid"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize(("kind", "tolerance"), [("fast", 1e-4), ("bfloat16", 0.1)])
def test_a_class_computes_the_same_network(kind: str, tolerance: float) -> None:
    torch.manual_seed(0)
    network, x = Convolutions(), torch.randn(2, 3, 16, 16)
    exact = network(x)
    with arithmetic(kind, device="cpu"):
        y = network(x)
    assert not torch.equal(y.float(), exact)
    assert (y - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(network(x), exact), "a class ends with its block"


def test_exact_is_torchs_own() -> None:
    torch.manual_seed(0)
    network, x = Convolutions(), torch.randn(2, 3, 16, 16)
    with arithmetic("exact", device="cpu"):
        assert torch.equal(network(x), network(x))
        inside = network(x)
    assert torch.equal(inside, network(x))


def test_what_is_replaced_is_put_back_after_an_error() -> None:
    before = nn.functional.elu, nn.functional.conv2d
    with pytest.raises(AttributeError), arithmetic("fast", device="cpu"):
        nn.functional.elu(None)
    assert (nn.functional.elu, nn.functional.conv2d) == before


def test_no_other_class() -> None:
    with pytest.raises(ConfigError, match="arithmetic must be one of exact, fast, bfloat16"):
        MceplConfig(arithmetic="float16")


# --- agents ---


class WideNet(nn.Module):
    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 5, padding=1)
        self.head, self.recompute = nn.Linear(32 * 16, 3), recompute

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.elu(self.first(x))
        x = checkpoint(self.second, x, use_reentrant=False) if self.recompute else self.second(x)
        return self.head(nn.functional.elu(x).flatten(1))


def scores_of(agent: MceplAgent) -> dict[str, Tensor]:
    return {name: z.detach().clone() for name, z in agent.model.scores.items()}


def fleet(kind: str, **options: Any) -> list[MceplAgent]:
    return [
        make_agent(index, model_fn=WideNet, arithmetic=kind, local_steps=3, **options)
        for index in range(3)
    ]


@pytest.mark.parametrize("kind", classes.ARITHMETICS)
def test_a_class_gives_the_same_bits_again(kind: str) -> None:
    once, again = fleet(kind), fleet(kind)
    for agents in (once, again):
        simulate(agents, Topology.ring(3), num_rounds=3, log=lambda line: None)
    for one, other in zip(once, again, strict=True):
        assert same_tensors(scores_of(one), scores_of(other))


@pytest.mark.parametrize("kind", ["fast", "bfloat16"])
def test_classes_differ_in_the_last_bits_and_the_record_names_them(kind: str) -> None:
    exact, other = fleet("exact"), fleet(kind)
    for agents in (exact, other):
        simulate(agents, Topology.ring(3), num_rounds=1, log=lambda line: None)
    assert other[0].parameters()["arithmetic"] == kind
    for one, two in zip(exact, other, strict=True):
        assert not same_tensors(scores_of(one), scores_of(two))
        for name, z in scores_of(one).items():
            assert (z - scores_of(two)[name]).abs().max() <= {"fast": 1e-4, "bfloat16": 0.1}[kind]


def test_fast_keeps_nearly_every_bit_of_the_papers_network() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    data, masks = AgentData.of((images, labels), (images, labels), agent=0), {}
    for kind in ("exact", "fast"):
        config = MceplConfig(batch_size=8, local_steps=2, arithmetic=kind)
        agent = MceplAgent(0, build(AlexNetCifar, seed=0), data, config, seed=0)
        agent.train(round=1)
        masks[kind] = agent.outgoing()
    flips = sum(int((masks["exact"][name] != mask).sum()) for name, mask in masks["fast"].items())
    assert flips <= 24  # of 1,227,328


@pytest.mark.parametrize("kind", classes.ARITHMETICS)
def test_recomputed_activations_are_of_the_same_class(kind: str) -> None:
    config = {"arithmetic": kind, "local_steps": 2}
    plain = make_agent(0, model_fn=WideNet, **config)
    recomputing = make_agent(0, model_fn=lambda: WideNet(recompute=True), **config)
    assert plain.train(round=1) == recomputing.train(round=1)
    assert same_tensors(scores_of(plain), scores_of(recomputing))


def test_a_loop_of_ones_own_is_of_the_class() -> None:
    def train(model: nn.Module, round: int) -> float:
        loss = model(DATA_INPUTS).square().mean()
        loss.backward()
        return loss.item()

    def trained(kind: str) -> dict[str, Tensor]:
        agent = OwnLoopAgent(
            0,
            build(lambda: WideNet(recompute=True), seed=SEED),
            DATA,
            MaskedConfig(arithmetic=kind),
            train_fn=train,
            evaluate_fn=lambda model: {"loss": 0.0, "num-examples": 1},
            seed=SEED,
        )
        agent.train(round=1)
        return agent.gradient

    assert same_tensors(trained("fast"), trained("fast"))
    assert not same_tensors(trained("fast"), trained("exact"))


@pytest.mark.parametrize("algorithm", ["local", "fedpm", "dispfl"])
def test_every_algorithm_takes_the_key(algorithm: str) -> None:
    from flower_mcepl.agents import make_agent as registered

    def scores(kind: str) -> dict[str, Tensor]:
        run_config = {"arithmetic": kind, "batch-size": 8, "local-epochs": 0, "num-rounds": 1}
        agent = registered(algorithm, 0, build(WideNet, seed=SEED), DATA, run_config, seed=SEED)
        agent.train(round=1)
        return dict(agent.state().tensors)

    assert same_tensors(scores("fast"), scores("fast"))
    assert not same_tensors(scores("fast"), scores("exact"))


def test_weights_grow_back_by_gradients_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from flower_mcepl.agents import make_agent as registered

    run_config = {"arithmetic": "fast", "batch-size": 8, "local-epochs": 0, "num-rounds": 2}
    agent: Any = registered("dispfl", 0, build(WideNet, seed=SEED), DATA, run_config, seed=SEED)
    inside, torchs = [], nn.functional.elu
    loss = type(agent.learner).loss

    def watched(learner: Any, *args: Any) -> Tensor:
        inside.append(nn.functional.elu is not torchs)
        return loss(learner, *args)

    monkeypatch.setattr(type(agent.learner), "loss", watched)
    agent.train(round=1)
    assert inside == [True, True]  # the step, and the batch by which weights grow


DATA = make_agent(0).data
DATA_INPUTS = split(0)[0][:8]

# --- memory ---


@pytest.mark.skipif(
    getattr(ctypes.CDLL(None), "mallopt", None) is None, reason="a setting of glibc"
)
def test_freed_memory_stays_with_the_process() -> None:
    import resource

    def step() -> None:
        pieces = [torch.zeros(2**20) for _ in range(16)]  # 16,384 pages
        assert len(pieces) == 16

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert keep_freed_memory()
    # the first ones may still find a heap that others have cut up; given back, every
    # step would fault in all of its pages
    assert min(faults() for _ in range(8)) < 1000


def test_where_there_is_no_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert keep_freed_memory() is False
    finally:
        keep_freed_memory.cache_clear()


@pytest.mark.parametrize("kernel", [3, 5])
def test_gradients_of_filters_come_in_the_weights_own_order_of_memory(kernel: int) -> None:
    """Or each operation of a step on them walks through two orders at once."""
    weight = torch.randn(64, 64, kernel, kernel, requires_grad=True) * 1  # as under a mask
    with arithmetic("fast", device="cpu"):
        loss = nn.functional.conv2d(torch.randn(4, 64, 12, 12), weight).square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.is_contiguous()
