"""Class counts of the record: those of the labels that an agent learns, or none."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from flower_mcepl import AgentData, ConfigError
from flower_mcepl.data.batches import TensorBatches, class_counts
from flower_mcepl.streams import isolated_rng

INPUTS = torch.arange(10.0).view(10, 1)
THIRDS = torch.arange(10) % 3


class Labelled(Dataset[tuple[Tensor, int]]):
    """As torchvision's: labels beside the examples, which are costly to draw."""

    def __init__(self, targets: Any, target_transform: Callable[[int], int] | None = None) -> None:
        self.targets, self.target_transform, self.drawn = targets, target_transform, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.drawn += 1
        label = self.targets[index]
        return torch.rand(1), label if self.target_transform is None else self.target_transform(
            int(label)
        )


class Part(Dataset[tuple[Tensor, int]]):
    """A part that hands on the labels of the whole, as much federated code does."""

    def __init__(self, whole: Labelled, indices: list[int]) -> None:
        self.whole, self.indices, self.targets = whole, indices, whole.targets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.whole[self.indices[index]]


class Shifted(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = super().__getitem__(index)
        return inputs, label + 1


def shifting(examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    inputs, labels = default_collate(examples)
    return [inputs, labels + 1]


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ((INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        ((INPUTS.numpy(), THIRDS.numpy()), {0: 4, 1: 3, 2: 3}),
        ([INPUTS, THIRDS], {0: 4, 1: 3, 2: 3}),
        (TensorBatches(INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        ((INPUTS, THIRDS > 0), {0: 4, 1: 6}),
        (TensorDataset(INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        (Subset(TensorDataset(INPUTS, THIRDS), [0, 1, 3]), {0: 2, 1: 1}),
        (Subset(Subset(TensorDataset(INPUTS, THIRDS), [0, 1, 3]), [1]), {1: 1}),
        (ConcatDataset([TensorDataset(INPUTS, THIRDS)] * 2), {0: 8, 1: 6, 2: 6}),
        (
            Subset(
                ConcatDataset([TensorDataset(INPUTS, THIRDS), Labelled(torch.tensor([7, 8]))]),
                [0, 3, 10],
            ),
            {0: 2, 7: 1},
        ),
        (
            DataLoader(TensorDataset(INPUTS, THIRDS), sampler=SubsetRandomSampler([0, 1, 3])),
            {0: 2, 1: 1},
        ),
        (DataLoader(Labelled([5, 5, 7])), {5: 2, 7: 1}),
        (Labelled(torch.tensor([5, 5, 7])), {5: 2, 7: 1}),
        (Labelled([1, 2, 1], lambda label: label - 1), {0: 2, 1: 1}),
        (Subset(Labelled([1, 2, 1], lambda label: label - 1), [0, 2]), {0: 2}),
        (Part(Labelled([5, 5, 7]), [2, 0]), {5: 1, 7: 1}),
        (
            Part(Labelled([5, 5, 7]), [1, 2, 0]),
            {5: 2, 7: 1},
        ),  # of the same length, in another order
        (Subset(Part(Labelled([5, 5, 7]), [2]), [0]), None),
        (Shifted(INPUTS, THIRDS), None),
        (DataLoader(TensorDataset(INPUTS, THIRDS), collate_fn=shifting), {1: 4, 2: 3, 3: 3}),
        (DataLoader(Labelled([5, 5, 7]), collate_fn=shifting), {6: 2, 8: 1}),
        ((INPUTS, INPUTS.flatten()), None),  # numbers to be predicted, not classes
        ((INPUTS, INPUTS.flatten().bfloat16()), None),
        ((INPUTS, THIRDS.view(5, 2)), None),
        ((INPUTS, torch.zeros(10, 3, dtype=torch.int64)), None),
        (Labelled(["cat", "dog"]), None),
        (Labelled([[1], [2, 3]]), None),
        ((torch.zeros(101, 1), torch.arange(101)), None),
        (TensorDataset(INPUTS), None),
        (None, None),
        ("data", None),
    ],
)
def test_classes_are_counted_of_what_is_learned(
    split: object, counts: dict[int, int] | None
) -> None:
    assert class_counts(split) == counts


@given(
    targets=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    shift=st.integers(0, 1),
    data=st.data(),
)
def test_counts_are_right_for_every_part_of_a_small_dataset(
    targets: list[int], shift: int, data: st.DataObject
) -> None:
    whole = Labelled(targets, (lambda label: label + shift) if shift else None)
    some = data.draw(st.lists(st.integers(0, len(targets) - 1), min_size=1, max_size=8))
    for split in (Subset(whole, some), Part(whole, some), whole):
        learned = Counter(int(split[i][1]) for i in range(len(split)))
        assert class_counts(split) == dict(learned)


def test_other_labels_than_those_beside_a_big_dataset_are_not_counted() -> None:
    split = Part(Labelled(np.arange(10_000) % 7), list(range(3000)))
    assert class_counts(split) is None
    assert split.whole.drawn <= 8


def test_a_big_dataset_is_not_drawn_to_be_counted() -> None:
    dataset = Labelled(np.arange(10_000) % 7)
    counts = class_counts(dataset)
    assert counts is not None
    assert sum(counts.values()) == 10_000
    assert dataset.drawn <= 8


def test_counting_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert class_counts(Labelled([5, 5, 7])) == {5: 2, 7: 1}
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_do_not_depend_on_what_another_thread_does() -> None:
    errors: list[Exception] = []

    def count() -> None:
        try:
            class_counts(Labelled([5, 5, 7]))
        except ConfigError as error:
            errors.append(error)

    with isolated_rng(0, "x"):
        thread = threading.Thread(target=count)
        thread.start()
        thread.join()
    assert len(errors) == 1  # refused, where no counts at all would be another record


def test_the_record_of_a_part_has_the_counts_of_the_part() -> None:
    whole = Labelled([1, 2, 3, 1, 2, 3])
    data = AgentData.of(Part(whole, [0, 3]), Subset(whole, [1, 4]), agent=0)
    assert data.class_counts == {"train": {1: 2}, "test": {2: 2}}


def test_classes_of_a_hugging_face_data_set_are_those_after_its_transform() -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"img": [1, 2, 3], "label": [4, 4, 6]})
    assert class_counts(split) == {4: 2, 6: 1}
    assert class_counts(split.with_transform(lambda rows: rows)) == {4: 2, 6: 1}
    shifted = split.with_transform(lambda rows: {**rows, "label": [y - 1 for y in rows["label"]]})
    assert class_counts(shifted) == {3: 2, 5: 1}
    assert class_counts(split.with_transform(lambda rows: 1 / 0)) is None
    assert class_counts(split.rename_column("label", "fine")) is None
