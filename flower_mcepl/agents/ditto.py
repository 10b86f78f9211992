"""Ditto: FedAvg's global model, and a personal one that is held near it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.fedavg import FedavgServer, GlobalModelAgent, copied
from flower_mcepl.agents.parts.dense import SgdConfig, check_weights
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.placement import train_mode


@dataclass(frozen=True, kw_only=True)
class DittoConfig(SgdConfig, SharingConfig):
    """Parameters of Ditto (arXiv:2012.04221); step size and E are those of FedAvg here.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.05  # η > 0, of both models
    local_epochs: int = 5  # passes over the training split a round, of both models together
    proximal: float = 0.1  # λ >= 0: strength that holds the personal model near the global one
    # share of the local steps that the personal model takes, in (0, 1); the others are
    # the global model's
    personal_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("proximal")
        check(
            0 < self.personal_share < 1,
            "personal-share must be in (0, 1)",
            self.personal_share,
            "Use algorithm fedavg for 0, and local for 1.",
        )


@final
class DittoAgent(GlobalModelAgent[DittoConfig]):
    """One Ditto agent: it helps to train the global ``w``, and has a model ``v`` alone.

    Steps on ``w`` are those of FedAvg; steps on the personal model are
    ``v = v - η (∇F(v) + λ (v - w_t))``, where ``w_t`` is the global model that the
    round began from: SGD on ``F(v) + λ/2 ‖v - w_t‖²``. Only ``w`` is sent and averaged;
    `evaluate` sees ``v``, which is in the agent's state.

    A round's local steps are divided between the two models, ``personal_share`` for
    ``v``, and take turns; so that the number of images that an agent processes is that
    of every other algorithm with the same local steps, and ``train-loss`` is the mean
    over both.

    Notes
    -----
    Differs from the paper, which gives each model its own number of steps beside the
    other one's, and so twice the images.

    Source: Li et al. 2021, arXiv:2012.04221, algorithm 1.
    """

    algorithm = "ditto"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.personal = own_copy(self.model)  # with running statistics of its own
        parameters = dict(self.personal.named_parameters())
        self.personal_weights = {name: parameters[name] for name in self.weights}
        self._personal_velocity: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}  # w_t
        self._taken = 0  # local steps since round 1

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps on both models, each from momentum zero."""
        train_mode(self.personal, self._frozen)
        self._anchor, self._personal_velocity = copied(self.weights), {}
        self._taken = (round - 1) * self.config.num_steps(self.data.train.num_examples)
        metrics = super().train(round=round)
        self._anchor, self._personal_velocity = {}, {}
        check_weights(self.personal_weights, agent=self.index, round=round, lr=self.config.lr)
        return metrics

    def _own(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Personal model, and its weights."""
        return self.personal, self.personal_weights

    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        share, taken = self.config.personal_share, self._taken
        self._taken += 1
        if math.floor(share * (taken + 1)) == math.floor(share * taken):
            return super()._local_step(inputs, labels, round=round)
        weights = self.personal_weights
        value, gradients = self._gradients(self.personal, weights, inputs, labels, round=round)
        pulled = {
            name: g.add(weights[name].detach() - self._anchor[name], alpha=self.config.proximal)
            for name, g in gradients.items()
        }
        self._descend(weights, pulled, self._personal_velocity, round=round)
        return value

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        buffers = dict(self.personal.named_buffers())
        return {
            **super()._groups(),
            "personal": self.personal_weights,
            "personal-buffer": buffers,
        }

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        shapes = super()._group_shapes()
        return {**shapes, "personal": shapes["weights"], "personal-buffer": shapes["buffer"]}

    @torch.no_grad()
    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        for name, weight in self.personal_weights.items():
            weight.copy_(groups["personal"][name])
        for name, buffer in self.personal.named_buffers():
            buffer.copy_(groups["personal-buffer"][name])


@final
class DittoServer(FedavgServer):
    """The server of Ditto: that of FedAvg."""

    algorithm = "ditto"


DITTO = Algorithm(DittoAgent, DittoConfig, DittoServer)
