"""Tensors of which only the channels of live filters are at hand, and their rules.

A filter that is off puts out its bias, whatever the input. So what the next layers make
of it is the same for every example of a batch, as long as no layer mixes channels, and
one example stands for all: a thin tensor is `live`, of the whole batch, and `rest`, of
one example.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from flower_mcepl.masks.channelwise import (
    AVERAGE_POOL_CALLS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    BINARY,
    DROPOUT_CALLS,
    DROPOUTS,
    ELEMENTWISE,
    ELEMENTWISE_CALLS,
    FLATTENS,
    MEANS,
    POOL_CALLS,
    POOLS,
)
from flower_mcepl.models import local_response_norm

_F = nn.functional
_CHANNELWISE = (*ELEMENTWISE, *POOLS, *AVERAGE_POOLS)
_CHANNELWISE_CALLS = ELEMENTWISE_CALLS | POOL_CALLS | AVERAGE_POOL_CALLS | BINARY
# a channel that is 0 everywhere stays so
_ZERO_KEEPING = (*DROPOUTS, nn.LocalResponseNorm)
_ZERO_KEEPING_CALLS = DROPOUT_CALLS | {_F.local_response_norm, local_response_norm}
_VIEWS = {"view", "reshape"}


@dataclass(frozen=True)
class Thin:
    """A tensor without the channels of filters that are off.

    Parameters
    ----------
    live : Tensor
        The channels that are on, of the whole batch.
    rest : Tensor
        Those that are off, of one example: [1, ...].
    on, off : Tensor
        Their places among all channels, ascending.
    axis : int
        Of the channels.
    """

    live: Tensor
    rest: Tensor
    on: Tensor
    off: Tensor
    axis: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        sizes = list(self.live.shape)
        sizes[self.axis] += self.rest.shape[self.axis]
        return torch.Size(sizes)

    @property
    def is_zero(self) -> bool:
        """Whether all that is off is 0."""
        return not bool(self.rest.any())

    def whole(self) -> Tensor:
        """The tensor with all channels."""
        tensor = self.live.new_zeros(self.shape).index_copy(self.axis, self.on, self.live)
        if self.is_zero:
            return tensor
        rest = self.rest.expand(len(self.live), *self.rest.shape[1:])
        return tensor.index_copy(self.axis, self.off, rest)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Thin":
        """What a function of single channels makes of it."""
        return replace(self, live=function(self.live), rest=function(self.rest))

    def taken_from(self, whole: Tensor) -> "Thin":
        """The same channels of another tensor, the rest by its first example."""
        live = whole.index_select(self.axis, self.on)
        rest = whole[:1].detach().index_select(self.axis, self.off)
        return replace(self, live=live, rest=rest)

    def flattened(self) -> "Thin":
        """[batch, channels * space]."""
        space = math.prod(self.live.shape[2:])
        within = torch.arange(space, device=self.on.device)
        on, off = ((places[:, None] * space + within).flatten() for places in (self.on, self.off))
        return Thin(self.live.flatten(1), self.rest.flatten(1), on, off, 1)


def called(
    function: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a layer, function or method makes of arguments some of which are thin.

    Where it treats channels alone, the result is thin; any other sees whole tensors.

    Parameters
    ----------
    function : callable
        What to call.
    target : module, callable or str
        What it is: a layer, a function, or the name of a tensor's method.
    args, kwargs : tuple, dict
        Its arguments, thin tensors among them.
    """
    thin = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Thin)]
    if not thin:
        return function(*whole(args), **whole(kwargs))
    if _reads_shape(target, args):
        return _shape(target, thin[0], args)
    # nothing but the two: an addition may have a factor, alpha
    if target in BINARY and len(thin) == 2 and args == tuple(thin) and not kwargs and _alike(*thin):
        live, rest = (function(getattr(thin[0], n), getattr(thin[1], n)) for n in ("live", "rest"))
        return replace(thin[0], live=live, rest=rest)
    others = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, (Tensor, list, tuple))]
    if len(thin) == 1 and not any(_holds_tensor(arg) for arg in others):
        result = _of_one(function, target, thin[0], args, kwargs)
        if result is not None:
            return result
    return function(*whole(args), **whole(kwargs))


def _of_one(
    function: Callable[..., Any],
    target: Any,
    x: Thin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Thin | None:
    """What a known function makes of one thin tensor; None: it is not known."""

    def on(tensor: Tensor) -> Any:
        return function(
            *(tensor if arg is x else arg for arg in args),
            **{key: tensor if arg is x else arg for key, arg in kwargs.items()},
        )

    if _is_flatten(target, x, args, kwargs):
        return x.flattened()
    if _is_one_of(target, _CHANNELWISE, _CHANNELWISE_CALLS) and not _indices(target, kwargs):
        return x.mapped(on) if _is_elementwise(target) or x.axis == 1 else None
    if _is_spatial_mean(target, x, args, kwargs):
        return x.mapped(on)
    if _is_one_of(target, BATCH_NORMS, set()):
        return x.taken_from(on(x.whole())) if x.axis == 1 else None
    if _is_one_of(target, _ZERO_KEEPING, _ZERO_KEEPING_CALLS):
        return x.taken_from(on(x.whole())) if x.is_zero else None
    return None


def whole(args: Any) -> Any:
    """Arguments in which every thin tensor is whole."""
    return fx.node.map_aggregate(args, lambda arg: arg.whole() if isinstance(arg, Thin) else arg)


def _is_one_of(target: Any, kinds: tuple[type[nn.Module], ...], calls: set[Any]) -> bool:
    # a subclass may do anything
    return type(target) in kinds if isinstance(target, nn.Module) else target in calls


def _is_elementwise(target: Any) -> bool:
    return _is_one_of(target, ELEMENTWISE, ELEMENTWISE_CALLS | BINARY)


def _indices(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a pool returns where its maxima lie, too."""
    return bool(getattr(target, "return_indices", False) or kwargs.get("return_indices"))


def _alike(one: Thin, other: Thin) -> bool:
    if one.axis != other.axis or one.shape != other.shape:
        return False
    return one.on is other.on or torch.equal(one.on, other.on)


def _holds_tensor(arg: Any) -> bool:
    seen: list[Any] = []
    fx.node.map_aggregate(arg, lambda a: seen.append(a) if isinstance(a, (Tensor, Thin)) else None)
    return bool(seen)


def _reads_shape(target: Any, args: Sequence[Any]) -> bool:
    return target == "size" or (target is getattr and args[1:] == ("shape",))


def _shape(target: Any, x: Thin, args: Sequence[Any]) -> Any:
    return x.shape[args[1]] if target == "size" and len(args) > 1 else x.shape


def _is_flatten(target: Any, x: Thin, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if x.axis != 1:
        return False
    if isinstance(target, nn.Flatten):
        return (target.start_dim, target.end_dim) == (1, -1)
    if target in FLATTENS:
        first = args[1] if len(args) > 1 else kwargs.get("start_dim", 0)
        last = args[2] if len(args) > 2 else kwargs.get("end_dim", -1)
        return (first, last) == (1, -1)
    batch, features = x.shape[0], math.prod(x.shape[1:])
    return target in _VIEWS and args[1:] in ((batch, -1), (-1, features), (batch, features))


def _is_spatial_mean(target: Any, x: Thin, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if target not in MEANS or x.axis != 1 or "dtype" in kwargs:
        return False
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    listed = [dims] if isinstance(dims, int) else dims or []
    return bool(listed) and all(d % len(x.shape) >= 2 for d in listed)
