"""Layers that no gradient reaches: they are trained, and sent, in vain."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.parts.training import without_gradient
from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.layers import NAMED
from flower_mcepl.masks.model import MUCH_FROZEN
from flower_mcepl.masks.placement import train_mode

_WAY_OUT = (
    "Let forward call these layers through self, outside of torch.no_grad() and without detach() "
    "or numpy(). A forward that is set from outside must be a method of the network "
    "(types.MethodType), as networks are copied."
)


def check_learns(
    network: nn.Module,
    learned: Mapping[str, Tensor],
    loss: Callable[[nn.Module], Tensor],
    *,
    whose: str,
    frozen: tuple[str, ...] = (),
) -> None:
    """Refuse a network of which nothing learns; warn of one of which much does not.

    Parameters
    ----------
    network : nn.Module
        It stays as it is.
    learned : mapping
        Those of its parameters that are to learn, by their names for the user.
    loss : callable
        Gives the loss of a network for a batch.
    whose : str
        Whose network it is, for the error.
    frozen : tuple of str
        Submodules that training leaves in eval mode (default: none).

    Raises
    ------
    UnsupportedLayerError
        If no gradient of the loss reaches any of them.
    """
    copies: dict[int, Any] = {}
    trained = own_copy(network, copies)
    tensors = {name: copies[id(tensor)].requires_grad_() for name, tensor in learned.items()}
    train_mode(trained, frozen)
    with torch.enable_grad():
        idle = without_gradient(loss(trained), tensors)
    share = _size(tensors, idle) / _size(tensors, tensors)
    if share <= MUCH_FROZEN:
        return
    names = ", ".join(idle[:NAMED]) + (", ..." if len(idle) > NAMED else "")
    if len(idle) == len(tensors):
        raise UnsupportedLayerError(
            f"{whose} must learn from its loss, but no gradient of a batch reaches any of its "
            f"weights: {names}. {_WAY_OUT}"
        )
    warnings.warn(
        f"no gradient of a batch reaches {share:.0%} of the weights that are to learn, which so "
        f"stay as they were drawn: {names}. {_WAY_OUT}",
        stacklevel=1,  # one line for all agents: it is shown once
    )


def _size(tensors: Mapping[str, Tensor], names: Any) -> int:
    return sum(math.prod(tensors[name].shape) for name in names)
