"""FedSpa, the server's side: one dense global model, of which each agent sees the part under its mask."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.fedspa import NEXT_MASK, FedspaConfig, payload_layers
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sparse import masked_names
from flower_mcepl.agents.server import Server, shapes_of, trained_weights
from flower_mcepl.masks.sparsity import from_sparse, to_sparse


@final
class FedspaServer(Server):
    """``w_{t+1} = w_t - (1/|S|) Σ_{k in S} U_k``, S the agents that answered; agent k gets ``m_k ⊙ w_{t+1}``.

    The mean counts every agent of S, whether its mask holds a weight or not, as
    published: a weight that few hold moves little. ``m_k`` is the mask that agent k
    sent last.

    Source: Huang et al. 2022, arXiv:2201.11380, algorithm 1.
    """

    algorithm = "fedspa"
    shared = False

    def __init__(
        self, module: nn.Module, num_agents: int, config: FedspaConfig, *, seed: int
    ) -> None:
        super().__init__(module, num_agents, seed=seed)
        self.weights = trained_weights(module)
        masked = masked_names(module, self.weights)
        self.layers_down = shapes_of(self.weights)
        self.layers = payload_layers(self.layers_down, masked, moving=config.drop_fraction > 0)
        self.mask_layers = frozenset(self.layers) - frozenset(self.layers_down)
        self._masked = {name: self.layers_down[name] for name in masked}
        self._masks: dict[int, dict[str, Tensor]] = {}  # by agent, those of its next round

    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Move the global model by the mean of the agents' moves."""
        agents = sorted(inbox)  # float sums depend on the order
        for agent in agents:
            self.note(agent, inbox[agent])
        for name, w in self.weights.items():
            total = torch.zeros_like(w)
            for agent in agents:
                total += inbox[agent][name].to_dense()
            self.weights[name] = w - total / len(agents)

    def note(self, agent: int, payload: Payload) -> None:
        """Take note of the agent's next mask; where masks stand still, that is the one of its move."""
        self._masks[agent] = {
            name: payload[NEXT_MASK + name] if self.mask_layers else from_sparse(payload[name])[1]
            for name in self._masked
        }

    def payload_for(self, agent: int, *, round: int) -> Payload | None:
        """Return the global model under the agent's mask; None of an agent whose mask is not known yet."""
        if agent not in self._masks:
            return None
        masks = self._masks[agent]
        return {
            name: to_sparse(w, masks[name]) if name in masks else w
            for name, w in self.weights.items()
        }

    def parameters(self) -> dict[str, Any]:
        """Return nothing: the server has no parameters."""
        return {}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "weights": self.weights,
            **{_group(agent): masks for agent, masks in self._masks.items()},
        }

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        masks = {_group(agent): (self._masked, True) for agent in range(self.num_agents)}
        return {"weights": (self.layers_down, False), **masks}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        self.weights = groups["weights"]
        self._masks = {
            agent: groups[_group(agent)]
            for agent in range(self.num_agents)
            if _group(agent) in groups
        }


def _group(agent: int) -> str:
    return f"mask-{agent}"
