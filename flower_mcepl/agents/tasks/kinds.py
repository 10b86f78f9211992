"""The built-in tasks: losses of torch, metrics, checks of targets."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flower_mcepl.agents.tasks.metrics import (
    A_POSITIVE,
    DIFFERENT_TARGETS,
    Accuracy,
    as_is,
    by_token,
    flat,
    metric,
    probabilities,
)
from flower_mcepl.agents.tasks.network import described
from flower_mcepl.agents.tasks.task import Task
from flower_mcepl.errors import DataError

WHOLE = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),  # of a source of one's own
)
IGNORED_TOKEN = -100  # as of Transformers and torch
IGNORED_PIXEL = 255  # as of Pascal VOC and Cityscapes
FRACTION = "fraction"
SQUEEZED = (
    "Of a batch of one example the network drops the dimension of the batch: let its forward end "
    "in squeeze(-1) or flatten(1), not in squeeze()."
)


# --- targets ---


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _must(holds: bool, rule: str, outputs: Tensor, targets: Tensor, way_out: str) -> None:
    """Refuse a batch, with what came."""
    if not holds:
        raise DataError(
            f"{rule}; got outputs {_shape(outputs)} and targets {described(targets)}. {way_out}"
        )


def _floats_of_a_batch(outputs: Tensor, targets: Tensor, rule: str) -> None:
    of_floats = "a network's outputs must be floats"
    _must(outputs.is_floating_point(), of_floats, outputs, targets, "Return logits, not classes.")
    one = targets.ndim > 0 and len(targets) == 1
    dropped = one and (outputs.ndim == 0 or len(outputs) != 1)
    _must(not dropped, rule, outputs, targets, SQUEEZED)


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
    rule = "outputs must be [B, C] with C >= 2, a logit for each class, and targets [B]"
    _floats_of_a_batch(outputs, targets, rule)
    if outputs.ndim > 2:
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
    targets = targets.to(outputs.dtype)
    known = (targets == 0) | (targets == 1)
    way_out = "Labels -1 and 1 become (labels > 0); other classes are task classification."
    _must(bool(known.all()), rule, outputs, targets, way_out)
    return targets


def _like_outputs(outputs: Tensor, targets: Tensor, rule: str, way_out: str) -> Tensor:
    """Targets of the outputs' shape; a dimension of one at the end does not matter."""
    _floats_of_a_batch(outputs, targets, rule)
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
    rule = "outputs must be [B, C, ...] with C >= 2, and targets the same without C"
    _floats_of_a_batch(outputs, targets, rule)
    if targets.ndim == outputs.ndim and targets.shape[1] == 1:
        targets = targets[:, 0]
    fits = outputs.ndim > 2 and outputs.shape[1] > 1
    fits = fits and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    way_out = "One class for a whole image is task classification."
    _must(fits, rule, outputs, targets, way_out)
    return _in_classes(outputs, targets, num_classes=outputs.shape[1], ignored=IGNORED_PIXEL)


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """A class for each position: outputs [B, T, C], targets [B, T]."""
    rule = "outputs must be [B, T, C] with C >= 2, and targets [B, T]"
    _floats_of_a_batch(outputs, targets, rule)
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
    logits=True,
)

BINARY = Task(
    name="binary",
    loss=functional.binary_cross_entropy_with_logits,
    metrics={
        "accuracy": metric("classification.BinaryAccuracy", probabilities),
        "f1": metric("classification.BinaryF1Score", probabilities, needs=A_POSITIVE),
        "auroc": metric("classification.BinaryAUROC", probabilities, needs=DIFFERENT_TARGETS),
    },
    main="accuracy",
    higher_is_better=True,
    unit=FRACTION,
    targets=yes_or_no,
    logits=True,
)

MULTILABEL = Task(
    name="multilabel",
    loss=functional.binary_cross_entropy_with_logits,
    metrics={
        "f1": metric(
            "classification.MultilabelF1Score",
            probabilities,
            "num_labels",
            A_POSITIVE,
            average="micro",
        ),
        "label-accuracy": metric(
            "classification.MultilabelAccuracy", probabilities, "num_labels", average="micro"
        ),
    },
    main="f1",
    higher_is_better=True,
    unit=FRACTION,
    targets=labels,
    logits=True,
)

REGRESSION = Task(
    name="regression",
    loss=functional.mse_loss,
    metrics={
        "rmse": metric("regression.MeanSquaredError", flat, squared=False),
        "mae": metric("regression.MeanAbsoluteError", flat),
        "r2": metric("regression.R2Score", flat, needs=DIFFERENT_TARGETS),
    },
    main="rmse",
    higher_is_better=False,
    targets=numbers,
)

SEGMENTATION = Task(
    name="segmentation",
    loss=_pixel_loss,
    metrics={
        "iou": metric(
            "classification.MulticlassJaccardIndex",
            as_is,
            "num_classes",
            ignore_index=IGNORED_PIXEL,
        ),
        "pixel-accuracy": metric(
            "classification.MulticlassAccuracy",
            as_is,
            "num_classes",
            average="micro",
            ignore_index=IGNORED_PIXEL,
        ),
    },
    main="iou",
    higher_is_better=True,
    unit=FRACTION,
    targets=pixels,
    logits=True,
    counted=partial(_not, IGNORED_PIXEL),
)

TOKENS = Task(
    name="tokens",
    loss=_token_loss,
    metrics={
        "token-accuracy": metric(
            "classification.MulticlassAccuracy",
            by_token,
            "num_classes",
            average="micro",
            ignore_index=IGNORED_TOKEN,
        ),
    },
    main="token-accuracy",
    higher_is_better=True,
    unit=FRACTION,
    targets=tokens,
    logits=True,
    counted=partial(_not, IGNORED_TOKEN),
)
