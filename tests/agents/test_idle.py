"""Layers that no gradient reaches: a network of which nothing learns is refused."""

import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import AgentData, UnsupportedLayerError, shared_module
from flower_mcepl.agents import ALGORITHMS, Agent, make_agent

KEYS = {"num-rounds": 9}  # for which masks that move do so
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x).relu())
        return outputs


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class WithoutGrad(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FrozenBody(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x).relu()
        outputs: Tensor = self.head(features)
        return outputs


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


def by_a_closure() -> nn.Module:
    """Its copies go on calling the layers of the first one."""
    network = Net()
    network.forward = lambda x: network.head(network.body(x).relu())  # type: ignore[method-assign]
    return network


def by_a_method() -> nn.Module:
    network = Net()
    network.forward = types.MethodType(Net.forward, network)  # type: ignore[method-assign]
    return network


def an_agent(model_fn: Callable[[], nn.Module], algorithm: str = "mcepl") -> Agent:
    data = AgentData.of((X, Y), (X, Y), agent=0)
    return make_agent(algorithm, 0, shared_module(model_fn, seed=1), data, KEYS, seed=1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("model_fn", [by_a_closure, Detached, WithoutGrad])
def test_a_network_of_which_nothing_learns_is_refused_before_round_1(
    model_fn: Callable[[], nn.Module], algorithm: str
) -> None:
    agent = an_agent(model_fn, algorithm)
    with pytest.raises(
        UnsupportedLayerError,
        match=r"^agent 0's network .* any of its weights: body\.weight, .*self",
    ):
        agent.check()


@pytest.mark.parametrize("algorithm", ["mcepl", "fedpm", "dsgd"])
@pytest.mark.parametrize(("model_fn", "named"), [(FrozenBody, "body"), (Unused, "spare")])
def test_weights_that_never_learn_are_warned_of(
    model_fn: Callable[[], nn.Module], named: str, algorithm: str
) -> None:
    agent = an_agent(model_fn, algorithm)
    with pytest.warns(UserWarning, match=rf"reaches \d\d% of the weights.*: {named}\.weight"):
        agent.check()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_network_that_learns_is_neither(algorithm: str) -> None:
    for model_fn in (Net, by_a_method):
        agent = an_agent(model_fn, algorithm)
        before = agent.state().arrays
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            agent.check()
        after = agent.state().arrays
        assert all((after[name] == value).all() for name, value in before.items())
