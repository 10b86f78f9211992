"""MCE-PL with one piece taken away or replaced: the ablations of the paper (arXiv:2504.17520)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.model import MaskedModel


@dataclass(frozen=True, kw_only=True)
class NoFinetuningConfig(MceplConfig):
    """Parameters of MCE-PL without the personalized fine-tuning step: ``finetune_lr`` is zero.

    Raises
    ------
    ConfigError
        If a value is out of range, or ``finetune_lr`` is not zero.
    """

    finetune_lr: float = 0.0  # η_f: what this ablation takes away

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.finetune_lr == 0,
            f"finetune-lr must be 0 in algorithm {NoFinetuningAgent.algorithm}",
            self.finetune_lr,
            f"Use algorithm {MceplAgent.algorithm} for another one.",
        )

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read the settings of MCE-PL, but for ``finetune-lr``: the same run config serves both algorithms."""
        without = {key: value for key, value in run_config.items() if key != "finetune-lr"}
        return super().from_run_config(without, agent=agent, node_config=node_config)


@final
class NoFinetuningAgent(MceplAgent):
    """MCE-PL without the fine-tuning step: the neighbors' masks count in the aggregation tensor alone."""

    algorithm = "mcepl-no-finetuning"


@final
class LocalMasksAgent(MceplAgent):
    """Masks trained alone: MCE-PL of an agent without neighbors, ``y = z``, in whatever graph; it sends nothing."""

    algorithm = "local-masks"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers = {}
        self._set_neighbors([])

    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Leave everything as it is: whoever sent something is no neighbor."""
        super().fuse({}, round=round)

    def outgoing(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def first_payload(self) -> None:
        """Return None: neighbors hold nothing."""


@final
class MaskAveragingAgent(MceplAgent):
    """Direct averaging: the network lives under the mean of its own and its neighbors' masks.

    ``m̄_i = (m_i + Σ_{j in N_i} m_j) / (1 + |N_i|)`` takes the place of the mask in
    training and evaluation, where ``m_i`` is the top-k mask of ``|z_i|`` alone; ``m_i``
    is what travels. The density is the share of weights with ``m̄ > 0``. All else is
    MCE-PL, the fine-tuning step included (``finetune_lr = 0`` leaves it out).

    Notes
    -----
    The gradient passes the mean as if it were the agent's own mask, ``g = ∂CE/∂(w * m̄) * w * sign(z)``: the chain
    rule's ``1 / (1 + |N_i|)`` is left out, which would only make the step size depend on the number of neighbors.
    """

    algorithm = "mask-averaging"
    model: "AveragedMaskModel"

    def _masked(self, module: nn.Module, generator: torch.Generator) -> MaskedModel:
        return AveragedMaskModel(module, retention=self.config.retention, generator=generator)

    def _network_masks(self) -> dict[str, Tensor]:
        return self.model.averaged_masks()

    def _set_counts(self, counts: Mapping[str, Tensor], num_neighbors: int) -> None:
        super()._set_counts(counts, num_neighbors)
        self.model.own_share = 1 / (1 + num_neighbors)


class AveragedMaskModel(MaskedModel):
    """A masked model whose weights are ``w * (share * m + (1 - share) * n)``, with m the mask of the scores alone."""

    own_share = 1.0  # of the model's own mask in the mean

    def aggregation(self) -> dict[str, Tensor]:
        """Return the scores: the neighbors have no say in the model's own mask."""
        return dict(self.scores)

    @torch.no_grad()
    def averaged_masks(self) -> dict[str, Tensor]:
        """Return the mean of the model's own and the neighbors' masks, float in [0, 1], by layer."""
        return {name: self._average(name, mask.float()) for name, mask in self.masks().items()}

    def masked_weights(self) -> dict[str, Tensor]:
        """Return ``w * m̄`` of every layer, with the gradient to the scores straight through ``m̄``."""
        weights = {}
        for name, z in self.scores.items():
            own = maths.TopKSTE.apply(z.abs(), self.retention[name])
            weights[name] = self._weight(name) * (own + (self._average(name, own) - own).detach())
        return weights

    def _average(self, name: str, own: Tensor) -> Tensor:
        n = self.neighbor_means[name]
        return own if n is None else self.own_share * own + (1 - self.own_share) * n
