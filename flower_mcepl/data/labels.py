"""Labels of a split without drawing all of its examples, and their number by class."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from flower_mcepl.data.pairs import LABEL_COLUMNS
from flower_mcepl.streams import isolated_rng

ClassCounts = dict[int, int]
"""Number of examples by class."""

MOST_CLASSES = 100  # more of them are not counted: no table or picture of them could be read
DRAWN = 2000  # examples up to which all are drawn to be counted
COMPARED = 8  # examples that are drawn to see whether they have the labels beside them


def count_by_class(labels: Any) -> ClassCounts | None:
    """Number of examples by class; None unless each label is one whole number."""
    labels = _array(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        return None
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > MOST_CLASSES:
        return None
    return {int(name): int(count) for name, count in zip(classes, counts, strict=True)}


def labels_in_memory(dataset: Any) -> "np.ndarray[Any, Any] | None":
    """Labels of torch's own datasets over two tensors: they are what is drawn.

    A class that is derived from one may draw something else.
    """
    if type(dataset) is TensorDataset:
        return _array(dataset.tensors[1]) if len(dataset.tensors) == 2 else None
    if type(dataset) is Subset:
        whole = labels_in_memory(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if type(dataset) is ConcatDataset:
        parts = [labels_in_memory(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    return None


# Labels beside the examples may be those of a whole of which the dataset shows a part,
# or from before a transform. So they count only where examples drawn here and there
# have them, too. What transforms draw for it comes from a stream of its own.
def labels_beside(
    dataset: Any, drawn: Callable[[list[int]], Tensor]
) -> "np.ndarray[Any, Any] | None":
    """Labels that a dataset has beside its examples, if they are the examples' own.

    ``drawn(indices)`` are the labels of examples that are drawn; up to `COMPARED` of
    them, spread over the whole, must be the same. Where they are others, all are drawn
    of a dataset of up to `DRAWN` examples.
    """
    with isolated_rng(0, "class-counts"):
        try:
            labels = _handed(dataset)
            if labels is None and not hasattr(dataset, "targets"):
                return None
            if labels is not None and _are_of(dataset, labels, drawn):
                return labels
            return _classes(drawn([*range(len(dataset))])) if len(dataset) <= DRAWN else None
        except Exception:  # of other people's code; it comes again where examples are used
            return None


def _are_of(
    dataset: Any, labels: "np.ndarray[Any, Any]", drawn: Callable[[list[int]], Tensor]
) -> bool:
    if labels.ndim != 1 or len(labels) != len(dataset) or labels.dtype.kind not in "iub":
        return False
    places = np.unique(np.linspace(0, len(labels) - 1, COMPARED).astype(np.int64))
    learned = _array(drawn(places.tolist())).reshape(-1)
    return np.array_equal(labels[places], learned)


def _classes(labels: Any) -> "np.ndarray[Any, Any] | None":
    array = _array(labels).reshape(-1)
    return array if array.dtype.kind in "iub" else None


def _handed(dataset: Any) -> "np.ndarray[Any, Any] | None":
    if isinstance(dataset, Subset):
        whole = _handed(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_handed(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if type(dataset) is TensorDataset:
        return labels_in_memory(dataset)
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):  # of Hugging Face
        names = [name for name in LABEL_COLUMNS if name in dataset.column_names]
        return np.asarray(dataset.with_format(None)[names[0]][:]) if len(names) == 1 else None
    targets = getattr(dataset, "targets", None)  # of torchvision
    if targets is None or len(targets) != len(dataset):
        return None
    transform = getattr(dataset, "target_transform", None)
    labels = _array(targets)
    return labels if transform is None else np.asarray([transform(y) for y in labels.tolist()])


def _array(labels: Any) -> "np.ndarray[Any, Any]":
    if not isinstance(labels, Tensor):
        return np.asarray(labels)
    here = labels.detach().cpu()  # NumPy has no bfloat16
    return (here.float() if here.dtype is torch.bfloat16 else here).numpy()
