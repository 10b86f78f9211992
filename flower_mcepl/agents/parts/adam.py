"""Adam on named tensors, with moments that an agent can save and take back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flower_mcepl.agents.parts.groups import Shapes

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # those of the paper, and of torch.optim.Adam


# torch.optim.Adam would do, but that its step imports torch's compiler: seconds and
# hundreds of megabytes for every message on a device.
class Adam:
    """Adam with L2 weight decay, the same as torch.optim.Adam bit for bit.

    ``m = β1 m + (1 - β1) g``, ``v = β2 v + (1 - β2) g²``, and
    ``x = x - η (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + ε)``.

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def __init__(self) -> None:
        self.steps = 0  # t
        self.means: dict[str, Tensor] = {}  # m; empty before the first step
        self.squares: dict[str, Tensor] = {}  # v

    @torch.no_grad()
    def step(
        self,
        values: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Move the values in place by one step."""
        self.steps += 1
        unbiased_mean, unbiased_square = 1 - BETA1**self.steps, 1 - BETA2**self.steps
        for name, value in values.items():
            gradient = gradients[name]
            if weight_decay:
                gradient = gradient.add(value, alpha=weight_decay)
            mean = self.means.setdefault(name, torch.zeros_like(value))
            square = self.squares.setdefault(name, torch.zeros_like(value))
            mean.lerp_(gradient, 1 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            size = (square.sqrt() / unbiased_square**0.5).add_(EPS)
            value.addcdiv_(mean, size, value=-lr / unbiased_mean)

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what must survive, as groups of a state."""
        count = {"steps": torch.tensor([self.steps])}
        return {"mean": self.means, "square": self.squares, "adam": count}

    @staticmethod
    def group_shapes(shapes: Shapes) -> dict[str, tuple[Shapes, bool]]:
        """Return what each group holds, and whether it may be absent."""
        return {"mean": (shapes, True), "square": (shapes, True), "adam": ({"steps": (1,)}, False)}

    def take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        """Undo `groups`."""
        self.steps = int(groups["adam"]["steps"])
        self.means, self.squares = groups.get("mean", {}), groups.get("square", {})
