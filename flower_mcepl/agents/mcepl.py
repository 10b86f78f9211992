"""MCE-PL: personal masks over shared random weights, fused with neighbors' masks."""

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.mask_states import final_masks
from flower_mcepl.agents.parts.masked import MaskedAgent, MaskedConfig
from flower_mcepl.agents.parts.training import (
    descent_direction,
    finite_loss,
    gradients_of,
    train_locally,
)
from flower_mcepl.config.checks import check


@dataclass(frozen=True, kw_only=True)
class MceplConfig(MaskedConfig):
    """Parameters of MCE-PL; the defaults are the reference setting of the paper.

    Source: Tian et al. 2025, arXiv:2504.17520.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    score_lr: float = 10.0  # η > 0: step size on the scores
    group_lasso: float = 0.0  # λ >= 0; the paper's published code has none

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("score_lr", "group_lasso")
        check(
            self.score_lr > 0, "score-lr must be > 0", self.score_lr, "The reference value is 10."
        )


@final
class MceplAgent(MaskedAgent[MceplConfig]):
    """One MCE-PL agent: private scores over a shared frozen network, trained by SGD.

    Its mask is all that it sends. The ablations of the paper are other rules of fusion
    and fixed parameters (`mask_variants`), not other agents.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share, as from `shared_module`; it
        is copied.
    data : AgentData
        Training and test split.
    config : MceplConfig
        The method's parameters; the retention may differ from agent to agent.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.
    """

    algorithm = "mcepl"

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps on the scores; ``train-loss`` is their mean loss."""
        self.model.train()
        step = partial(self._local_step, round=round)
        return train_locally(
            step, self.data.train, self.config, seed=self.seed, agent=self.index, round=round
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluate the network under the agent's own mask, on its own test split.

        With ``score_averaging`` the mask is that of the scores' running mean; training
        and what is sent do without it.
        """
        masks = self._personal_masks()
        metrics = self.learner.evaluate(self.model.bake(masks), self.data)
        return {**metrics, "density": self._density(masks)}

    # Two gradients: the steps follow that of the loss with weight decay and momentum,
    # while the fine-tuning step takes the last one as it is (group lasso included).
    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        loss = self.learner.loss(self.model, inputs, labels)
        objective = (
            loss + self.config.group_lasso * self.model.group_lasso()
            if self.config.group_lasso
            else loss
        )
        value = finite_loss(
            loss, agent=self.index, round=round, key="score-lr", lr=self.config.score_lr
        )
        scores = self.model.scores
        self.gradient = gradients_of(objective, scores)
        score_lr = self.config.score_lr * self.config.lr_factor(round)
        with torch.no_grad():
            for name, z in scores.items():
                g, velocity = self.gradient[name], self.velocity
                z.add_(
                    descent_direction(name, z, g, velocity=velocity, config=self.config),
                    alpha=-score_lr,
                )
        return value


MCEPL = Algorithm(MceplAgent, MceplConfig, final_masks=final_masks)
