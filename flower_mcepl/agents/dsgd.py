"""DSGD (D-PSGD): decentralized parallel SGD, an average for every gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.averaging import MixingAgent
from flower_mcepl.agents.parts.dense import SgdConfig
from flower_mcepl.agents.parts.depth import DepthConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.agents.parts.votes import WHOLE


@dataclass(frozen=True, kw_only=True)
class DsgdConfig(SgdConfig, SharingConfig, DepthConfig):
    """Parameters of DSGD; one mini-batch a round, no momentum, as published.

    With ``share`` less than all weights the others are personal, as the head of FedPer
    (Arivazhagan et al. 2019, arXiv:1912.00818).

    Source: Lian et al. 2017, arXiv:1705.09056, algorithm 1.

    The step size is tuned on the quickstart's digits (10 agents of 3 classes on a ring,
    validation split, two seeds, 100 rounds): of 0.01, 0.03, 0.05, 0.1, 0.3 and 1 the
    best; from 0.3 on nothing is learned.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0


@final
class DsgdAgent(MixingAgent[DsgdConfig]):
    """One D-PSGD agent: ``x_i^{t+1} = Σ_j W_ij x_j^t - η ∇F_i(x_i^t)``.

    The sum is over the neighbors j and i itself. `train` of round t takes the gradient
    at ``x_i^t``, sends ``x_i^t``, and holds the step back; `fuse`, when the neighbors'
    ``x_j^t`` have come, makes ``x_i^{t+1}``. Both the sum and the gradient are those of
    round t, as published; nothing is one round late. `evaluate` after `fuse` sees
    ``x_i^{t+1}``. F includes the weight decay, ``μ/2 ‖x‖²``. W is that of
    `MixingAgent`; in round 1, where degrees are unknown, all ``x_j`` are equal, so that
    on an undirected graph that does not change every round is exact.

    With K local steps a round, the gradient step becomes the K steps' whole move:
    ``x_i^{t+1} = Σ_j W_ij x_j^t + (x_i^{t,K} - x_i^t)``. An agent whose neighbors'
    frames never come goes on from ``x_i^{t,K}`` alone.

    Source: Lian et al. 2017, arXiv:1705.09056, algorithm 1.
    """

    algorithm = "dsgd"
    # x_i^t between train and fuse, while the weights are x_i^{t,K}
    _start: Mapping[str, Tensor] | None = None

    # One message a round: the neighbors' x_j^t come after the gradient at x_i^t was
    # taken. Sending the weights from before the step, and adding the step to their
    # average, gives the published iteration all the same; to send the weights after it
    # would be DFedAvg. The weights from before live in the state meanwhile.
    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps from ``x_i^t``, and keep ``x_i^t`` for the exchange."""
        self._start = {name: x.detach().clone() for name, x in self.weights.items()}
        return super().train(round=round)

    def fuse(
        self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float] = WHOLE
    ) -> None:
        """Make ``x_i^{t+1}`` of the neighbors' ``x_j^t`` and the held-back step."""
        super().fuse(inbox, round=round, votes=votes)
        self._start = None

    def mixed_weights(self) -> Mapping[str, Tensor]:
        """Return ``x_i^t``, from before the local steps."""
        return self.weights if self._start is None else self._start

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._groups(), "start": self._start or {}}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {**super()._group_shapes(), "start": (self.shapes, True)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        self._start = groups.get("start")


DSGD = Algorithm(DsgdAgent, DsgdConfig)
