"""FedAvg, the server's side: the mean of all models, weighted by the sizes of the training splits."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.fedavg import FedavgConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.server import Server, shapes_of, trained_weights


class FedavgServer(Server):
    """``w_{t+1} = Σ_k (n_k / n) w_k``, k over the agents that answered, ``n_k`` their numbers of training examples.

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
        self.weights = trained_weights(module)
        self.layers = self.layers_down = shapes_of(self.weights)

    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Average the models; an agent that does not say how many examples it has counts as having one."""
        # float sums depend on the order
        sizes = {agent: max(1, num_examples.get(agent, 1)) for agent in sorted(inbox)}
        models = [{name: inbox[agent][name].to_dense() for name in self.weights} for agent in sizes]
        self.weights = self._mean(models, list(sizes.values()), round=round)

    def _mean(
        self, models: Sequence[Payload], sizes: Sequence[int], *, round: int
    ) -> dict[str, Tensor]:
        """Return the weighted mean of the models; products are rounded before they are added, as in NumPy."""
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

    def parameters(self) -> dict[str, Any]:
        """Return nothing: the server has no parameters."""
        return {}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {"weights": self.weights}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {"weights": (self.layers_down, False)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        self.weights = groups["weights"]
