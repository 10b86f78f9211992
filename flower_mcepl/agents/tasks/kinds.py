"""The built-in tasks: losses of torch, metrics of torchmetrics, checks of targets."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flower_mcepl.agents.tasks.network import described
from flower_mcepl.agents.tasks.task import Metric, Task
from flower_mcepl.errors import ConfigError, DataError

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
IGNORED_TOKEN = -100  # as of Transformers and torch
IGNORED_PIXEL = 255  # as of Pascal VOC and Cityscapes
FRACTION = "fraction"

Pair = tuple[Tensor, Tensor]  # outputs and targets


# --- metrics ---


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
    **options
        Its other parameters.
    """

    def __init__(
        self, name: str, shape: Callable[[Tensor, Tensor], Pair], size: str = "", **options: Any
    ) -> None:
        self.name, self.shape, self.size, self.options = name, shape, size, options
        self.metric: Metric | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch."""
        outputs, targets = self.shape(outputs, targets)
        if self.metric is None:
            size = {self.size: outputs.shape[1]} if self.size else {}
            self.metric = _load(self.name)(**size, **self.options)
        self.metric.update(outputs, targets)

    def compute(self) -> float:
        """Return the metric of all batches; not a number where it is not defined."""
        if self.metric is None:
            return float("nan")
        try:
            return float(self.metric.compute())
        except ValueError:  # such as R² of a single example
            return float("nan")


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


def _metric(
    name: str, shape: Callable[[Tensor, Tensor], Pair], size: str = "", **options: Any
) -> Callable[[], Metric]:
    return partial(OfTorchmetrics, name, shape, size, **options)


def _as_is(outputs: Tensor, targets: Tensor) -> Pair:
    return outputs, targets


def _probabilities(outputs: Tensor, targets: Tensor) -> Pair:
    return outputs.sigmoid(), targets.long()


def _by_token(outputs: Tensor, targets: Tensor) -> Pair:
    return outputs.flatten(0, 1), targets.flatten()


def _flat(outputs: Tensor, targets: Tensor) -> Pair:
    return outputs.flatten(), targets.flatten()


# --- targets ---


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _must(holds: bool, rule: str, outputs: Tensor, targets: Tensor, way_out: str) -> None:
    """Refuse a batch, with what came."""
    if not holds:
        raise DataError(
            f"{rule}; got outputs {_shape(outputs)} and targets {described(targets)}. {way_out}"
        )


def _floats(outputs: Tensor, targets: Tensor) -> None:
    rule = "a network's outputs must be floats"
    _must(outputs.is_floating_point(), rule, outputs, targets, "Return logits, not classes.")


def _in_classes(
    outputs: Tensor, targets: Tensor, *, num_classes: int, ignored: int | None = None
) -> Tensor:
    """Targets as whole numbers 0..C-1, and ``ignored`` ones where the task has some."""
    rule = f"targets must be whole numbers in 0..{num_classes - 1}, one class an output"
    floats = "Pass labels.long() where they are classes; numbers to predict are task regression."
    _must(targets.dtype in WHOLE, rule, outputs, targets, floats)
    targets = targets.long()
    counted = targets if ignored is None else targets[targets != ignored]
    low = int(counted.min()) if counted.numel() else 0
    high = int(counted.max()) if counted.numel() else 0
    way_out = "Number the classes from 0, and give the network an output for each."
    if low == 1 and high == num_classes:
        way_out = "Labels that count from 1: subtract 1."
    if low < 0 and ignored is None:
        way_out = "Leave out examples that are to be ignored, and number the classes from 0."
    _must(0 <= low and high < num_classes, rule, outputs, targets, way_out)
    return targets


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """One class an example: outputs [B, C], targets [B] or [B, 1]."""
    _floats(outputs, targets)
    rule = "outputs must be [B, C] with C >= 2, a logit for each class, and targets [B]"
    if outputs.ndim == 1 and outputs.numel() > 1 and targets.numel() == 1:
        way_out = "The network drops the dimension of the batch: squeeze() takes the last one only."
    elif outputs.ndim > 2:
        way_out = "A class for each pixel is task segmentation, one for each position task tokens."
    else:
        way_out = "One output is task binary (yes or no) or regression (a number)."
    _must(outputs.ndim == 2 and outputs.shape[1] > 1, rule, outputs, targets, way_out)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    one_hot = "One-hot labels become classes by labels.argmax(1); several at once: multilabel."
    _must(targets.shape == outputs.shape[:1], rule, outputs, targets, one_hot)
    return _in_classes(outputs, targets, num_classes=outputs.shape[1])


def _zeros_and_ones(outputs: Tensor, targets: Tensor) -> Tensor:
    rule = "targets must be 0 or 1"
    known = (targets == 0) | (targets == 1)
    way_out = "Labels -1 and 1 become (labels > 0); other classes are task classification."
    _must(bool(known.all()), rule, outputs, targets, way_out)
    return targets.to(outputs.dtype)


def _like_outputs(outputs: Tensor, targets: Tensor, rule: str, way_out: str) -> Tensor:
    """Targets of the outputs' shape; a dimension of one at the end does not matter."""
    _floats(outputs, targets)
    if outputs.shape[-1:] == (1,) and targets.shape == outputs.shape[:-1]:
        targets = targets[..., None]
    if targets.shape[-1:] == (1,) and outputs.shape == targets.shape[:-1]:
        targets = targets[..., 0]
    _must(targets.shape == outputs.shape, rule, outputs, targets, way_out)
    return targets


