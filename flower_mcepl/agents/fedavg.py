"""FedAvg: local SGD from one global model, which the server averages."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.dense import ConfigT, DenseAgent, SgdConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sharing import SharingConfig, share_fact, shared_shapes
from flower_mcepl.agents.parts.training import train_locally
from flower_mcepl.agents.server import Server, shapes_of, trained_weights
from flower_mcepl.config.checks import check
from flower_mcepl.masks.placement import train_mode


@dataclass(frozen=True, kw_only=True)
class FedavgConfig(SgdConfig, SharingConfig):
    """Parameters of FedAvg; E is a common choice of the paper (arXiv:1602.05629).

    The step size is tuned on the quickstart's digits (10 agents of 3 classes,
    validation split, two seeds, 20 rounds): of 0.02, 0.05, 0.1 and 0.2 the best; 0.1
    came within 0.2 points. With ``share`` less than all weights the method is FedPer
    (Arivazhagan et al. 2019, arXiv:1912.00818): the others are personal. With
    ``finetune_steps`` it is FedAvg with fine-tuning, FedAvg+FT.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0
    local_epochs: int = 5  # E
    # mini-batches that each agent takes from the model for an evaluation, which is of
    # what they make of it; 0: of the model itself
    finetune_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.finetune_steps >= 0, "finetune-steps must be >= 0", self.finetune_steps)
        check(
            not (self.finetune_steps and self.weight_averaging),
            "an evaluation is of the fine-tuned model or of a running mean: weight-averaging must "
            "be 0 where finetune-steps is not",
            self.weight_averaging,
        )


class GlobalModelAgent(DenseAgent[ConfigT]):
    """A dense agent that takes over the server's model, and trains it from rest."""

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


@final
class FedavgAgent(GlobalModelAgent[FedavgConfig]):
    """One FedAvg agent: E local epochs of SGD from the global model ``w``.

    ``w_k`` is what goes out, and the server's average of all ``w_k`` is what comes
    back; `fuse` takes it over whole. `evaluate` after that sees the global model, on
    the agent's own test split. Momentum, if there is any, starts anew every round.

    With ``finetune_steps`` an evaluation is of that model after so many further local
    steps, of the first round's size, on the same batches every time. They leave no
    trace: the next round and the saved state are those of the global model, and the
    record's images are those of the training alone.

    Notes
    -----
    The running statistics of batch norm follow the agent's own data and are not
    averaged.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """

    algorithm = "fedavg"

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model, after the steps of fine-tuning if there are any."""
        with self._finetuned():
            return super().evaluate()

    def personal_model(self) -> nn.Module:
        """Return a copy of the model that `evaluate` evaluates, fine-tuned as there."""
        with self._finetuned():
            return super().personal_model()

    @contextlib.contextmanager
    def _finetuned(self) -> Iterator[None]:
        """Have the model after its fine-tuning for a while, if there is any."""
        if not self.config.finetune_steps:
            yield
            return
        kept = {group: copied(tensors) for group, tensors in self._groups().items()}
        try:
            self._finetune()
            yield
        finally:
            self._take_back(kept)

    def _finetune(self) -> None:
        config = replace(self.config, local_steps=self.config.finetune_steps, local_epochs=0)
        train_mode(self.model, self._frozen)
        self.velocity = {}
        train_locally(
            partial(self._local_step, round=1),
            self.data.train,
            config,
            seed=self.seed,
            agent=self.index,
            round=0,  # batches that no round of training has
            device=self.device,
        )


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class FedavgServer(Server):
    """The server of FedAvg: ``w_{t+1} = Σ_k (n_k / n) w_k``.

    k is over the agents that answered, ``n_k`` their numbers of training examples.

    Under Flower its mean is taken by Flower's own FedAvg
    (`flower_mcepl.strategies.fedavg`), to the same bits.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """

    algorithm = "fedavg"
    shared = True

    def __init__(self, module: nn.Module, num_agents: int, config: SgdConfig, *, seed: int) -> None:
        super().__init__(module, num_agents, seed=seed)
        self._share = share_fact(config)
        weights = trained_weights(module)
        self.weights = {name: weights[name] for name in shared_shapes(config, shapes_of(weights))}
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
