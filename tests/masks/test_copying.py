"""Copies of networks: what they keep of a forward pass does not matter."""

import threading

import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import AgentData, UnsupportedLayerError, shared_module
from flower_mcepl.agents import ALGORITHMS, make_agent
from flower_mcepl.masks.copying import own_copy

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


class Keeping(nn.Module):
    """It keeps maps to be drawn: one, all in a list, and those of a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.all: list[Tensor] = []
        self.by_layer: dict[str, Tensor] = {}
        self.body.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: object, outputs: Tensor) -> None:
        self.by_layer["body"] = outputs

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x).relu()
        self.all.append(self.features)
        outputs: Tensor = self.head(self.features)
        return outputs


class Forgetting(Keeping):
    def _keep(self, layer: nn.Module, inputs: object, outputs: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x).relu())
        return outputs


def test_what_is_kept_is_copied_without_its_history() -> None:
    network = Keeping()
    network(X)
    twin = own_copy(network)
    assert twin.features is not network.features
    assert torch.equal(twin.features, network.features)
    assert twin.all[0] is twin.features  # one object under two names stays one
    assert twin.by_layer["body"].grad_fn is None
    assert network.features.grad_fn is not None
    for parameter, copy in zip(network.parameters(), twin.parameters(), strict=True):
        assert type(copy) is nn.Parameter
        assert copy is not parameter
        assert torch.equal(copy, parameter)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_agents_of_a_network_that_keeps_its_features_learn_and_are_evaluated(
    algorithm: str,
) -> None:
    data = AgentData.of((X, Y), (X, Y), agent=0)
    keys = {"num-rounds": 9}
    plain, keeping = (
        make_agent(algorithm, 0, shared_module(net, seed=1), data, keys, seed=1)
        for net in (Forgetting, Keeping)
    )
    keeping.check()
    for agent in (plain, keeping):
        agent.train(round=1)
    assert keeping.evaluate() == plain.evaluate()
    model = keeping.personal_model()
    with torch.no_grad():
        assert torch.equal(model(X), plain.personal_model()(X))


def test_a_network_that_was_called_in_the_model_function_is_taken() -> None:
    def called() -> nn.Module:
        network = Keeping()
        network(X)
        return network

    data = AgentData.of((X, Y), (X, Y), agent=0)
    for algorithm in ("mcepl", "dsgd", "fedpm"):
        make_agent(algorithm, 0, shared_module(called, seed=1), data, {}, seed=1).check()


def test_what_python_cannot_copy_is_refused() -> None:
    network = nn.Linear(4, 3)
    network.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        UnsupportedLayerError, match=r"copying Linear raised TypeError: cannot pickle.*Keep files"
    ):
        own_copy(network)