def yes_or_no(outputs: Tensor, targets: Tensor) -> Tensor:
    """One logit an example: outputs [B] or [B, 1], targets likewise, 0 or 1."""
    rule = "outputs must be one logit an example, [B] or [B, 1], and targets 0 or 1 of each"
    way_out = "Two outputs are task classification, several labels at once multilabel."
    targets = _like_outputs(outputs, targets, rule, way_out)
    _must(outputs.numel() == len(outputs), rule, outputs, targets, way_out)
    return _zeros_and_ones(outputs, targets)


def labels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Several labels an example: outputs [B, L], targets [B, L], 0 or 1."""
    rule = "outputs must be [B, L] with L >= 2, a logit for each label, and targets 0 or 1 of each"
    way_out = "One label is task binary, one of several classes task classification."
    targets = _like_outputs(outputs, targets, rule, way_out)
    _must(outputs.ndim == 2 and outputs.shape[1] > 1, rule, outputs, targets, way_out)
    return _zeros_and_ones(outputs, targets)


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    """Numbers: outputs [B], [B, 1] or [B, D], targets likewise, finite."""
    rule = "outputs and targets must be of one shape, [B], [B, 1] or [B, D]"
    way_out = "Give the network an output for each number to predict."
    targets = _like_outputs(outputs, targets, rule, way_out).to(outputs.dtype)
    finite = "Remove examples whose number is missing."
    _must(bool(targets.isfinite().all()), "targets must be finite", outputs, targets, finite)
    return targets


def pixels(outputs: Tensor, targets: Tensor) -> Tensor:
    """A class a pixel: outputs [B, C, H, W], targets [B, H, W] or [B, 1, H, W]."""
    _floats(outputs, targets)
    rule = "outputs must be [B, C, ...] with C >= 2, and targets the same without C"
    if targets.ndim == outputs.ndim and targets.shape[1] == 1:
        targets = targets[:, 0]
    fits = outputs.ndim > 2 and outputs.shape[1] > 1
    fits = fits and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    way_out = "One class for a whole image is task classification."
    _must(fits, rule, outputs, targets, way_out)
    return _in_classes(outputs, targets, num_classes=outputs.shape[1], ignored=IGNORED_PIXEL)


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """A class for each position: outputs [B, T, C], targets [B, T]."""
    _floats(outputs, targets)
    rule = "outputs must be [B, T, C] with C >= 2, and targets [B, T]"
    fits = outputs.ndim == 3 and outputs.shape[2] > 1 and targets.shape == outputs.shape[:2]
    way_out = "One class for a whole text is task classification."
    _must(fits, rule, outputs, targets, way_out)
    return _in_classes(outputs, targets, num_classes=outputs.shape[2], ignored=IGNORED_TOKEN)


# --- losses ---


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    flat = (outputs.flatten(0, 1), targets.flatten())
    return _mean(
        functional.cross_entropy(*flat, ignore_index=IGNORED_TOKEN, reduction="sum"),
        _not(IGNORED_TOKEN, targets),
    )


def _pixel_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    total = functional.cross_entropy(outputs, targets, ignore_index=IGNORED_PIXEL, reduction="sum")
    return _mean(total, _not(IGNORED_PIXEL, targets))


def _mean(total: Tensor, count: int) -> Tensor:
    """Mean over what counts; zero, with a gradient of zero, where nothing does."""
    return total / max(count, 1)


def _not(ignored: int, targets: Tensor) -> int:
    return int((targets != ignored).sum())


# --- the tasks ---


CLASSIFICATION = Task(
    name="classification",
    loss=functional.cross_entropy,
    total_loss=partial(functional.cross_entropy, reduction="sum"),
    metrics={"accuracy": Accuracy},
    main="accuracy",
    higher_is_better=True,
    unit=FRACTION,
    targets=classes,
)

BINARY = Task(
    name="binary",
    loss=functional.binary_cross_entropy_with_logits,
    metrics={
        "accuracy": _metric("classification.BinaryAccuracy", _probabilities),
        "f1": _metric("classification.BinaryF1Score", _probabilities),
        "auroc": _metric("classification.BinaryAUROC", _probabilities),
    },
    main="accuracy",
    higher_is_better=True,
    unit=FRACTION,
    targets=yes_or_no,
)

MULTILABEL = Task(
    name="multilabel",
    loss=functional.binary_cross_entropy_with_logits,
    metrics={
        "f1": _metric(
            "classification.MultilabelF1Score", _probabilities, "num_labels", average="micro"
        ),
        "label-accuracy": _metric(
            "classification.MultilabelAccuracy", _probabilities, "num_labels", average="micro"
        ),
    },
    main="f1",
    higher_is_better=True,
    unit=FRACTION,
    targets=labels,
)

REGRESSION = Task(
    name="regression",
    loss=functional.mse_loss,
    metrics={
        "rmse": _metric("regression.MeanSquaredError", _flat, squared=False),
        "mae": _metric("regression.MeanAbsoluteError", _flat),
        "r2": _metric("regression.R2Score", _flat),
    },
    main="rmse",
    higher_is_better=False,
    targets=numbers,
)

SEGMENTATION = Task(
    name="segmentation",
    loss=_pixel_loss,
    metrics={
        "iou": _metric(
            "classification.MulticlassJaccardIndex",
            _as_is,
            "num_classes",
            ignore_index=IGNORED_PIXEL,
        ),
        "pixel-accuracy": _metric(
            "classification.MulticlassAccuracy",
            _as_is,
            "num_classes",
            average="micro",
            ignore_index=IGNORED_PIXEL,
        ),
    },
    main="iou",
    higher_is_better=True,
    unit=FRACTION,
    targets=pixels,
    counted=partial(_not, IGNORED_PIXEL),
)

TOKENS = Task(
    name="tokens",
    loss=_token_loss,
    metrics={
        "token-accuracy": _metric(
            "classification.MulticlassAccuracy",
            _by_token,
            "num_classes",
            average="micro",
            ignore_index=IGNORED_TOKEN,
        ),
    },
    main="token-accuracy",
    higher_is_better=True,
    unit=FRACTION,
    targets=tokens,
    counted=partial(_not, IGNORED_TOKEN),
)
