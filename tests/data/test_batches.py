from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from flower_mcepl import AgentData, ConfigError, DataError
from flower_mcepl.agents.agent import data_facts
from flower_mcepl.data.batches import BatchSource, TensorBatches, batches_per_pass

INPUTS, LABELS = torch.arange(10.0).view(10, 1), torch.arange(10)
THIRDS = LABELS % 3


def train_of(split: object) -> BatchSource:
    return AgentData.of(split, (INPUTS, LABELS), agent=4).train


def training(
    source: BatchSource, *, steps: int, batch_size: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return list(
        source.training_batches(round=1, steps=steps, batch_size=batch_size, generator=generator)
    )


SPLITS: dict[str, object] = {
    "tensors": (INPUTS, LABELS),
    "list of tensors": [INPUTS, LABELS],
    "arrays": (INPUTS.numpy(), LABELS.numpy()),
    "list of examples": [(x, int(y)) for x, y in zip(INPUTS, LABELS, strict=True)],
    "dataset": TensorDataset(INPUTS, LABELS),
    "subset": Subset(TensorDataset(INPUTS.repeat(2, 1), LABELS.repeat(2)), range(10)),
    "loader": DataLoader(TensorDataset(INPUTS, LABELS), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_every_kind_of_split_gives_the_same_batches(kind: str) -> None:
    source, plain = train_of(SPLITS[kind]), TensorBatches(INPUTS, LABELS)
    assert source.num_examples == 10
    for batches, expected in (
        (training(source, steps=6, batch_size=4), training(plain, steps=6, batch_size=4)),
        (
            list(source.evaluation_batches(batch_size=4)),
            list(plain.evaluation_batches(batch_size=4)),
        ),
    ):
        assert len(batches) == len(expected)
        for (inputs, labels), (other_inputs, other_labels) in zip(batches, expected, strict=True):
            assert torch.equal(inputs, other_inputs)
            assert torch.equal(labels, other_labels)


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    passes=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_a_pass_shows_every_example_once(
    size: int, batch_size: int, passes: int, seed: int
) -> None:
    source = TensorBatches(torch.arange(size).view(size, 1), torch.arange(size))
    per_pass = batches_per_pass(size, batch_size)
    batches = training(source, steps=passes * per_pass, batch_size=batch_size, seed=seed)
    for start in range(0, len(batches), per_pass):
        one_pass = batches[start : start + per_pass]
        assert all(len(labels) == batch_size for _, labels in one_pass[:-1])
        assert len(one_pass[-1][1]) > 1 or size == 1 or batch_size == 1
        assert torch.cat([labels for _, labels in one_pass]).sort().values.tolist() == list(
            range(size)
        )
    assert all(torch.equal(inputs.squeeze(1), labels) for inputs, labels in batches)


def cut_step_by_step(size: int, *, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Oracle: a pass is cut from its front; what is left decides each batch's size."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    batches = []
    for _ in range(steps):
        order = order or torch.randperm(size, generator=generator).tolist()
        count = batch_size + (len(order) == batch_size + 1 > 2)
        batches.append(order[:count])
        order = order[count:]
    return batches


@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    steps=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_batches_are_cut_from_shuffled_passes(
    size: int, batch_size: int, steps: int, seed: int
) -> None:
    batches = training(
        TensorBatches(torch.zeros(size), torch.arange(size)),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    assert [labels.tolist() for _, labels in batches] == cut_step_by_step(
        size, steps=steps, batch_size=batch_size, seed=seed
    )


def test_the_order_comes_from_the_generator() -> None:
    source = train_of((INPUTS, LABELS))
    first, again, other = (
        training(source, steps=1, batch_size=10, seed=seed)[0][1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_keeps_the_order_and_the_short_end() -> None:
    labels = [
        batch[1].tolist() for batch in train_of(SPLITS["dataset"]).evaluation_batches(batch_size=4)
    ]
    assert labels == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_loaders_collate_function_is_used() -> None:
    def collate(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return -torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])

    loader = DataLoader(TensorDataset(INPUTS, LABELS), collate_fn=collate)
    ((inputs, _),) = train_of(loader).evaluation_batches(batch_size=10)
    assert torch.equal(inputs, -INPUTS)


def test_ones_own_batch_source_is_taken_as_it_is() -> None:
    class Own:
        num_examples = 1

        def training_batches(self, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield INPUTS, LABELS

        def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            yield INPUTS, LABELS

    own = Own()
    assert train_of(own) is own


def test_classes_are_told_where_the_labels_lie_in_memory() -> None:
    assert TensorBatches(INPUTS, THIRDS).classes == "0 1 2"
    assert TensorBatches(INPUTS, THIRDS > 0).classes == "False True"


@pytest.mark.parametrize("labels", [INPUTS.flatten(), THIRDS.view(10, 1), THIRDS.repeat(2, 1).T])
def test_numbers_to_be_predicted_are_no_classes(labels: Tensor) -> None:
    assert TensorBatches(INPUTS, labels).classes is None


@pytest.mark.parametrize(("evaluate_on", "size"), [("test", 10), ("validation", 4)])
def test_one_split_is_evaluated_and_all_are_counted(evaluate_on: str, size: int) -> None:
    validation = INPUTS[:4], LABELS[:4]
    data = AgentData.of(
        (INPUTS, THIRDS), (INPUTS, LABELS), agent=4, validation=validation, evaluate_on=evaluate_on
    )
    assert (data.test.num_examples, data.evaluated) == (size, evaluate_on)
    facts = data_facts(data)
    assert {key for key in facts if key.startswith("num-")} == {
        "num-examples",
        f"num-{evaluate_on}-examples",
    }
    assert facts["train-counts"] == "0:4 1:3 2:3"
    assert facts["validation-counts"] == "0:1 1:1 2:1 3:1"
    assert facts["test-counts"].count(":") == 10
    listed = [(torch.zeros(1), label) for label in (7, 5)]
    assert "classes" not in data_facts(AgentData.of(listed, validation, agent=4))
    subset = Subset(TensorDataset(INPUTS, LABELS), [7, 5])
    assert data_facts(AgentData.of(subset, validation, agent=4))["classes"] == "5 7"


def test_a_split_that_is_evaluated_must_be_there() -> None:
    with pytest.raises(DataError, match="agent 4 has no validation split"):
        AgentData.of((INPUTS, LABELS), (INPUTS, LABELS), agent=4, evaluate_on="validation")
    with pytest.raises(
        ConfigError, match="evaluate-on must be one of test, validation; got 'train'"
    ):
        AgentData.of((INPUTS, LABELS), (INPUTS, LABELS), agent=4, evaluate_on="train")


EMPTY = [
    (INPUTS[:0], LABELS[:0]),
    TensorDataset(INPUTS[:0], LABELS[:0]),
    DataLoader(Subset(TensorDataset(INPUTS), [])),
]


@pytest.mark.parametrize("split", EMPTY)
def test_an_empty_split_names_agent_and_split(split: object) -> None:
    with pytest.raises(DataError, match=r"agent 4's training split is empty.*leave this agent out"):
        AgentData.of(split, (INPUTS, LABELS), agent=4)
    with pytest.raises(DataError, match=r"agent 4's test split is empty"):
        AgentData.of((INPUTS, LABELS), split, agent=4)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield INPUTS


class SizedStream(Stream):
    def __len__(self) -> int:
        return 10


class Table:
    """As a DataFrame of pandas: it has a length and columns."""

    iloc = None

    def __len__(self) -> int:
        return 3

    def __getitem__(self, name: str) -> None: ...


REFUSED: list[tuple[object, str, str]] = [
    (None, "NoneType", "data function"),
    (3, "int", "data function"),
    ("data", "str", "."),
    (INPUTS, r"tensor \[10, 1\] of float32", "."),
    (INPUTS.numpy(), r"array \[10, 1\] of float32", "."),
    ({"x": INPUTS}, r"dict of 1 \(x: tensor \[10, 1\] of float32\)", "Pass one of its entries"),
    ((INPUTS,), r"tuple of 1 \(tensor", "."),
    ((INPUTS, LABELS, LABELS), "tuple of 3 .*tensor", "."),
    (([1], [2]), r"tuple of 2 \(list of 1 \(int\), list of 1 \(int\)\)", "torch.tensor"),
    (([INPUTS[0], INPUTS[1]], LABELS[:2]), r"tuple of 2 \(list of 2 .*tensor", "torch.stack"),
    ((INPUTS, "labels"), "tuple of 2 .*str", "."),
    ([(INPUTS[:4], LABELS[:4]), (INPUTS[4:8], LABELS[4:8])], "list of 2 .*tensor", "torch.cat"),
    ([(INPUTS[:4], LABELS[:4])] * 7, "list of 7 .*tensor.*, ...", "torch.cat"),
    ([(INPUTS[0], "cat"), (INPUTS[1], "dog")], "list of 2 .*str", r"pass DataLoader\(examples\)"),
    ([1, 2, 3], r"list of 3 \(int", "."),
    (Stream(), "Stream", "stream"),
    (SizedStream(), "SizedStream", "list of them"),
    (iter([1]), "list_iterator", "stream"),
    (Table(), "Table", "to_numpy"),
]


@pytest.mark.parametrize(("split", "what", "way_out"), REFUSED)
def test_another_type_is_refused_with_what_came_and_the_way_out(
    split: object, what: str, way_out: str
) -> None:
    with pytest.raises(
        DataError, match=rf"agent 4's training split must be .*got {what}.*{way_out}"
    ):
        train_of(split)
    missing = "agent 4 has no test split"
    refused = rf"agent 4's test split must be .*got {what}"
    with pytest.raises(DataError, match=missing if split is None else refused):
        AgentData.of((INPUTS, LABELS), split, agent=4)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("label", [int, float, np.int64, torch.tensor, bool])
def test_a_list_of_examples_is_a_dataset(size: int, label: Callable[[int], Any]) -> None:
    source = train_of([(INPUTS[i], label(i % 2)) for i in range(size)])
    ((inputs, labels),) = source.evaluation_batches(batch_size=5)
    assert torch.equal(inputs, INPUTS[:size])
    assert labels.tolist() == [i % 2 for i in range(size)]


def test_inputs_and_labels_must_pair_up() -> None:
    with pytest.raises(DataError, match="agent 4's training split holds 10 inputs but 9 labels"):
        train_of((INPUTS, LABELS[:9]))
    with pytest.raises(DataError, match="agent 4's training split holds 3 inputs but 10 labels"):
        train_of(((INPUTS, INPUTS[:3]), LABELS))
    with pytest.raises(DataError, match="holds 10 inputs but one number for all labels"):
        train_of((INPUTS, LABELS[0]))
