"""Averaging by Metropolis-Hastings weights, from what neighbors send alone."""

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.parts.dense import ConfigT, DenseAgent
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.votes import WHOLE
from flower_mcepl.data.batches import AgentData

# [1] float, beside the weights in every payload: the sender's number of neighbors
DEGREE = "mixing/degree"


def metropolis_weight(degree: int, other_degree: int) -> float:
    """Weight of one link, ``W_ij = 1 / (1 + max(d_i, d_j))``.

    The rest of a row of W is the agent's own share.

    Source: Xiao and Boyd 2004, "Fast linear iterations for distributed averaging"
    (Metropolis-Hastings weights).
    """
    return 1 / (1 + max(degree, other_degree))


# Differences from one's own weights, and not a weighted sum: whatever is missing from
# the inbox then falls to the agent itself without a renormalization, and where all are
# equal the result is equal, too, bit for bit. So is a layer that a neighbor of another
# depth does not hold: W of that layer stays symmetric, with rows that sum to 1.
def metropolis_pull(
    own: Mapping[str, Tensor],
    inbox: Mapping[int, Payload],
    *,
    degree: int,
    votes: Mapping[int, float] = WHOLE,
) -> dict[str, Tensor]:
    """Return ``Σ_j v_j W_ij (x_j - x_i)`` over the neighbors in the inbox, by layer.

    As the rows of W sum to 1, ``x_i`` plus this is ``Σ_j W_ij x_j`` with the agent
    itself in the sum, and the weight of a neighbor that is missing from the inbox, or
    what its vote ``v_j`` lacks, falls to the agent itself.

    Parameters
    ----------
    own : mapping
        ``x_i`` by layer.
    inbox : mapping
        The neighbors' payloads by agent: ``x_j`` by layer, and ``DEGREE``.
    degree : int
        ``d_i``, at least the size of the inbox, so that no weight becomes negative. A
        neighbor that says 0 does not know its own degree yet and counts as having the
        same.
    votes : mapping
        ``v_j`` in (0, 1] by agent; absent: 1.
    """
    pull = {name: torch.zeros_like(x) for name, x in own.items()}
    for sender in sorted(inbox):  # float sums depend on the order
        payload = inbox[sender]
        weight = votes.get(sender, 1) * metropolis_weight(degree, sent_degree(payload))
        for name in own.keys() & payload.keys():
            x = own[name]
            pull[name].add_(payload[name].to(x).to_dense() - x, alpha=weight)
    return pull


def sent_degree(payload: Payload) -> int:
    """Degree of a payload's sender, by its own account; 0, unknown, for nonsense."""
    degree = float(payload[DEGREE])
    return round(degree) if 0 <= degree < math.inf else 0


class MixingAgent(DenseAgent[ConfigT]):
    """A dense agent that averages its shared weights with those of its neighbors.

    W needs the degrees of both ends of a link, and an agent learns of the graph only by
    its inbox. So every payload says the sender's degree: the number of neighbors in its
    last inbox, 0 before the first one. For itself an agent takes the degree that it
    said, or the size of the present inbox if that is larger. Hence

    * on an undirected graph that does not change, W is the Metropolis-Hastings matrix
      of ``Topology.mixing`` in every round but the first, and there too if all degrees
      are equal (until an agent has had an inbox, nobody can know its degree);
    * whatever is missing, late or changing, every row of W sums to 1 and no entry is
      negative; W may be unsymmetric while degrees change.
    """

    undirected_only = True

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: ConfigT,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        super().__init__(index, module, data, config, seed=seed, device=device)
        self._send([{**shared, DEGREE: (1,)} for shared in self._shared_by_depth])
        self.consensus_lr = 1.0  # γ: factor on what the neighbors pull
        self._degree = 0  # number of neighbors in the last inbox; 0: unknown

    @abc.abstractmethod
    def mixed_weights(self) -> Mapping[str, Tensor]:
        """Return the agent's own ``x_i`` of the exchange that is under way."""

    @classmethod
    def weighs_votes_with(cls, config: Any) -> bool:
        """Whether votes count: what one lacks falls to the agent itself."""
        return True

    @torch.no_grad()
    def fuse(
        self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float] = WHOLE
    ) -> None:
        """Average with the neighbors: ``x_i`` moves by ``Σ_j v_j W_ij (x_j - x_i)``."""
        own = self._shared_weights()
        pull = metropolis_pull(own, inbox, degree=max(self._degree, len(inbox)), votes=votes)
        for name in self.shared:
            self.weights[name].add_(pull[name], alpha=self.consensus_lr)
        self._degree = len(inbox)

    def outgoing(self) -> dict[str, Tensor]:
        """Return ``x_i`` and the agent's degree."""
        weights = {name: x.detach().cpu().clone() for name, x in self._shared_weights().items()}
        return {**weights, **self._degree_said()}

    def first_payload(self) -> dict[str, Tensor]:
        """Return the common initial weights, and a degree of 0: unknown."""
        return {**self._initial, DEGREE: torch.zeros(1)}

    def _degree_said(self) -> dict[str, Tensor]:
        return {DEGREE: torch.tensor([float(self._degree)])}

    def _shared_weights(self) -> dict[str, Tensor]:
        mixed = self.mixed_weights()
        return {name: mixed[name] for name in self.shared}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._groups(), "mixing": {"degree": torch.tensor([self._degree])}}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        return {**super()._group_shapes(), "mixing": ({"degree": (1,)}, False)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        self._degree = int(groups["mixing"]["degree"])
