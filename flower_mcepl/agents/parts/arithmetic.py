"""Classes of arithmetic: exact bits, or a faster step whose bits differ a little."""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.parts import winograd

EXACT, FAST, BFLOAT16 = "exact", "fast", "bfloat16"
ARITHMETICS = (EXACT, FAST, BFLOAT16)

# glibc's own names and limits, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_KEPT = 2**30  # free memory that a process keeps, in bytes

_TORCHS_ELU = nn.functional.elu


@contextlib.contextmanager
def arithmetic(kind: str, *, device: str) -> Iterator[None]:
    """Run a network in one class of arithmetic, whatever modules it is made of.

    What is replaced are the functions that layers call in ``torch.nn.functional``;
    functions that a network has imported from there by name stay torch's.

    "exact"
        torch's own functions, in the network's dtype.
    "fast"
        The same functions in the same dtype, summed in another order: images and
        filters in channels-last memory, convolutions of 5 x 5 by `winograd`, ELU as
        ``exp(min(x, 0)) - 1 + max(x, 0)`` (within 1.2e-7 of torch's).
    "bfloat16"
        As "fast", with matrix products and convolutions in bfloat16 (torch.autocast).
        Faster only where the processor has bfloat16 instructions.

    Within a class the same bits come out in any process and on any number of workers;
    between classes they differ in the last places, and so do masks after some rounds.

    Parameters
    ----------
    kind : str
        One of `ARITHMETICS`.
    device : str
        Where the network is.
    """
    if kind == EXACT:
        yield
        return
    with contextlib.ExitStack() as stack:
        if kind == BFLOAT16:
            stack.enter_context(torch.autocast(torch.device(device).type, torch.bfloat16))
        conv2d = partial(_conv2d, minimal=kind == FAST)
        stack.enter_context(_in_place_of({"elu": _elu, "conv2d": conv2d}))
        yield


# Functions are put into torch.nn.functional, where layers look them up, because a
# TorchFunctionMode is left during a backward pass, in which checkpointed layers are
# called once more. Training and evaluation run alone in their process (`streams`).
@contextlib.contextmanager
def _in_place_of(replacements: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    before = {name: getattr(nn.functional, name) for name in replacements}
    try:
        for name, function in replacements.items():
            setattr(nn.functional, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.functional, name, function)


def _elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    if inplace or not x.is_floating_point():
        return _TORCHS_ELU(x, alpha, inplace)
    result: Tensor = _Elu.apply(x, alpha)
    return result


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        y = x.clamp_max(0).exp_().sub_(1)
        if alpha != 1:
            y.mul_(alpha)
        y.add_(x.clamp_min(0))
        ctx.save_for_backward(y)
        ctx.alpha = alpha
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        gradient: Tensor = torch.ops.aten.elu_backward(grads[0], ctx.alpha, 1, 1, True, y)
        return gradient, None


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    minimal: bool,
) -> Tensor:
    """Convolve in channels-last memory; if ``minimal``, by `winograd` where it fits."""
    if (
        minimal
        and not isinstance(padding, str)
        and winograd.fits(input, weight, stride=stride, dilation=dilation, groups=groups)
    ):
        pair = (padding, padding) if isinstance(padding, int) else tuple(padding)
        y = winograd.conv5(input, weight, padding=pair)
        return y if bias is None else y + bias.view(-1, 1, 1)
    if input.ndim == 4:
        input = input.contiguous(memory_format=torch.channels_last)
        weight = _ChannelsLast.apply(weight)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


# Steps, scores and masks are in the weights' own order of memory, and to walk through
# two orders at once takes several times as long as to copy the gradient.
class _ChannelsLast(torch.autograd.Function):
    """Filters in channels-last memory; their gradient comes in C order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        gradient: Tensor = grads[0].contiguous()
        return gradient


# A training step takes and frees some hundred megabytes of activations. glibc gives
# large pieces back to the system at once, and the next step faults them in again, page
# by page.
@lru_cache
def keep_freed_memory() -> bool:
    """Let this process keep what a step frees for the next; False without glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT)
    )
