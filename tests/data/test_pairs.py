"""What inputs and labels of a split may be: taken where there is one meaning."""

from collections import UserDict
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
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from flower_mcepl import AgentData, DataError
from flower_mcepl.data.batches import BatchSource, TensorBatches, class_counts
from flower_mcepl.data.pairs import check_finite

INPUTS, LABELS = torch.arange(6.0).view(6, 1), torch.arange(6) % 2
GOOD = INPUTS, LABELS
NAN, INF = float("nan"), float("inf")


class Rows(Dataset[Any]):
    def __init__(self, row: Callable[[int], Any], size: int = 3) -> None:
        self.row, self.size = row, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


def source_of(split: object) -> BatchSource:
    return AgentData.of(split, GOOD, agent=4).train


def first_batch(split: object) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(0)
    (trained,) = source_of(split).training_batches(
        round=1, steps=1, batch_size=9, generator=generator
    )
    (evaluated,) = AgentData.of(GOOD, split, agent=4).test.evaluation_batches(batch_size=9)
    assert type(trained[0]) is type(evaluated[0])
    return evaluated


def same(value: Any, expected: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    if isinstance(value, (tuple, list)):
        return len(value) == len(expected) and all(map(same, value, expected))
    return value.dtype is expected.dtype and torch.equal(value, expected)


THREE, OTHER = torch.arange(3.0), 10 * torch.arange(3.0)
NUMBERS = torch.arange(3)
TAKEN: dict[str, tuple[object, object]] = {
    "pairs": (Rows(lambda i: (THREE[i], i)), THREE),
    "NumPy arrays": ((THREE.numpy(), NUMBERS.numpy()), THREE),
    "tensor and array": ((THREE, NUMBERS.numpy()), THREE),
    "reversed array": ((THREE.numpy()[::-1], NUMBERS.numpy()), THREE.flip(0)),
    "pair of tuples": (((THREE, OTHER), NUMBERS), (THREE, OTHER)),
    "pair of dicts": (({"a": THREE, "b": OTHER.numpy()}, NUMBERS), {"a": THREE, "b": OTHER}),
    "two inputs": (Rows(lambda i: ((THREE[i], OTHER[i]), i)), [THREE, OTHER]),
    "inputs by name": (Rows(lambda i: ({"a": THREE[i]}, i)), {"a": THREE}),
    "one column": (Rows(lambda i: {"img": THREE[i], "label": i}), THREE),
    "text columns": (
        Rows(lambda i: {"input_ids": THREE[i], "attention_mask": OTHER[i], "labels": i}),
        {"input_ids": THREE, "attention_mask": OTHER},
    ),
    "stacked": (StackDataset(THREE, NUMBERS), THREE),
    "stacked by name": (StackDataset(image=THREE, label=NUMBERS), THREE),
    "collated to a mapping": (
        DataLoader(
            Rows(lambda i: {"x": THREE[i], "m": OTHER[i], "label": i}),
            collate_fn=lambda rows: UserDict(default_collate(rows)),
        ),
        {"x": THREE, "m": OTHER},
    ),
    "collated to arrays": (
        DataLoader(
            Rows(lambda i: (i, i)),
            collate_fn=lambda rows: tuple(np.array(part) for part in zip(*rows, strict=True)),
        ),
        NUMBERS,
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_has_one_meaning_is_taken_as_it_is(kind: str) -> None:
    split, expected = TAKEN[kind]
    inputs, labels = first_batch(split)
    assert same(inputs, expected)
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
)
def test_the_dtype_of_inputs_is_left_to_the_agent(dtype: torch.dtype) -> None:
    for split in ((INPUTS.to(dtype), LABELS), TensorDataset(INPUTS.to(dtype), LABELS)):
        assert first_batch(split)[0].dtype is dtype


def test_an_array_is_not_copied_unless_it_must_be() -> None:
    array, labels = np.zeros((3, 2), np.float32), np.arange(3)
    source = source_of((array, labels))
    assert isinstance(source, TensorBatches)
    array[1] = 5
    assert source.inputs[1].tolist() == [5, 5]
    array.setflags(write=False)
    assert first_batch((array, labels))[0].tolist() == array.tolist()


REFUSED: dict[str, tuple[object, str]] = {
    "triples": (Rows(lambda i: (THREE[i], i, i)), "pair.*list of 3 .*tensor.*collate_fn"),
    "numbers": (Rows(lambda i: i), r"pair.*tensor \[3\] of int64"),
    "text labels": (Rows(lambda i: (i, "cat")), "labels.*one tensor.*str.*number of its class"),
    "text inputs": (Rows(lambda i: {"text": "a", "label": i}), "inputs.*tensor.*str"),
    "text beside inputs": (
        Rows(lambda i: {"ids": i, "text": "a", "label": i}),
        r"inputs.*text: .*str.*select_columns",
    ),
    "boxes for labels": (
        Rows(lambda i: (THREE[i], {"boxes": THREE, "labels": i})),
        "labels.*one tensor.*dict of 2 .*boxes",
    ),
    "nested inputs": (Rows(lambda i: (((i, i), i), i)), "inputs.*list of 2 .*list of 2"),
    "no inputs": (Rows(lambda i: ((), i)), "inputs.*list of 0"),
    "other shapes": (
        Rows(lambda i: (torch.zeros(i + 1), i)),
        r"alike.*got .*tensor \[\d\] of .* and .*tensor \[\d\] of .*collate_fn",
    ),
    "nothing": (Rows(lambda i: (None, i)), "tensors, arrays or numbers.*NoneType"),
    "text array": ((np.array(["a", "b"]), np.arange(2)), "hold numbers; got an array .* of <U1"),
    "text label array": ((np.zeros(2), np.array(["a", "b"])), "hold numbers; got an array"),
    "object array": ((np.array([None, 1]), np.arange(2)), "hold numbers; got an array.*object"),
    "foreign bytes": ((np.zeros(2, ">f4"), np.arange(2)), "hold numbers; got an array.*>f4"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_meaning_is_refused_with_agent_split_and_what_came(kind: str) -> None:
    split, message = REFUSED[kind]
    with pytest.raises(DataError, match=message) as error:
        first_batch(split)
    assert "agent 4's training split" in str(error.value)
    with pytest.raises(DataError, match="agent 4's test split"):
        list(AgentData.of(GOOD, split, agent=4).test.evaluation_batches(batch_size=2))


@pytest.mark.parametrize(
    "names", [("img", "fine_label"), ("label",), ("label", "labels", "x"), ("x", "y")]
)
def test_other_columns_are_refused_by_name(names: tuple[str, ...]) -> None:
    split = Rows(lambda i: dict.fromkeys(names, i))
    with pytest.raises(
        DataError,
        match=f"one named 'label' or 'labels'; got {', '.join(names)} in agent 4's.*rename_column",
    ):
        first_batch(split)


def test_images_of_pillow_are_refused_with_the_transform_to_use() -> None:
    image = pytest.importorskip("PIL.Image").new("L", (4, 4))
    for row in (lambda i: (image, i), lambda i: {"image": image, "label": i}):
        with pytest.raises(DataError, match=r"agent 4's training split .*Image.*ToTensor\(\)"):
            first_batch(Rows(row))


def test_hugging_face_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    base = datasets.Dataset.from_dict({"x": [[0.0], [1.0], [2.0]], "label": [0, 1, 2]})
    inputs, labels = first_batch(base.with_format("torch"))
    assert inputs.tolist() == [[0], [1], [2]]
    assert labels.tolist() == [0, 1, 2]
    both = base.add_column("mask", [1, 1, 0]).with_format("torch")
    assert first_batch(both)[0].keys() == {"x", "mask"}
    with pytest.raises(DataError, match=r"DatasetDict of 1 \(train: Dataset\).*of its entries"):
        source_of(datasets.DatasetDict(train=base))
    for streaming in (base.to_iterable_dataset(), base.to_iterable_dataset().with_format("torch")):
        with pytest.raises(DataError, match=r"got IterableDataset.*stream"):
            source_of(streaming)
        with pytest.raises(DataError, match=r"got a DataLoader over .*IterableDataset"):
            source_of(DataLoader(streaming, batch_size=2))


def spoiled(rows: list[int], value: float) -> Tensor:
    inputs = INPUTS.clone()
    inputs[rows] = value
    return inputs


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("make", "row"),
    [
        (lambda bad: (bad, LABELS), 2),
        (lambda bad: (bad.double().numpy(), LABELS.numpy()), 2),
        (lambda bad: ((INPUTS, bad.half()), LABELS), 2),
        (lambda bad: ({"x": bad.bfloat16()}, LABELS), 2),
        (lambda bad: TensorDataset(bad, LABELS), 2),
        (lambda bad: Subset(TensorDataset(bad, LABELS), [0, 4, 2]), 1),
        (lambda bad: Subset(Subset(TensorDataset(bad, LABELS), [0, 4, 2]), [1, 0, 2]), 0),
        (lambda bad: ConcatDataset([TensorDataset(*GOOD), TensorDataset(bad, LABELS)]), 2),
        (lambda bad: DataLoader(TensorDataset(bad, LABELS), sampler=[4, 2, 1]), 1),
    ],
)
def test_inputs_in_memory_that_are_not_finite_are_refused_with_their_rows(
    make: Callable[[Tensor], object], row: int, value: float
) -> None:
    split = make(spoiled([2, 4], value))
    message = rf"2 of \d examples hold .*, example {row} first\. Remove or fill them"
    for bad in ("train", "test"):
        with pytest.raises(DataError, match=message) as error:
            AgentData.of(*((split, GOOD) if bad == "train" else (GOOD, split)), agent=4)
        assert f"agent 4's {bad}" in str(error.value)
        assert "must hold finite inputs" in str(error.value)


def test_labels_that_are_not_finite_are_refused_with_their_rows() -> None:
    for split in ((INPUTS, spoiled([5], NAN)), TensorDataset(INPUTS, spoiled([5], NAN))):
        with pytest.raises(
            DataError,
            match=r"agent 4's training split must hold finite labels; 1 of 6 .*example 5 first",
        ):
            source_of(split)


def test_rows_that_nobody_is_shown_do_not_matter() -> None:
    dataset = TensorDataset(spoiled([2], NAN), LABELS)
    assert source_of(Subset(dataset, [0, 1, 3])).num_examples == 3
    filled = DataLoader(
        dataset, collate_fn=lambda rows: [part.nan_to_num() for part in default_collate(rows)]
    )
    assert first_batch(filled)[0].isfinite().all()


def test_a_split_that_is_only_counted_may_hold_anything() -> None:
    data = AgentData.of(
        GOOD, (spoiled([2], NAN), LABELS), agent=4, validation=GOOD, evaluate_on="validation"
    )
    assert data.class_counts.keys() == {"train", "validation"}
    assert class_counts((spoiled([2], NAN), LABELS)) is None


@given(
    values=st.lists(
        st.floats(width=32, allow_nan=True) | st.sampled_from([3e38, -3e38, NAN, INF]),
        min_size=2,
        max_size=12,
    ).filter(lambda values: len(values) % 2 == 0)
)
def test_finite_is_what_each_number_is(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).view(-1, 2)
    bad = [i for i, row in enumerate(tensor.tolist()) if not np.isfinite(row).all()]
    if bad:
        with pytest.raises(
            DataError, match=f"{len(bad)} of {len(tensor)} .*example {bad[0]} first"
        ):
            check_finite(tensor, what="inputs", whose="the")
    else:
        check_finite(tensor, what="inputs", whose="the")


# --- tensors with which torch does not calculate ---

SMALL = np.arange(6)
AS_ARRAYS: dict[str, Callable[[Any], object]] = {
    "arrays": lambda dtype: (SMALL.astype(dtype), SMALL.astype(dtype)),
    "tensors": lambda dtype: tuple(torch.from_numpy(SMALL.astype(dtype)) for _ in "xy"),
    "by name": lambda dtype: ({"x": SMALL.astype(dtype)}, SMALL.astype(dtype)),
    "dataset": lambda dtype: TensorDataset(*(torch.from_numpy(SMALL.astype(dtype)) for _ in "xy")),
    "scalars": lambda dtype: Rows(lambda i: (SMALL.astype(dtype)[i], SMALL.astype(dtype)[i]), 6),
}


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [(np.uint16, torch.int32), (np.uint32, torch.int64), (np.uint64, torch.int64)],
)
@pytest.mark.parametrize("kind", AS_ARRAYS)
def test_unsigned_types_that_torch_hardly_knows_become_wider(
    kind: str, dtype: Any, wider: torch.dtype
) -> None:
    split = AS_ARRAYS[kind](dtype)
    inputs, labels = first_batch(split)
    (inputs,) = inputs.values() if isinstance(inputs, dict) else (inputs,)
    assert inputs.dtype == labels.dtype
    assert inputs.dtype == wider or (kind == "scalars" and inputs.dtype == torch.int64)
    assert inputs.tolist() == labels.tolist() == SMALL.tolist()
    if kind != "scalars":  # of which nothing is known without drawing
        assert class_counts(split) == dict.fromkeys(range(6), 1)
    source = source_of(split)
    if isinstance(source, TensorBatches) or isinstance(split, TensorDataset):
        known = source.known_labels()  # type: ignore[attr-defined]
        assert known.dtype == wider


def test_whole_numbers_beyond_64_bits_with_a_sign_are_refused() -> None:
    large = np.full(6, 2**63, dtype=np.uint64)
    with pytest.raises(DataError, match=r"agent 4's training split .*below 2\*\*63.*uint64"):
        source_of((INPUTS, large))
    assert source_of((INPUTS, large - 1)).num_examples == 6


@pytest.mark.filterwarnings("ignore:Sparse .* beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_refused_with_their_layout(layout: torch.layout) -> None:
    sparse = torch.eye(6).to_sparse(layout=layout)
    message = rf"agent 4's training split must hold dense .*{layout}.*\.to_dense\(\)".replace(
        "torch.", ""
    )
    splits: list[object] = [(sparse, LABELS), ({"x": sparse}, LABELS)]
    if layout is torch.sparse_coo:  # of which a dataset can cut examples
        splits += [TensorDataset(sparse, LABELS)]
    for split in splits:
        with pytest.raises(DataError, match=message):
            first_batch(split)
