"""Hard thresholding over a graph: neighbors average weights; each keeps the largest."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flower_mcepl.agents import AgentState, Algorithm, DenseAgent, Masks, Payload, SgdConfig
from flower_mcepl.masks import topk_mask


@dataclass(frozen=True, kw_only=True)
class HardConfig(SgdConfig):
    """Parameters: run-config keys in kebab-case, those of SGD among them."""

    lr: float = 0.05
    kept: float = 0.5  # share of each matrix that stays, in (0, 1]; `topk_mask` checks it


class HardAgent(DenseAgent[HardConfig]):
    """``x_i = H(mean of x_j)``, j over the neighbors and i; SGD on it goes out."""

    @torch.no_grad()
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Average, and keep the largest of each matrix."""
        for name, w in self.weights.items():
            mean = torch.stack([w, *(x[name].to_dense().to(w) for x in inbox.values())]).mean(dim=0)
            w.copy_(mean * topk_mask(mean, retention=self.config.kept) if w.dim() > 1 else mean)

    def density(self) -> float:
        """Return the share of weights that are not zero."""
        return sum(int(w.count_nonzero()) for w in self.weights.values()) / self.num_weights()


def final_masks(state: AgentState, parameters: Mapping[str, object]) -> Masks:
    """Read the masks from what a run leaves, for the plots."""
    return {name: w != 0 for name, w in state.group("weights").items() if w.ndim > 1}


HARD_THRESHOLD = Algorithm(HardAgent, HardConfig, final_masks=final_masks)
