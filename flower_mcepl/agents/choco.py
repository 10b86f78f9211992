"""CHOCO-SGD: decentralized SGD whose neighbors hear compressed differences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.averaging import MixingAgent
from flower_mcepl.agents.parts.dense import SgdConfig
from flower_mcepl.agents.parts.depth import DepthConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.config.checks import check

COMPRESSORS = ("sign", "top-k")
SHARES = (0.001, 0.01, 0.1)  # of top-k; each is a codec of the wire


@dataclass(frozen=True, kw_only=True)
class ChocoConfig(SgdConfig, SharingConfig, DepthConfig):
    """Parameters of CHOCO-SGD (arXiv:1902.00340, arXiv:1907.09356).

    Tuned on the quickstart's digits (10 agents of 3 classes, validation split, one
    seed, 40 rounds): of the step sizes 0.02, 0.05 and 0.1 the best with signs, and γ =
    0.1 better than 0.4 with signs and with the largest hundredth (0.05 still better
    there, by less than a point). Neighbors are worth little on those data: where they
    are worth more, try a larger γ.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0
    compressor: str = "sign"  # of differences; or "top-k": the largest of each layer
    top_k: float = 0.01  # share of a layer's differences that "top-k" sends: 0.001, 0.01 or 0.1
    consensus_lr: float = 0.1  # γ in (0, 1]: how far an agent moves towards its neighbors

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_of("compressor", COMPRESSORS)
        known = ", ".join(map(str, SHARES))
        check(self.top_k in SHARES, f"top-k must be one of {known}", self.top_k)
        check(0 < self.consensus_lr <= 1, "consensus-lr must be in (0, 1]", self.consensus_lr)

    @property
    def precision(self) -> str:
        """Name of the wire's codec."""
        return (
            "sign-differences" if self.compressor == "sign" else f"top-{self.top_k:g}-differences"
        )


@final
class ChocoAgent(MixingAgent[ChocoConfig]):
    """One CHOCO-SGD agent: ``x_i``, and ``x^_i``, what its neighbors hold of it.

    In round t, after the local steps from ``x_i^t`` to ``x_i^{t+1/2}``:

    1. ``q_i = Q(x_i^{t+1/2} - x^_i^t)`` goes out, and ``x^_i^{t+1} = x^_i^t + q_i`` is
       what the neighbors hold then, as the agent itself does.
    2. `fuse`: ``x_i^{t+1} = x_i^{t+1/2} + γ Σ_j W_ij (x^_j^{t+1} - x^_i^{t+1})``.

    What Q leaves out is part of the next difference (error feedback). Q is per layer:
    ``sign(d) · mean(|d|)``, one bit a weight; or the ``top_k`` share of largest ``|d|``
    as bfloat16, with their places, at one in a hundred in 9 bits each. Before round 1
    all ``x^`` are the common initial weights (zero in the paper). W is that of
    `MixingAgent`; momentum, if there is any, goes on over the rounds.

    Notes
    -----
    ``x^`` is the business of the wire, and always known: Q is a codec of differences,
    as ``"int8-differences"`` of DFedAvgM. An agent's frame builds on what the relay
    says that it has of it, the relay hands on every frame that a neighbor lacks, and
    for one that lacks too many ``x^_i`` itself goes up as float32, whenever the
    differences since the last time have as many bytes: some 32 rounds of signs. So
    ``x^_i`` is the same bits in its agent and in every neighbor that got the newest
    frame, and after a loss the next difference is from what is really held. Who hears
    nothing new of a neighbor uses its last ``x^_j`` for ``max_staleness`` rounds;
    afterwards the neighbor's weight falls to the agent itself.

    Differs from the paper: with several local steps a round the difference is of all of
    them, and the values of the smallest layers, where that is no longer, go as float32.

    Sources: Koloskova, Stich, Jaggi 2019, arXiv:1902.00340, algorithm 2; Koloskova,
    Lin, Stich, Jaggi 2020, arXiv:1907.09356, for sign and top-k on neural networks.
    """

    algorithm = "choco"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.precision, self.consensus_lr = self.config.precision, self.config.consensus_lr
        self._known = {  # x^_i
            name: self._initial[name].clone().to(self.device) for name in self.shared
        }

    def mixed_weights(self) -> Mapping[str, Tensor]:
        """Return ``x^_i``, which is compared with the neighbors'."""
        return self._known

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps; without a wire between agents ``x_i`` arrives whole."""
        metrics = super().train(round=round)
        self._known = {name: self.weights[name].detach().clone() for name in self.shared}
        return metrics

    def outgoing(self) -> dict[str, Tensor]:
        """Return ``x_i``, of which the wire sends the compressed difference."""
        weights = {name: self.weights[name].detach().cpu().clone() for name in self.shared}
        return {**weights, **self._degree_said()}

    def sent(self, decoded: Payload) -> None:
        """Take note of ``x^_i`` as the neighbors have it."""
        self._known = {name: decoded[name].to(self.device) for name in self.shared}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._groups(), "known": self._known}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {**super()._group_shapes(), "known": (self.shared, False)}

    @torch.no_grad()
    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        self._known = groups["known"]


CHOCO = Algorithm(ChocoAgent, ChocoConfig)
