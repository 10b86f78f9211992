"""FedAvg: local SGD from one global model, which the server averages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.dense import DenseAgent, SgdConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sharing import SharingConfig, share_fact, shared_names
from flower_mcepl.agents.server import Server, shapes_of, trained_weights


@dataclass(frozen=True, kw_only=True)
class FedavgConfig(SgdConfig, SharingConfig):
    """Parameters of FedAvg; E is a common choice of the paper (arXiv:1602.05629).

    The step size is tuned on the quickstart's digits (10 agents of 3 classes,
    validation split, two seeds, 20 rounds): of 0.02, 0.05, 0.1 and 0.2 the best; 0.1
    came within 0.2 points. With ``share`` less than all weights the method is FedPer
    (Arivazhagan et al. 2019, arXiv:1912.00818): the others are personal.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0
    local_epochs: int = 5  # E


@final
class FedavgAgent(DenseAgent[FedavgConfig]):
    """One FedAvg agent: E local epochs of SGD from the global model ``w``.

    ``w_k`` is what goes out, and the server's average of all ``w_k`` is what comes
    back; `fuse` takes it over whole. `evaluate` after that sees the global model, on
    the agent's own test split. Momentum, if there is any, starts anew every round.

    Notes
    -----
    The running statistics of batch norm follow the agent's own data and are not
    averaged.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """

    algorithm = "fedavg"
    server_based = True

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Take over the server's model; without one the agent goes on from its own."""
        for payload in inbox.values():
            for name in self.shared:
                self.weights[name].copy_(payload[name])

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps, from momentum zero."""
        self.velocity = {}
        metrics = super().train(round=round)
        self.velocity = {}
        return metrics


class FedavgServer(Server):
    """The server of FedAvg: ``w_{t+1} = Σ_k (n_k / n) w_k``.

    k is over the agents that answered, ``n_k`` their numbers of training examples.

    Under Flower its mean is taken by Flower's own FedAvg
    (`flower_mcepl.strategies.fedavg`), to the same bits.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """

    algorithm = "fedavg"
    shared = True

    def __init__(
        self, module: nn.Module, num_agents: int, config: FedavgConfig, *, seed: int
    ) -> None:
        super().__init__(module, num_agents, seed=seed)
        self._share = share_fact(config)
        weights = trained_weights(module)
        self.weights = {name: weights[name] for name in shared_names(config.share, weights)}
        self.layers = self.layers_down = shapes_of(self.weights)

    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Average the models by numbers of examples; an unknown one counts as 1."""
        # float sums depend on the order
        sizes = {agent: max(1, num_examples.get(agent, 1)) for agent in sorted(inbox)}
        models = [{name: inbox[agent][name].to_dense() for name in self.weights} for agent in sizes]
        self.weights = self._mean(models, list(sizes.values()), round=round)

    def _mean(
        self, models: Sequence[Payload], sizes: Sequence[int], *, round: int
    ) -> dict[str, Tensor]:
        """Weighted mean of models; products are rounded, then added, as in NumPy."""
        shares = [size / sum(sizes) for size in sizes]
        means = {}
        for name in self.weights:
            mean = models[0][name] * shares[0]
            for model, share in zip(models[1:], shares[1:], strict=True):
                mean += model[name] * share
            means[name] = mean
        return means

    def note(self, agent: int, payload: Payload) -> None:
        """Leave it: nothing in it is needed."""

    def payload_for(self, agent: int, *, round: int) -> Payload:
        """Return the global model."""
        return self.weights

    def describe(self) -> dict[str, Any]:
        """Return what agents and server must have in common, the shared layers too."""
        return {**super().describe(), **self._share}

    def parameters(self) -> dict[str, Any]:
        """Return nothing: the server has no parameters."""
        return {}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {"weights": self.weights}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {"weights": (self.layers_down, False)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        self.weights = groups["weights"]


FEDAVG = Algorithm(FedavgAgent, FedavgConfig, FedavgServer)
