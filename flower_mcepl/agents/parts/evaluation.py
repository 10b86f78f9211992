"""Evaluation of an ordinary classifier on one split."""

import torch
from torch import nn

from flower_mcepl.data.batches import BatchSource
from flower_mcepl.errors import DataError


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, split: BatchSource, *, batch_size: int, device: str
) -> dict[str, float]:
    """Accuracy and mean cross-entropy over a split, and its ``num-examples``."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for inputs, labels in split.evaluation_batches(batch_size=batch_size):
        logits, labels = model(inputs.to(device)), labels.to(device)
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(dim=1) == labels).sum())
        seen += len(labels)
    if not seen:
        raise DataError(
            "a test split gave no batch: evaluation_batches must yield every example once."
        )
    return {"accuracy": correct / seen, "loss": loss / seen, "num-examples": seen}
