"""A DataLoader is used whole: the examples that it names, or it is refused by name."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from flower_mcepl import AgentData, DataError
from flower_mcepl.data.batches import BatchSource

SIZE = 12
DATASET = TensorDataset(torch.arange(float(SIZE)).view(SIZE, 1), torch.arange(SIZE) % 4)


def source_of(split: object) -> BatchSource:
    return AgentData.of(split, DATASET, agent=4).train


def numbers(source: BatchSource) -> list[int]:
    """The examples of a split, by number, as an evaluation shows them."""
    return [
        int(x) for inputs, _ in source.evaluation_batches(batch_size=5) for x in inputs.flatten()
    ]


class Own(Sampler[int]):
    """A sampler of the user's, that yields these indices."""

    def __init__(self, indices: Iterable[Any]) -> None:
        self.indices = list(indices)

    def __iter__(self) -> Iterator[Any]:
        yield from self.indices

    def __len__(self) -> int:
        return len(self.indices)


class Shuffled(Own):
    def __iter__(self) -> Iterator[Any]:
        return iter([self.indices[i] for i in torch.randperm(len(self.indices))])


class Fewer(Own):
    """Another half of the examples in each pass."""

    def __iter__(self) -> Iterator[Any]:
        return iter(np.random.permutation(self.indices)[: len(self.indices) // 2])  # noqa: NPY002


class Endless(Own):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.indices


class HalfSubset(SubsetRandomSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[: len(self.indices) // 2])


EVERYTHING = range(SIZE)
HALF = [1, 3, 4, 8, 9, 11]
NAMING: dict[str, tuple[dict[str, Any], Iterable[int]]] = {
    "plain": ({}, EVERYTHING),
    "shuffle": ({"shuffle": True}, EVERYTHING),
    "sequential": ({"sampler": SequentialSampler(DATASET)}, EVERYTHING),
    "sequential over fewer": ({"sampler": SequentialSampler(range(5))}, range(5)),
    "random": ({"sampler": RandomSampler(DATASET)}, EVERYTHING),
    "random of all": ({"sampler": RandomSampler(DATASET, num_samples=SIZE)}, EVERYTHING),
    "random over fewer": ({"sampler": RandomSampler(range(5))}, range(5)),
    "subset": ({"sampler": SubsetRandomSampler(HALF)}, HALF),
    "subset, unsorted": ({"sampler": SubsetRandomSampler(HALF[::-1])}, HALF),
    "subset of NumPy": ({"sampler": SubsetRandomSampler(np.array(HALF))}, HALF),
    "subset of a tensor": ({"sampler": SubsetRandomSampler(torch.tensor(HALF))}, HALF),
    "list": ({"sampler": HALF}, HALF),
    "tensor": ({"sampler": torch.tensor(HALF)}, HALF),
    "range": ({"sampler": range(3, 7)}, range(3, 7)),
    "one replica": (
        {"sampler": DistributedSampler(DATASET, num_replicas=1, rank=0)},
        EVERYTHING,
    ),
    "own": ({"sampler": Own(HALF)}, HALF),
    "own, shuffled": ({"sampler": Shuffled(HALF)}, HALF),
    "batches of a subset": (
        {"batch_sampler": BatchSampler(SubsetRandomSampler(HALF), 4, drop_last=True)},
        HALF,
    ),
    "batches of own": ({"batch_sampler": BatchSampler(Shuffled(HALF), 4, False)}, HALF),
    "own batches": ({"batch_sampler": Own([HALF[:2], HALF[2:]])}, HALF),
    "listed batches": ({"batch_sampler": [HALF[:2], HALF[2:]]}, HALF),
    "drop_last": ({"batch_size": 7, "drop_last": True}, EVERYTHING),
    "drop_last of all": ({"batch_size": 50, "drop_last": True}, EVERYTHING),
    "workers": (
        {
            "num_workers": 1,
            "timeout": 9,
            "persistent_workers": True,
            "prefetch_factor": 3,
            "worker_init_fn": int,
            "multiprocessing_context": "spawn",
            "generator": torch.Generator(),
        },
        EVERYTHING,
    ),
}


@pytest.mark.parametrize("kind", NAMING)
def test_the_examples_that_a_sampler_names_are_those_of_the_split(kind: str) -> None:
    options, named = NAMING[kind]
    source = source_of(DataLoader(DATASET, **options))
    assert source.num_examples == len(list(named))
    assert numbers(source) == list(named)
    plain = source_of(Subset(DATASET, list(named)))
    for (inputs, labels), (others, same) in zip(
        *(
            each.training_batches(
                round=1, steps=5, batch_size=4, generator=torch.Generator().manual_seed(2)
            )
            for each in (source, plain)
        ),
        strict=True,
    ):
        assert torch.equal(inputs, others)
        assert torch.equal(labels, same)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights": (
        {"sampler": WeightedRandomSampler([1.0] * SIZE, SIZE)},
        "WeightedRandomSampler, draws examples by their weights",
    ),
    "weights, all": (
        {"sampler": WeightedRandomSampler([1.0] * SIZE, SIZE, replacement=False)},
        "WeightedRandomSampler, draws examples by their weights",
    ),
    "replacement": (
        {"sampler": RandomSampler(DATASET, replacement=True)},
        "RandomSampler, draws with replacement",
    ),
    "fewer": (
        {"sampler": RandomSampler(DATASET, num_samples=5)},
        "RandomSampler, draws 5 of 12 examples",
    ),
    "more": (
        {"sampler": RandomSampler(DATASET, num_samples=30)},
        "RandomSampler, draws 30 of 12 examples",
    ),
    "replicas": (
        {"sampler": DistributedSampler(DATASET, num_replicas=3, rank=1)},
        "DistributedSampler, is that of one of 3 replicas",
    ),
    "own with repeats": ({"sampler": Own([0, 1, 1])}, "Own, names examples more than once"),
    "own without end": ({"sampler": Endless([0, 1])}, "Endless, names examples more than once"),
    "own of other halves": (
        {"sampler": Fewer(EVERYTHING)},
        "Fewer, names other examples in each pass",
    ),
    "own subset": (
        {"sampler": HalfSubset(list(EVERYTHING))},
        "HalfSubset, names other examples in each pass",
    ),
    "subset with repeats": (
        {"sampler": SubsetRandomSampler([2, 2])},
        "SubsetRandomSampler, names examples more than once",
    ),
    "beyond": (
        {"sampler": SubsetRandomSampler([2, SIZE])},
        "SubsetRandomSampler, names examples beyond the 12 of its dataset",
    ),
    "negative": ({"sampler": [-1, 2]}, "list, names examples beyond the 12"),
    "own batches that overlap": (
        {"batch_sampler": Own([[0, 1], [1, 2]])},
        "Own, names examples more than once",
    ),
    "batches of weights": (
        {"batch_sampler": BatchSampler(WeightedRandomSampler([1.0] * SIZE, 4), 2, False)},
        "WeightedRandomSampler, draws examples by their weights",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_sampler_is_refused_by_its_name(kind: str) -> None:
    options, reason = REFUSED[kind]
    message = f"the sampler of agent 4's training split, a {reason}.*Pass the dataset itself"
    with pytest.raises(DataError, match=message):
        source_of(DataLoader(DATASET, **options))


def test_train_and_test_loaders_over_one_dataset_share_no_example() -> None:
    order = torch.randperm(SIZE).tolist()
    train, test = (
        DataLoader(DATASET, batch_size=3, sampler=SubsetRandomSampler(part))
        for part in (order[:7], order[7:])
    )
    data = AgentData.of(train, test, agent=0)
    assert (data.train.num_examples, data.test.num_examples) == (7, 5)
    assert set(numbers(data.train)) == set(order[:7])
    assert set(numbers(data.test)) == set(order[7:])
    assert {name: sum(counts.values()) for name, counts in data.class_counts.items()} == {
        "train": 7,
        "test": 5,
    }


@given(named=st.lists(st.integers(-2, SIZE), max_size=SIZE + 2), listed=st.booleans())
def test_a_sampler_of_ones_own_names_a_set_of_examples_or_is_refused(
    named: list[int], listed: bool
) -> None:
    loader = DataLoader(DATASET, sampler=named if listed else Own(named))
    if named and len(set(named)) == len(named) and set(named) <= set(EVERYTHING):
        assert numbers(source_of(loader)) == sorted(named)
    else:
        with pytest.raises(DataError, match="agent 4's training split"):
            source_of(loader)


def test_reading_a_sampler_leaves_the_global_generators_alone() -> None:
    loader = DataLoader(DATASET, sampler=Shuffled(HALF))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    source_of(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


class Ready(Dataset[tuple[Tensor, Tensor]]):
    """Gives ready batches."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return DATASET[4 * index : 4 * index + 4]


def test_ready_batches_are_refused() -> None:
    for loader in (
        DataLoader(Ready(), batch_size=None),
        DataLoader(DATASET, batch_size=None, sampler=BatchSampler(range(SIZE), 4, False)),
    ):
        with pytest.raises(
            DataError,
            match=r"agent 4's training split is a DataLoader with batch_size=None.*BatchSource",
        ):
            source_of(loader)


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield torch.zeros(1), 0


class SizedStream(Stream):
    def __len__(self) -> int:
        return 1


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Stream()), DataLoader(SizedStream()), DataLoader(Unsized(), sampler=[0])],
)
def test_a_loader_over_a_stream_is_refused(loader: DataLoader[Any]) -> None:
    name = type(loader.dataset).__name__
    with pytest.raises(
        DataError, match=f"agent 4's training split must have .*index; got a DataLoader over {name}"
    ):
        source_of(loader)


class Twice(DataLoader[Any]):
    """A loader that gives more than its dataset."""

    def __iter__(self) -> Any:
        for _ in range(2):
            yield from super().__iter__()


class Named(DataLoader[Any]):
    """A loader that differs by its name alone."""


def test_a_loader_that_iterates_by_code_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"is a Twice, a DataLoader that iterates by code of its"):
        source_of(Twice(DATASET))
    assert numbers(source_of(Named(DATASET))) == list(EVERYTHING)
