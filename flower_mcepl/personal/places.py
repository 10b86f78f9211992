"""Local response norm over channels some of which are gone."""

import itertools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from flower_mcepl.models import local_response_norm


# The norm of a channel sums squares over a window of channels around it. Where some are
# gone, the others must stand as far from each other as before: a channel that is 0 adds
# nothing, but keeps its neighbors apart. Two channels further apart than the window
# reaches do not see each other, however far, so longer gaps may be cut to that.
@final
class PlacedNorm(nn.Module):
    """A local response norm whose channels stand at given places, zeros between.

    Parameters
    ----------
    norm : callable
        The norm as it was, over all places.
    places : list of int
        Place of each channel, ascending.
    reach : int
        How far a channel's window reaches to either side.
    """

    spread: Tensor
    places: Tensor

    def __init__(self, norm: Callable[[Tensor], Tensor], places: list[int], reach: int) -> None:
        super().__init__()
        self.norm, self.reach = norm, reach
        near = [0]
        for before, after in itertools.pairwise(places):
            near.append(near[-1] + min(after - before, reach + 1))
        spread = torch.full((near[-1] + 1,), len(places))  # the channel of zeros
        spread[near] = torch.arange(len(places))
        self.register_buffer("places", torch.tensor(near), persistent=False)
        self.register_buffer("spread", spread, persistent=False)

    @property
    def dense(self) -> bool:
        """Whether no place is empty."""
        return len(self.spread) == len(self.places)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [batch, channels, *space]."""
        if self.dense:
            return self.norm(x)
        padded = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        return self.norm(padded.index_select(1, self.spread)).index_select(1, self.places)

    def without(self, keep: list[int]) -> "PlacedNorm":
        """The norm of these of its channels."""
        return PlacedNorm(self.norm, self.places[keep].tolist(), self.reach)


@final
class _Norm(nn.Module):
    """A local response norm as a graph calls it."""

    def __init__(self, function: Callable[..., Tensor], settings: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, x: Tensor) -> Tensor:
        """Norm of [batch, channels, *space]."""
        return self.function(x, **self.settings)


NORMS = (nn.LocalResponseNorm, PlacedNorm)


def placed_norm(node: fx.Node, module: nn.Module | None, channels: int) -> PlacedNorm:
    """The norm that a node calls, with every channel in its place."""
    if isinstance(module, PlacedNorm):
        return module
    everywhere = list(range(channels))
    if isinstance(module, nn.LocalResponseNorm):
        return PlacedNorm(module, everywhere, module.size // 2)
    names = ("input", "size", "alpha", "beta", "k")
    settings = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    settings.pop("input", None)
    settings.pop("x", None)
    function = node.target
    assert callable(function)
    assert function is local_response_norm or function is nn.functional.local_response_norm
    size = settings["size"]
    assert isinstance(size, int)
    return PlacedNorm(_Norm(function, settings), everywhere, size // 2)
