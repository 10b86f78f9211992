"""The local step on the scores of one layer, as a pure function of one agent's tensors.

An agent calls it with its own; a stack of agents with all of theirs, by
``torch.vmap``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from flower_mcepl.agents.parts.training import descent_direction
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import LayerSpec

if TYPE_CHECKING:
    from flower_mcepl.agents.mcepl import MceplConfig

SIGNED, MAGNITUDE = "signed", "magnitude"
RAW, NORMALIZED, FILTER_NORMALIZED = "raw", "normalized", "filter-normalized"
GRADIENT, PROXIMAL = "gradient", "proximal"


@final
@dataclass(frozen=True)
class ScoreStep:
    """SGD on scores: gradient, weight decay, momentum, lasso and form of the scores.

    Parameters
    ----------
    config : MceplConfig
        Parameters of the agent.
    """

    config: "MceplConfig"

    def __call__(
        self, z: Tensor, g: Tensor, v: Tensor | None, *, layer: LayerSpec | None, lr: float
    ) -> tuple[Tensor, Tensor]:
        """Scores and velocity after a step; the arguments stay as they are.

        Parameters
        ----------
        z, g : Tensor
            Scores, and the gradient of the loss on them.
        v : Tensor, optional
            Velocity of the momentum, where a step was taken before.
        layer : LayerSpec, optional
            The layer whose scores they are; None: they are those of gates.
        lr : float
            Step size of this round.
        """
        velocity = {} if v is None else {"": v}
        direction = descent_direction(
            "", z, self._scaled(g, layer), velocity=velocity, config=self.config
        )
        return self.settled(self._shrunk(z.add(direction, alpha=-lr), layer, lr=lr)), direction

    def settled(self, z: Tensor) -> Tensor:
        """Scores in the form that they are kept in."""
        return maths.reflected(z) if self.config.score_form == MAGNITUDE else z

    def _scaled(self, g: Tensor, layer: LayerSpec | None) -> Tensor:
        if self.config.score_gradient == RAW:
            return g
        unit = maths.normalized_gradient(g)
        if self.config.score_gradient == NORMALIZED or layer is None:
            return unit
        return unit * layer.spread(maths.evening_factors(layer.rows(unit)))

    def _shrunk(self, z: Tensor, layer: LayerSpec | None, *, lr: float) -> Tensor:
        step = lr * self.config.group_lasso
        if self.config.lasso_step != PROXIMAL or not step or layer is None:
            return z
        norms = torch.linalg.vector_norm(layer.rows(z), dim=1)
        return maths.shrunk(z, layer.spread(maths.proximal_factors(norms, step=step)))
