"""Dis-PFL: sparse personal models that are averaged where their masks overlap."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.agents.parts.sparse import SparseAgent, SparseConfig, held_masks
from flower_mcepl.masks.sparsity import from_sparse, overlap_mean


@dataclass(frozen=True, kw_only=True)
class DispflConfig(SparseConfig, SharingConfig):
    """Parameters of Dis-PFL; the defaults are those of the paper's CIFAR-10 runs.

    But for ``regrow``: the paper's algorithm 2 grows by gradient, the default here, and
    the published code's CIFAR-10 run at random, as with ``regrow = "random"``. The
    paper's masks move for all of its 500 rounds; here for those of the run.

    Source: Dai et al. 2022, arXiv:2206.00187, section 5.1.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """


@final
class DispflAgent(SparseAgent[DispflConfig]):
    """One Dis-PFL agent: a personal mask ``m_i`` that moves, and weights under it.

    In round t:

    1. `train`: local epochs under the mask, ``w = (w - η (clip(g) + μ w)) * m_i^t``;
       then `outgoing` is ``w`` at the places of ``m_i^t``. The next mask ``m_i^{t+1}``
       lacks the share ``α_t`` of each layer's smallest weights and has as many others,
       those of largest gradient in one batch (or random ones).
    2. `fuse`: ``w = (Σ_j w_j ⊘ Σ_j m_j^t) * m_i^{t+1}``, j over the neighbors and i
       itself, whatever number of them holds a weight. A weight that has just grown back
       takes the neighbors' mean, or starts at zero.

    Biases and norm layers have no mask: they are trained and averaged as ordinary
    weights (the paper's code masks all parameters; its networks have hardly any
    others). The first masks are ERK, drawn by each agent for itself
    from weights that are common to all.

    Source: Dai et al. 2022, arXiv:2206.00187, algorithms 1 and 2; as in its published
    code, what is sent is the model as trained, before its mask moves, the gradient for
    growing is taken in evaluation mode, and momentum, if there is any, starts anew
    every round.
    """

    algorithm = "dispfl"

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Average each weight over its holders, and go on under the new mask."""
        payloads = [inbox[sender] for sender in sorted(inbox)]  # float sums depend on the order
        for name in self.shared:
            w = self.weights[name]
            received = [payload[name].to(w) for payload in payloads]
            if name in self.masks:
                pairs = [(w, self._held[name]), *(from_sparse(tensor) for tensor in received)]
                w.copy_(overlap_mean([value for value, _ in pairs], [mask for _, mask in pairs]))
            else:
                w.copy_(torch.stack([w, *(tensor.to_dense() for tensor in received)]).mean(dim=0))
        self._apply_masks()

    def outgoing(self) -> dict[str, Tensor]:
        """Return the trained weights: sparse under a mask, whose places they tell."""
        return self._sparse({name: self.weights[name].detach() for name in self.shared})


DISPFL = Algorithm(DispflAgent, DispflConfig, final_masks=held_masks)
