"""FedAvg, the agent's side: local SGD from the one global model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.parts.dense import DenseAgent, SgdConfig


@dataclass(frozen=True, kw_only=True)
class FedavgConfig(SgdConfig):
    """Parameters of FedAvg; E is a common choice of the paper (arXiv:1602.05629).

    The step size is tuned on the quickstart's digits (10 agents of 3 classes,
    validation split, two seeds, 20 rounds): of 0.02, 0.05, 0.1 and 0.2 the best; 0.1
    came within 0.2 points.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0
    local_epochs: int = 5  # E


@final
class FedavgAgent(DenseAgent[FedavgConfig]):
    """One FedAvg agent: E local epochs of SGD from the global model ``w``, which `fuse` takes over whole.

    ``w_k`` is what goes out, and the server's average of all ``w_k`` is what comes
    back. `evaluate` after `fuse` sees the global model, on the agent's own test split.
    Momentum, if there is any, starts anew every round.

    Notes
    -----
    The running statistics of batch norm follow the agent's own data and are not averaged.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """

    algorithm = "fedavg"
    server_based = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers = dict(self._shapes)

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Take over the server's model; without one the agent goes on from its own."""
        for payload in inbox.values():
            for name, w in self.weights.items():
                w.copy_(payload[name])

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps, from momentum zero."""
        self._velocity = {}
        metrics = super().train(round=round)
        self._velocity = {}
        return metrics

    def outgoing(self) -> dict[str, Tensor]:
        """Return all weights."""
        return {name: w.detach().cpu().clone() for name, w in self.weights.items()}

    def first_payload(self) -> None:
        """Return None: the server has said nothing yet, and all start from the common weights."""
