"""Batches of an agent's splits: what it trains and evaluates on."""

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from flower_mcepl.config.checks import check
from flower_mcepl.errors import DataError

Batch = tuple[Any, Tensor]
ClassCounts = dict[int, int]
"""Number of examples by class."""

EVALUATED = ("test", "validation")  # splits that an agent can be evaluated on
MOST_CLASSES = 100  # more of them are not counted: no table or picture of them could be read


@runtime_checkable
class BatchSource(Protocol):
    """Split that yields batches ``(inputs, labels)``, in an order of its own."""

    num_examples: int

    def training_batches(
        self, *, round: int, steps: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Batches of one round; every random choice comes from ``generator``."""
        ...

    def evaluation_batches(self, *, batch_size: int) -> Iterator[Batch]:
        """Yield every example once, in a fixed order."""
        ...


@dataclass(frozen=True)
class AgentData:
    """The splits of one agent, all from its own distribution."""

    train: BatchSource
    test: BatchSource  # what the agent is evaluated on
    evaluated: str = "test"  # which split that is, one of EVALUATED
    # by split, where labels are cheap to know
    class_counts: Mapping[str, ClassCounts] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        train: object,
        test: object,
        *,
        agent: int,
        validation: object = None,
        evaluate_on: str = "test",
    ) -> "AgentData":
        """Make the splits of ``agent`` from what a data function may return.

        Each split is a pair of tensors ``(inputs, labels)``, a map-style dataset, a
        DataLoader (its data set and ``collate_fn`` are used; batches are drawn by the
        agent's own stream with the configured batch size), or a `BatchSource`.

        Parameters
        ----------
        train, test : split
            What the agent learns from; what it is evaluated on in the end.
        agent : int
            Number of the agent, for errors.
        validation : split, optional
            What it is evaluated on instead where ``evaluate_on`` is ``"validation"``,
            as while settings are chosen (default: None).
        evaluate_on : str
            ``"test"`` or ``"validation"`` (default: ``"test"``). The other split is
            only counted.

        Raises
        ------
        DataError
            If a split that is used is empty or of another type, or the validation split
            is asked for and missing.
        ConfigError
            If ``evaluate_on`` is neither.
        """
        check(
            evaluate_on in EVALUATED,
            f"evaluate-on must be one of {', '.join(EVALUATED)}",
            evaluate_on,
        )
        splits = {"train": train, "validation": validation, "test": test}
        if splits[evaluate_on] is None:
            raise DataError(
                f"evaluate-on is {evaluate_on!r}, but agent {agent} has no {evaluate_on} split. "
                "Let the data function return (train, validation, test) with one, or evaluate on "
                "the other split."
            )
        sources = (
            _source(train, f"agent {agent}'s training"),
            _source(splits[evaluate_on], f"agent {agent}'s {evaluate_on}"),
        )
        counted = {name: class_counts(split) for name, split in splits.items() if split is not None}
        return cls(
            *sources,
            evaluate_on,
            {name: counts for name, counts in counted.items() if counts is not None},
        )


def class_counts(split: object) -> ClassCounts | None:
    """Number of examples by class; None where that would mean drawing examples.

    Known are the labels of two tensors, of a TensorDataset of two, of a dataset with
    ``targets`` or a column ``label`` or ``labels``, and of a Subset of or a DataLoader
    over one of these; they must be whole numbers, one an example, and of at most
    `MOST_CLASSES` classes.
    """
    try:
        labels = _labels(split)
    except (TypeError, ValueError, RuntimeError):  # ragged labels, or such as NumPy does not know
        return None
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iub":
        return None
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > MOST_CLASSES:
        return None
    return {int(name): int(count) for name, count in zip(classes, counts, strict=True)}


def _labels(split: Any) -> "np.ndarray[Any, Any] | None":
    if isinstance(split, DataLoader):
        return _labels(split.dataset)
    if isinstance(split, Subset):
        whole = _labels(split.dataset)
        return None if whole is None else whole[np.asarray(split.indices, dtype=np.int64)]
    if isinstance(split, TensorDataset):
        split = split.tensors
    if isinstance(split, (tuple, list)):
        return _array(split[1]) if len(split) == 2 else None
    if isinstance(split, TensorBatches):
        return _array(split.labels)
    if hasattr(split, "column_names") and hasattr(split, "with_format"):  # of Hugging Face
        names = [name for name in ("label", "labels") if name in split.column_names]
        return np.asarray(split.with_format(None)[names[0]][:]) if len(names) == 1 else None
    targets = getattr(split, "targets", None)  # of torchvision
    return None if targets is None else _array(targets)


def _array(labels: Any) -> "np.ndarray[Any, Any]":
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def _source(split: object, whose: str) -> BatchSource:
    source = _coerce(split, whose)
    if source.num_examples < 1:
        raise DataError(
            f"{whose} split is empty. Every agent needs at least one example of each split: use "
            "fewer agents, another partitioning, or leave this agent out of the graph."
        )
    return source


def _coerce(split: object, whose: str) -> BatchSource:
    if isinstance(split, BatchSource):
        return split
    if (
        isinstance(split, (tuple, list))
        and len(split) == 2
        and all(isinstance(part, Tensor) for part in split)
    ):
        return TensorBatches(*split, whose=whose)
    if isinstance(split, DataLoader) and isinstance(split.dataset, Sized):
        return DatasetBatches(split.dataset, collate=split.collate_fn)
    no_dataset = isinstance(split, (tuple, list, dict, str, bytes, Tensor))
    if isinstance(split, Sized) and hasattr(split, "__getitem__") and not no_dataset:
        return DatasetBatches(split)
    raise DataError(
        f"{whose} split must be a pair of tensors (inputs, labels), a dataset with a length, a "
        f"DataLoader over one, or a BatchSource; got {type(split).__name__}."
    )


def _index_batches(
    num_examples: int, *, steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield ``steps`` index batches: shuffled passes one after the other.

    A pass's short last batch is kept; a single example that would be left over joins
    the batch before.
    """
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(num_examples, generator=generator)
        size = batch_size
        if len(order) == batch_size + 1 > 2:  # a last batch of one would be the end of a batch norm
            size += 1
        yield order[:size]
        order = order[size:]


class TensorBatches:
    """Batches of two tensors that lie in memory."""

    def __init__(self, inputs: Tensor, labels: Tensor, *, whose: str = "the") -> None:
        if len(inputs) != len(labels):
            raise DataError(
                f"{whose} split holds {len(inputs)} inputs but {len(labels)} labels; they must "
                "pair up."
            )
        self.inputs, self.labels = inputs, labels
        self.num_examples = len(inputs)
        present = labels.unique()  # type: ignore[no-untyped-call]
        self.classes = " ".join(str(label) for label in present.tolist())  # told in the handshake

    def training_batches(
        self, *, round: int, steps: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Batches without replacement; a split that is used up is shuffled anew."""
        for index in _index_batches(
            self.num_examples, steps=steps, batch_size=batch_size, generator=generator
        ):
            yield self.inputs[index], self.labels[index]

    def evaluation_batches(self, *, batch_size: int) -> Iterator[Batch]:
        """Yield the split in order."""
        inputs = self.inputs.split(batch_size)  # type: ignore[no-untyped-call]
        labels = self.labels.split(batch_size)  # type: ignore[no-untyped-call]
        yield from zip(inputs, labels, strict=True)


class DatasetBatches:
    """Batches of a map-style dataset; its transforms run as a batch is drawn."""

    def __init__(self, dataset: Any, *, collate: Callable[[Any], Any] = default_collate) -> None:
        self.dataset, self.collate = dataset, collate
        self.num_examples = len(dataset)

    def training_batches(
        self, *, round: int, steps: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Batches without replacement; a split that is used up is shuffled anew."""
        for index in _index_batches(
            self.num_examples, steps=steps, batch_size=batch_size, generator=generator
        ):
            yield self._batch(index.tolist())

    def evaluation_batches(self, *, batch_size: int) -> Iterator[Batch]:
        """Yield the split in order."""
        for start in range(0, self.num_examples, batch_size):
            yield self._batch(range(start, min(start + batch_size, self.num_examples)))

    def _batch(self, index: Any) -> Batch:
        batch = self.collate([self.dataset[i] for i in index])
        if isinstance(batch, dict):
            batch = _from_columns(batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                "a batch must be a pair (inputs, labels), or a dict of one column and its "
                f"'label' or 'labels'; the dataset gave {type(batch).__name__}. Pass a DataLoader "
                "whose collate_fn makes pairs."
            )
        inputs, labels = batch
        return inputs, labels


def _from_columns(batch: dict[str, Any]) -> Batch:
    """Inputs and labels of a batch with named columns, as of Hugging Face datasets."""
    names = [name for name in batch if name in ("label", "labels")]
    inputs = [name for name in batch if name not in names]
    if len(names) != 1 or len(inputs) != 1:
        raise DataError(
            "a batch that is a dict must hold one column of inputs and one named 'label' or "
            f"'labels'; got {', '.join(map(str, batch))}. Keep these two with select_columns, or "
            "pass a DataLoader whose collate_fn makes pairs."
        )
    return batch[inputs[0]], batch[names[0]]
