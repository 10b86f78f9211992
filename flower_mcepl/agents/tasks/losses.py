"""What a task's loss must be: the mean over a batch, of outputs with their targets."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flower_mcepl.agents.tasks.network import described

Loss = Callable[[Tensor, Tensor], Any]

_FEW = 8  # examples of a batch that are enough to tell a sum from a mean


def flaw_of(loss: Loss, outputs: Tensor, targets: Tensor) -> str:
    """Why a loss is no mean over a batch, and the way out; "" where it is one.

    A loss that fails raises what it raises.
    """
    value = loss(outputs, targets)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        return (
            "a task's loss must be one float, the mean over a batch, as a tensor without "
            f'dimensions; got {described(value)}. Let it end in .mean(), or pass reduction="mean".'
        )
    if _mixes_examples(loss, outputs, targets):
        return (
            "a task's loss must compare each output with its own target; outputs "
            f"{[*outputs.shape]} and targets {[*targets.shape]} it compares all with all, as torch "
            "broadcasts them. Let the network end in squeeze(-1), or the task's targets= return "
            "targets.view_as(outputs)."
        )
    if _is_sum(loss, outputs, targets):
        return (
            "a task's loss must be the mean over a batch; it is twice as large where a batch holds "
            'all examples twice. Pass reduction="mean", or divide it by len(targets).'
        )
    return ""


def _is_sum(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    once = outputs[:_FEW], targets[:_FEW]
    values = [_value(loss, *(torch.cat([part] * times) for part in once)) for times in (1, 2)]
    return values[0] != 0 and math.isclose(values[1], 2 * values[0], rel_tol=1e-4)


def _mixes_examples(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    """Whether all outputs meet all targets, as of [B, 1] and [B]."""
    alike = outputs.shape == targets.shape or outputs.numel() != targets.numel()
    if alike or len(targets) < 2:
        return False
    last = 1.0 if targets.is_floating_point() else targets.numel() - 1.0
    steps = torch.linspace(0, last, targets.numel(), device=outputs.device)
    given = steps.to(outputs.dtype).view_as(outputs)
    own = steps.to(targets.dtype).view_as(targets)
    values = [_value(loss, given, each) for each in (own, own.roll(1, 0))]
    return values[0] != 0 and math.isclose(*values, rel_tol=1e-4)


def _value(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Value for a batch that is made up; not a number where it cannot take it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own of such shapes
        try:
            return float(loss(outputs, targets))
        except Exception:  # whatever a user's loss raises
            return math.nan
