"""Local response norms over channels some of which are gone, and refilled places."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from flower_mcepl.models import local_response_norm


@dataclass(frozen=True)
class Window:
    """Settings of a local response norm: ``x / (k + alpha / size * Σ x²)^beta``.

    The sum goes over channels from ``size // 2`` before to ``(size - 1) // 2`` behind.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    @property
    def before(self) -> int:
        """How many channels before one its window reaches."""
        return self.size // 2

    @property
    def behind(self) -> int:
        """How many channels behind one its window reaches."""
        return (self.size - 1) // 2

    def scaled(self, x: Tensor, total: Tensor) -> Tensor:
        """The norm of x by its sums of squares, which are used up."""
        d = total.mul_(self.alpha / self.size).add_(self.k)
        if self.beta == 0.75:  # faster than a power
            root = d.rsqrt_()  # new memory costs as much as the sums
            return root.sqrt().mul_(root).mul_(x)
        return x / d.pow(self.beta)


# The norm of a channel sums squares over a window of channels around it. Where some are
# gone, the others must see no more neighbors than before: a channel counts if it stood
# within the window. (To lay the channels out as they stood, zeros between, gives the
# same, and takes as long as the norm of the whole network.)
@final
class PlacedNorm(nn.Module):
    """A local response norm whose channels stand at given places, zeros between.

    Parameters
    ----------
    window : Window
        The norm as it was, over all places.
    places : list of int
        Place of each channel, ascending.
    """

    def __init__(self, window: Window, places: list[int]) -> None:
        super().__init__()
        self.window, self.places = window, places
        self._steps: list[int] = []  # to neighbors that count, among the channels here
        for step in range(1, min(window.before, len(places) - 1) + 1):
            # distance of each channel to the one so many steps behind it
            pairs = zip(places, places[step:], strict=False)
            gaps = torch.tensor([there - here for here, there in pairs])
            if bool((gaps <= window.before).any()):
                self._steps.append(step)
                for name, reach in (("before", window.before), ("behind", window.behind)):
                    near = (gaps <= reach).float().view(-1, 1)
                    self.register_buffer(f"{name}{step}", near, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [batch, channels, *space]."""
        squares = x.square().flatten(2)
        total, count = squares.clone(), squares.shape[1]
        for step in self._steps:
            near = count - step
            before, behind = self.get_buffer(f"before{step}"), self.get_buffer(f"behind{step}")
            total[:, step:].addcmul_(squares[:, :near], before)
            if step <= self.window.behind:
                total[:, :near].addcmul_(squares[:, step:], behind)
        return self.window.scaled(x, total.view_as(x))

    def without(self, keep: list[int]) -> "PlacedNorm":
        """The norm of these of its channels."""
        return PlacedNorm(self.window, [self.places[channel] for channel in keep])


NORMS = (nn.LocalResponseNorm, PlacedNorm)


def placed_norm(node: fx.Node, module: nn.Module | None, channels: int) -> PlacedNorm:
    """The norm that a node calls, with every channel in its place."""
    if isinstance(module, PlacedNorm):
        return module
    everywhere = list(range(channels))
    if isinstance(module, nn.LocalResponseNorm):
        window = Window(module.size, module.alpha, module.beta, module.k)
        return PlacedNorm(window, everywhere)
    names = ("input", "size", "alpha", "beta", "k")
    settings: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    settings.pop("input", None)
    settings.pop("x", None)
    known = (local_response_norm, nn.functional.local_response_norm)
    assert node.target in known
    return PlacedNorm(Window(**settings), everywhere)


# Where a channel must stay for a layer behind, as in a group norm or a sum in which
# others are on, its convolution need not be calculated all the same.
@final
class Refilled(nn.Module):
    """Channels in the places where they were, constants between.

    Parameters
    ----------
    places : list of int
        Place of each channel that comes in, ascending.
    constant : Tensor
        What stands in the other places, [all channels].
    """

    constants: Tensor
    spread: Tensor

    def __init__(self, places: list[int], constant: Tensor) -> None:
        super().__init__()
        filled = constant.clone()
        filled[places] = 0.0
        values, which = torch.unique(filled, return_inverse=True)
        spread = which + len(places)  # the constants follow the channels
        spread[places] = torch.arange(len(places))
        self.register_buffer("constants", values, persistent=False)
        self.register_buffer("spread", spread, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """All of [batch, channels, *space]."""
        constants = self.constants.view(-1, *[1] * (x.dim() - 2))
        between = constants.expand(x.shape[0], -1, *x.shape[2:])
        return torch.cat([x, between], 1).index_select(1, self.spread)
