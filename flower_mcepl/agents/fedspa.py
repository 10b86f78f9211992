"""FedSpa: personal sparse masks over one global model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.sparse import SparseAgent, SparseConfig, held_masks, masked_names
from flower_mcepl.agents.server import Server, shapes_of, trained_weights
from flower_mcepl.masks.sparsity import from_sparse, to_sparse

# before a layer's name in an agent's payload: its mask of the next round, where masks
# move
NEXT_MASK = "next-mask/"


@dataclass(frozen=True, kw_only=True)
class FedspaConfig(SparseConfig):
    """Parameters of FedSpa; ``drop_fraction = 0`` is the paper's RSM, all else its DST.

    RSM has random static masks, DST moving ones. Local training is that of Dis-PFL
    (arXiv:2206.00187, section 5.1), with which it shares its masks. On the quickstart's
    digits (10 agents of 3 classes, validation split, two seeds, 20 rounds) the step
    size 0.1 was also the best of 0.05, 0.1, 0.2 and 0.4; RSM and DST came within a
    point of each other.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """


@final
class FedspaAgent(SparseAgent[FedspaConfig]):
    """One FedSpa agent: a personal mask ``m_k`` over the global model ``w_t``.

    It never sees the rest of the model. In round t:

    1. `train`: from ``w̃_0 = m_k ⊙ w_t``, N steps ``w̃ = (w̃ - η (clip(g) + μ w̃)) ⊙
       m_k``; then `outgoing` is ``U_k = w̃_0 - w̃_N`` at the places of ``m_k``, and,
       where masks move, the next mask.
    2. The mask moves as that of Dis-PFL does: cosine-annealed drop of the smallest
       weights, as many grown back by gradient, from an ERK start (DST); with
       ``drop_fraction = 0`` it stands still (RSM).
    3. `fuse`: the server's ``m_k ⊙ w_{t+1}`` becomes the agent's model, the one that is
       evaluated; its places become the agent's mask, should an answer have been lost.

    Biases and norm layers have no mask: they are trained and averaged as ordinary
    weights.

    Source: Huang et al. 2022, arXiv:2201.11380, algorithms 1 and 2.
    """

    algorithm = "fedspa"
    server_based = True
    _start: Mapping[str, Tensor] | None = None  # w̃_0, from train until fuse

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers_down = dict(self.shapes)
        self.layers = payload_layers(
            self.shapes, list(self.masks), moving=self.config.drop_fraction > 0
        )

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Take over the server's weights and places; without any keep the own ones."""
        for payload in inbox.values():
            for name, w in self.weights.items():
                values, mask = from_sparse(payload[name].to(w))
                w.copy_(values)
                if name in self.masks:
                    self.masks = {**self.masks, name: mask}
        self._apply_masks()
        self._start = None

    def train(self, *, round: int) -> dict[str, float]:
        """Take the N steps under the mask, then move the mask."""
        self._apply_masks()  # nothing to do after fuse
        self._start = {name: w.detach().clone() for name, w in self.weights.items()}
        return super().train(round=round)

    def outgoing(self) -> dict[str, Tensor]:
        """Return ``U_k``, sparse under a mask, and the next mask where masks move."""
        start = self.weights if self._start is None else self._start
        moved = self._sparse(
            {name: start[name].detach() - w.detach() for name, w in self.weights.items()}
        )
        masks = {NEXT_MASK + name: mask.cpu().clone() for name, mask in self.masks.items()}
        return {name: {**moved, **masks}[name] for name in self.layers}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._groups(), "start": self._start or {}}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {**super()._group_shapes(), "start": (self.shapes, True)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        self._start = groups.get("start")


def payload_layers(
    shapes: Shapes, masked: list[str], *, moving: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a FedSpa agent sends: weights, and next masks where masks move."""
    return {**shapes, **({NEXT_MASK + name: shapes[name] for name in masked} if moving else {})}


@final
class FedspaServer(Server):
    """The server of FedSpa: ``w_{t+1} = w_t - (1/|S|) Σ_{k in S} U_k``.

    S are the agents that answered; agent k gets ``m_k ⊙ w_{t+1}``. The mean counts
    every agent of S, whether its mask holds a weight or not, as published: a weight
    that few hold moves little. ``m_k`` is the mask that agent k sent last.

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
        """Take note of the agent's next mask: that of its move if masks are static."""
        self._masks[agent] = {
            name: payload[NEXT_MASK + name] if self.mask_layers else from_sparse(payload[name])[1]
            for name in self._masked
        }

    def payload_for(self, agent: int, *, round: int) -> Payload | None:
        """Return the global model under the agent's mask; None while it is unknown."""
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


FEDSPA = Algorithm(FedspaAgent, FedspaConfig, FedspaServer, final_masks=held_masks)
