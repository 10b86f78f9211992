"""FedPM, the server's side: a Beta posterior of every weight's probability to be kept."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.fedpm import FedpmConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.server import Server
from flower_mcepl.masks.layers import find_maskable

EPSILON = 0.01  # a bit counts as 0.99 or 0.01, so that θ stays between them and its score finite


@final
class FedpmServer(Server):
    """``α += Σ_k m̂_k``, ``β += Σ_k (1 - m̂_k)``, ``θ = (α - 1) / (α + β - 2)``: the mode of Beta(α, β).

    Both begin at 1, the even prior, and begin there anew every ``reset_rounds`` rounds;
    right after that θ is the mean of the masks. ``m̂ = ε + (1 - 2ε) m`` with ε = 0.01,
    as in the published code. θ is what agents get.

    Source: Isik et al. 2023, arXiv:2209.15328, algorithm 2 (Bayesian aggregation).
    """

    algorithm = "fedpm"
    shared = True

    def __init__(
        self, module: nn.Module, num_agents: int, config: FedpmConfig, *, seed: int
    ) -> None:
        super().__init__(module, num_agents, seed=seed)
        self.reset_rounds = config.reset_rounds
        self.layers = self.layers_down = {
            name: tuple(spec.shape) for name, spec in find_maskable(module).items()
        }
        self.mask_layers = frozenset(self.layers)
        self._reset()

    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Add one mask of each agent to the counts, after starting them anew if that is due."""
        if self.reset_rounds and self._rounds == self.reset_rounds:
            self._reset()
        for name in self.layers:
            ones = torch.stack([inbox[agent][name] for agent in inbox]).sum(dim=0)
            evidence = EPSILON * len(inbox) + (1 - 2 * EPSILON) * ones
            self._alpha[name] += evidence
            self._beta[name] += len(inbox) - evidence
        self._rounds += 1

    def note(self, agent: int, payload: Payload) -> None:
        """Leave it: nothing in it is needed."""

    def payload_for(self, agent: int, *, round: int) -> Payload | None:
        """Return θ of every weight; None before the first masks have come."""
        if not self._rounds:
            return None
        return {name: (a - 1) / (a + self._beta[name] - 2) for name, a in self._alpha.items()}

    def parameters(self) -> dict[str, Any]:
        """Return how often the prior begins anew."""
        return {"reset_rounds": self.reset_rounds}

    def _reset(self) -> None:
        self._alpha, self._beta = (
            {n: torch.ones(shape) for n, shape in self.layers.items()} for _ in range(2)
        )
        self._rounds = 0  # since the last reset

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "alpha": self._alpha,
            "beta": self._beta,
            "rounds": {"counted": torch.tensor([self._rounds])},
        }

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {
            "alpha": (self.layers, False),
            "beta": (self.layers, False),
            "rounds": ({"counted": (1,)}, False),
        }

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        self._alpha, self._beta = groups["alpha"], groups["beta"]
        self._rounds = int(groups["rounds"]["counted"])
