"""Metrics of the built-in tasks: those of torchmetrics, where they are defined."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flower_mcepl.agents.tasks.tally import Metric
from flower_mcepl.errors import ConfigError

Pair = tuple[Tensor, Tensor]  # outputs and targets


class Accuracy:
    """Share of examples whose largest output is that of their class.

    Counted exactly, and without torchmetrics, whose import takes seconds of every
    message that a device answers.
    """

    def __init__(self) -> None:
        self.correct = self.seen = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count one batch, [B, C] against [B]."""
        self.correct += int((outputs.argmax(dim=1) == targets).sum())
        self.seen += len(targets)

    def compute(self) -> float:
        """Return the share, in 0..1."""
        return self.correct / self.seen


@dataclass(frozen=True)
class Needs:
    """What a split must have for a metric of it to be defined.

    Parameters
    ----------
    values : callable
        Values of a batch that count, from outputs and targets as the metric takes them.
    hold : callable
        Whether it is defined, from the lowest and the highest of them in the split.
    """

    values: Callable[[Tensor, Tensor], Tensor]
    hold: Callable[[float, float], bool]


def _targets(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets


def _positives(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.maximum((outputs > 0.5).to(targets.dtype), targets)


DIFFERENT_TARGETS = Needs(_targets, operator.lt)  # of two classes both
A_POSITIVE = Needs(_positives, lambda low, high: high > 0)  # in targets or predictions


class OfTorchmetrics:
    """Metric of torchmetrics, loaded and made when the first batch is there.

    Parameters
    ----------
    name : str
        Its path in torchmetrics, such as ``"regression.R2Score"``.
    shape : callable
        Brings outputs and targets of the task to what the metric takes.
    size : str (default: none)
        Parameter that is the number of classes or labels, which the outputs tell.
    needs : Needs, optional
        On what it is defined, where torchmetrics gives 0 otherwise.
    **options
        Its other parameters.
    """

    def __init__(
        self,
        name: str,
        shape: Callable[[Tensor, Tensor], Pair],
        size: str = "",
        needs: Needs | None = None,
        **options: Any,
    ) -> None:
        self.name, self.shape, self.size, self.options = name, shape, size, options
        self.needs, self.low, self.high = needs, math.inf, -math.inf
        self.metric: Metric | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch."""
        outputs, targets = self.shape(outputs, targets)
        if self.metric is None:
            size = {self.size: outputs.shape[1]} if self.size else {}
            self.metric = _load(self.name)(**size, **self.options)
        if self.needs is not None:
            low, high = self.needs.values(outputs, targets).aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.metric.update(outputs, targets)

    def compute(self) -> float:
        """Return the metric of all batches; not a number where it is not defined."""
        undefined = self.needs is not None and not self.needs.hold(self.low, self.high)
        if self.metric is None or undefined:
            return math.nan
        return float(self.metric.compute())


def _load(name: str) -> Callable[..., Metric]:
    """Class of torchmetrics by its path."""
    try:
        import torchmetrics
    except ImportError as error:
        raise ConfigError(
            f"this task's metrics need torchmetrics, which cannot be imported ({error}). "
            "pip install torchmetrics"
        ) from error
    value: Any = torchmetrics
    for part in name.split("."):
        value = getattr(value, part)
    make: Callable[..., Metric] = value
    return make


def metric(
    name: str,
    shape: Callable[[Tensor, Tensor], Pair],
    size: str = "",
    needs: Needs | None = None,
    **options: Any,
) -> Callable[[], Metric]:
    """What makes a fresh `OfTorchmetrics` for each evaluation."""
    return partial(OfTorchmetrics, name, shape, size, needs, **options)


def as_is(outputs: Tensor, targets: Tensor) -> Pair:
    """Outputs and targets as the task has them."""
    return outputs, targets


def probabilities(outputs: Tensor, targets: Tensor) -> Pair:
    """Probabilities of logits, and targets as whole numbers."""
    return outputs.sigmoid(), targets.long()


def by_token(outputs: Tensor, targets: Tensor) -> Pair:
    """Every position of a text as an example."""
    return outputs.flatten(0, 1), targets.flatten()


def flat(outputs: Tensor, targets: Tensor) -> Pair:
    """Every number as an example."""
    return outputs.flatten(), targets.flatten()
