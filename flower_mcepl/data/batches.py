"""Batches of an agent's splits: what it trains and evaluates on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
    default_collate,
)

from flower_mcepl.config.checks import check
from flower_mcepl.data.kinds import is_dataset, not_a_split
from flower_mcepl.data.labels import (
    ClassCounts,
    count_by_class,
    labels_beside,
    labels_in_memory,
)
from flower_mcepl.data.loaders import loaded_dataset
from flower_mcepl.data.pairs import (
    as_tensors,
    check_dense,
    check_finite,
    is_inputs,
    on_parts,
    pair_of,
    parts_of,
    stacked,
)
from flower_mcepl.errors import DataError

Batch = tuple[Any, Tensor]
"""Inputs (a tensor, or a tuple, list or dict of tensors) and labels."""

EVALUATED = ("test", "validation")  # splits that an agent can be evaluated on


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

        Each split is one of these; anything else is refused.

        * A pair ``(inputs, labels)`` of tensors or NumPy arrays that lie in memory. The
          inputs may be a tuple or dict of tensors.
        * A map-style dataset with a length, or a list of its examples. An example is a
          pair ``(input, label)``, or a dict with a column ``label`` or ``labels``; the
          other columns are the inputs, a dict of them if there are several.
        * A DataLoader over such a dataset. Used are its dataset, its ``collate_fn`` and
          the examples that its ``sampler`` or ``batch_sampler`` names. One that draws
          otherwise, by weights, with replacement or another set in each pass, is
          refused, and so is one of ready batches (``batch_size=None``). Not used are
          ``batch_size``, ``shuffle``, ``drop_last`` and ``generator``: batches are
          drawn by the agent's own stream with the configured batch size, and every
          example is seen. Workers and their settings (``num_workers``, ``timeout``,
          ``worker_init_fn``, ``pin_memory`` and the like) have no part in what is
          drawn; the agent draws in its own process.
        * A `BatchSource`, which makes its own batches.

        What is computed from a batch, its model's outputs and loss, is checked by the
        agent.

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
            If a split that is used is empty, of another type or not finite, or the
            validation split is asked for and missing.
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
        used = {"train": sources[0], evaluate_on: sources[1]}
        counted = {
            name: class_counts(used.get(name, split))
            for name, split in splits.items()
            if split is not None
        }
        return cls(
            *sources,
            evaluate_on,
            {name: counts for name, counts in counted.items() if counts is not None},
        )


def class_counts(split: object) -> ClassCounts | None:
    """Number of examples by class, of the labels that an agent learns from a split.

    Known are the labels of tensors and arrays, and of torch's own datasets over
    tensors. Labels beside the examples, a dataset's ``targets`` or a Hugging Face
    column ``label`` or ``labels``, count if some examples that are drawn have the same.
    None where neither is so, where they are not whole numbers, one an example, and
    above 100 classes.
    """
    try:
        source = _coerce(split, "the")
    except DataError:
        return None
    if isinstance(source, TensorBatches):
        return count_by_class(source.labels)
    if not isinstance(source, DatasetBatches):
        return None
    labels = source.handed_labels()
    return None if labels is None else count_by_class(labels)


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
    if isinstance(split, DataLoader):
        dataset = loaded_dataset(split, whose=whose)
        return DatasetBatches(dataset, collate=split.collate_fn, whose=whose)
    if isinstance(split, (tuple, list)) and len(split) == 2:
        inputs, labels = as_tensors(tuple(split), whose=whose)
        # a list of tensors may as well be one of examples
        if isinstance(labels, Tensor) and is_inputs(inputs) and not isinstance(inputs, list):
            return TensorBatches(inputs, labels, whose=whose)
    if is_dataset(split):
        return DatasetBatches(split, whose=whose)
    raise not_a_split(split, whose=whose)


def pass_sizes(num_examples: int, batch_size: int) -> list[int]:
    """Sizes of the batches of one pass over a split, the rule for all algorithms.

    A short last batch is kept; a single example that would be left over joins the batch
    before, as a batch of one would be the end of a batch norm.
    """
    full, rest = divmod(num_examples, batch_size)
    sizes = [batch_size] * full
    if rest == 1 and full and batch_size > 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def batches_per_pass(num_examples: int, batch_size: int) -> int:
    """Number of batches in which a pass shows every example once."""
    return len(pass_sizes(num_examples, batch_size))


def _index_batches(
    num_examples: int, *, steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield ``steps`` index batches: shuffled passes one after the other."""
    sizes = pass_sizes(num_examples, batch_size)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            order = torch.randperm(num_examples, generator=generator)
            batches = [*reversed(order.split(sizes))]  # type: ignore[no-untyped-call]
        yield batches.pop()


