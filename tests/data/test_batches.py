from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from flower_mcepl import AgentData, ConfigError, DataError
from flower_mcepl.agents.agent import data_facts
from flower_mcepl.data.batches import BatchSource, DatasetBatches, TensorBatches, class_counts

INPUTS, LABELS = torch.arange(10.0).view(10, 1), torch.arange(10)


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
    per_pass = -(-size // batch_size)
    if size > 1 and size % batch_size == 1 and batch_size > 1:
        per_pass -= 1  # the single example left over joins the batch before
    batches = training(source, steps=passes * per_pass, batch_size=batch_size, seed=seed)
    for start in range(0, len(batches), per_pass):
        one_pass = batches[start : start + per_pass]
        assert all(len(labels) == batch_size for _, labels in one_pass[:-1])
        assert len(one_pass[-1][1]) > 1 or size == 1 or batch_size == 1
        assert torch.cat([labels for _, labels in one_pass]).sort().values.tolist() == list(
            range(size)
        )
    assert all(torch.equal(inputs.squeeze(1), labels) for inputs, labels in batches)


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
    assert TensorBatches(INPUTS, LABELS % 3).classes == "0 1 2"


class Labelled(Dataset[tuple[Tensor, int]]):
    """As torchvision's: labels beside the examples, which are costly to draw."""

    def __init__(self, targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise AssertionError("an example was drawn")


THIRDS = LABELS % 3


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ((INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        (TensorDataset(INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        (Subset(TensorDataset(INPUTS, THIRDS), [0, 1, 3]), {0: 2, 1: 1}),
        (Subset(Subset(TensorDataset(INPUTS, THIRDS), [0, 1, 3]), [1]), {1: 1}),
        (DataLoader(Labelled([5, 5, 7])), {5: 2, 7: 1}),
        (Labelled(torch.tensor([5, 5, 7])), {5: 2, 7: 1}),
        (TensorBatches(INPUTS, THIRDS), {0: 4, 1: 3, 2: 3}),
        ((INPUTS, THIRDS > 0), {0: 4, 1: 6}),
        ((INPUTS, INPUTS.flatten()), None),  # numbers to be predicted, not classes
        ((INPUTS, THIRDS.view(5, 2)), None),
        (Labelled(["cat", "dog"]), None),
        (Labelled([[1], [2, 3]]), None),
        ((torch.zeros(101, 1), torch.arange(101)), None),
        (TensorDataset(INPUTS), None),
        (None, None),
        ("data", None),
    ],
)
def test_classes_are_counted_where_no_example_must_be_drawn(
    split: object, counts: dict[int, int] | None
) -> None:
    assert class_counts(split) == counts


def test_classes_of_a_hugging_face_data_set_are_counted_without_its_transform() -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"img": [1, 2, 3], "label": [4, 4, 6]})
    assert class_counts(split.with_transform(lambda batch: 1 / 0)) == {4: 2, 6: 1}
    assert class_counts(split.rename_column("label", "fine")) is None


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
    assert data_facts(AgentData.of(Labelled([7, 5]), validation, agent=4))["classes"] == "5 7"


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


@pytest.mark.parametrize(
    "split",
    [
        None,
        3,
        "data",
        {"x": INPUTS},
        (INPUTS,),
        (INPUTS, LABELS, LABELS),
        ([1], [2]),
        INPUTS,
        Stream(),
        DataLoader(Stream()),
    ],
)
def test_another_type_is_refused_and_named(split: object) -> None:
    with pytest.raises(
        DataError, match=rf"agent 4's training split must be .*got {type(split).__name__}"
    ):
        train_of(split)


def test_inputs_and_labels_must_pair_up() -> None:
    with pytest.raises(DataError, match="agent 4's training split holds 10 inputs but 9 labels"):
        train_of((INPUTS, LABELS[:9]))


@pytest.mark.parametrize("example", [(1, 2, 3), 5])
def test_examples_that_are_no_pairs_are_refused(example: object) -> None:
    class Odd(Dataset[object]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> object:
            return example

    with pytest.raises(DataError, match=r"a batch must be a pair .*collate_fn"):
        next(iter(DatasetBatches(Odd()).evaluation_batches(batch_size=2)))


class Columns(Dataset[dict[str, int]]):
    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, int]:
        return {name: index for name in self.names}


@pytest.mark.parametrize("names", [("img", "label"), ("labels", "text")])
def test_a_dict_of_inputs_and_labels_is_a_batch(names: tuple[str, str]) -> None:
    ((inputs, labels),) = DatasetBatches(Columns(*names)).evaluation_batches(batch_size=3)
    assert inputs.tolist() == labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "names", [("img", "fine_label"), ("label",), ("img", "mask", "label"), ("label", "labels", "x")]
)
def test_other_dicts_are_refused_with_their_columns(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"one named 'label' or 'labels'; got {', '.join(names)}"):
        next(iter(DatasetBatches(Columns(*names)).evaluation_batches(batch_size=3)))