class TensorBatches:
    """Batches of tensors that lie in memory; the inputs may be several."""

    def __init__(self, inputs: Any, labels: Tensor, *, whose: str = "the") -> None:
        for part in parts_of(inputs):
            if not part.ndim or not labels.ndim or len(part) != len(labels):
                raise DataError(
                    f"{whose} split holds {_length(part)} inputs but {_length(labels)} labels; "
                    "they must pair up."
                )
            check_finite(part, what="inputs", whose=whose)
        check_finite(labels, what="labels", whose=whose)
        self.inputs, self.labels = inputs, labels
        self.num_examples = len(labels)
        self.classes = _known_classes(labels)  # told in the handshake

    def training_batches(
        self, *, round: int, steps: int, batch_size: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Batches without replacement; a split that is used up is shuffled anew."""
        for index in _index_batches(
            self.num_examples, steps=steps, batch_size=batch_size, generator=generator
        ):
            yield self._batch(index)

    def evaluation_batches(self, *, batch_size: int) -> Iterator[Batch]:
        """Yield the split in order."""
        for start in range(0, self.num_examples, batch_size):
            yield self._batch(slice(start, start + batch_size))

    def known_labels(self) -> Tensor:
        """Labels of all examples."""
        return self.labels

    def _batch(self, index: Any) -> Batch:
        return on_parts(self.inputs, lambda part: part[index]), self.labels[index]


def _length(tensor: Tensor) -> int | str:
    return len(tensor) if tensor.ndim else "one number for all"


def _known_classes(labels: Tensor) -> str | None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        return None  # no classes
    present = labels.unique()  # type: ignore[no-untyped-call]
    return " ".join(str(label) for label in present.tolist())


class DatasetBatches:
    """Batches of a map-style dataset; its transforms run as a batch is drawn."""

    def __init__(
        self,
        dataset: Any,
        *,
        collate: Callable[[Any], Any] = default_collate,
        whose: str = "the",
    ) -> None:
        self.dataset, self.collate, self.whose = dataset, collate, whose
        self.num_examples = len(dataset)
        if collate is default_collate:
            _check_memory(dataset, whose=whose)

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

    def known_labels(self) -> Tensor | None:
        """Labels of all examples, where they lie in memory."""
        known = labels_in_memory(self.dataset) if self.collate is default_collate else None
        return None if known is None else as_tensors(known, whose=self.whose)

    def handed_labels(self) -> "np.ndarray[Any, Any] | None":
        """Labels of all examples, where they are known without drawing them all."""
        if self.collate is default_collate:
            labels = labels_in_memory(self.dataset)
            if labels is not None:
                return labels
        return labels_beside(self.dataset, lambda places: self._batch(places)[1])

    def _batch(self, index: Any) -> Batch:
        examples = [self.dataset[i] for i in index]
        if self.collate is default_collate:
            return pair_of(stacked(examples, whose=self.whose), whose=self.whose)
        return pair_of(self.collate(examples), whose=self.whose)


def _check_memory(dataset: Any, *, whose: str) -> None:
    """Refuse tensors of torch's own datasets that are not finite."""
    if type(dataset) is ConcatDataset:
        for part in dataset.datasets:
            _check_memory(part, whose=whose)
        return
    rows: Any = slice(None)
    while type(dataset) is Subset:
        rows = np.asarray(dataset.indices, dtype=np.int64)[rows]
        dataset = dataset.dataset
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        for what, values in zip(("inputs", "labels"), dataset.tensors, strict=True):
            check_dense(values, whose=whose)
            if values.is_floating_point():
                check_finite(values[rows], what=what, whose=whose)
