"""Pairs of a batch, inputs and labels, made of what a split holds or draws."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from flower_mcepl.errors import DataError

# unsigned types that torch stores but hardly calculates with
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}

LABEL_COLUMNS = ("label", "labels")  # names of the labels among named columns

_PILLOW = (
    "Let a transform make tensors of the images: torchvision.transforms.ToTensor(), or "
    "with_transform of a Hugging Face dataset."
)
_COLLATE = (
    "Bring the examples to one shape in a transform, or pass a DataLoader whose collate_fn does."
)


def described(value: object) -> str:
    """Kind of a value in a few words: its class, shape, dtype or parts."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        parts = [f"{key!s}: {described(part)}" for key, part in _first(value.items())]
        return f"{type(value).__name__} of {len(value)} ({_listed(parts, len(value))})"
    if isinstance(value, (tuple, list)):
        parts = [described(part) for part in _first(value)]
        return f"{type(value).__name__} of {len(value)} ({_listed(parts, len(value))})"
    return type(value).__name__


def _first(values: Iterable[Any]) -> Iterator[Any]:
    return (value for value, _ in zip(values, range(4), strict=False))


def _listed(parts: list[str], number: int) -> str:
    return ", ".join(parts) + (", ..." if number > len(parts) else "")


def is_inputs(value: object) -> bool:
    """Tell whether a model can take it: a tensor, or a tuple, list or dict of some."""
    if isinstance(value, Mapping):
        return len(value) > 0 and all(isinstance(part, Tensor) for part in value.values())
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)


def on_parts(inputs: Any, change: Callable[[Tensor], Any]) -> Any:
    """Inputs of the same form, each tensor of them changed."""
    if isinstance(inputs, Mapping):
        return {name: change(part) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [change(part) for part in inputs]
        return parts if isinstance(inputs, list) else tuple(parts)
    return change(inputs)


def parts_of(inputs: Any) -> list[Tensor]:
    """The tensors that inputs consist of."""
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def as_tensors(value: Any, *, whose: str) -> Any:
    """Arrays of NumPy as tensors, one level deep, and all tensors as torch's own work.

    Everything else stays as it is.

    Raises
    ------
    DataError
        If one holds no numbers, is sparse, or holds larger ones than 64 bits with a
        sign.
    """
    if isinstance(value, np.ndarray):
        return _calculable(_as_tensor(value, whose=whose), whose=whose)
    if isinstance(value, Tensor):
        return _calculable(value, whose=whose)
    if isinstance(value, Mapping):
        return {name: as_tensors(part, whose=whose) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(as_tensors(part, whose=whose) for part in value)
    return value


def _as_tensor(array: "np.ndarray[Any, Any]", *, whose: str) -> Tensor:
    try:  # without a copy, unless the array cannot be written or lies in another order
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:  # no numbers, or foreign byte order
        raise DataError(
            f"{whose} split must hold numbers; got an {described(array)}. Convert it, for example "
            "text labels to the numbers of their classes."
        ) from error


def _calculable(tensor: Tensor, *, whose: str) -> Tensor:
    """A dense tensor; wider, of an unsigned type for which torch lacks functions."""
    check_dense(tensor, whose=whose)
    if tensor.dtype not in _WIDER:
        return tensor
    wider = tensor.to(_WIDER[tensor.dtype])
    if tensor.dtype == torch.uint64 and bool((wider < 0).any()):
        raise DataError(
            f"{whose} split must hold whole numbers below 2**63; got {described(tensor)} with "
            "larger ones. Give them as floats, or number them anew."
        )
    return wider


def check_dense(tensor: Tensor, *, whose: str) -> None:
    """Refuse a sparse tensor, of which no batch can be cut.

    Raises
    ------
    DataError
        If it is one.
    """
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise DataError(
            f"{whose} split must hold dense tensors; got {described(tensor)}, {layout}. Call "
            ".to_dense(), or let a dataset do so for each example."
        )


def stacked(examples: list[Any], *, whose: str) -> Any:
    """One batch of examples, as torch's default_collate makes it.

    Raises
    ------
    DataError
        If they hold something else than numbers, or differ in shape.
    """
    try:
        try:
            return default_collate(examples)
        except TypeError:  # of numbers such as np.uint16(1), among others
            return default_collate([_with_ints(example) for example in examples])
    except TypeError as error:
        first = described(examples[0])
        way_out = _PILLOW if "PIL." in str(error) else _COLLATE
        raise DataError(
            f"the examples of {whose} split must hold tensors, arrays or numbers; got {first}. "
            f"{way_out}"
        ) from error
    except RuntimeError as error:
        kinds = [described(example) for example in examples]
        other = next((kind for kind in kinds if kind != kinds[0]), str(error))
        raise DataError(
            f"the examples of {whose} split must be alike to make a batch; got {kinds[0]} and "
            f"{other}. {_COLLATE}"
        ) from error


def _with_ints(example: Any) -> Any:
    """An example, unsigned numbers of NumPy in it as Python's."""
    if isinstance(example, np.unsignedinteger):
        return int(example)
    if isinstance(example, Mapping):
        return {name: _with_ints(part) for name, part in example.items()}
    if type(example) in (tuple, list):
        return type(example)(map(_with_ints, example))
    return example


def pair_of(batch: Any, *, whose: str) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch: a pair, or a dict with a column of labels.

    The inputs are a tensor, or a tuple, list or dict of tensors; the labels are a
    tensor.

    Raises
    ------
    DataError
        If they are not.
    """
    pair = _from_columns(batch, whose=whose) if isinstance(batch, Mapping) else batch
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(
            "a batch must be a pair (inputs, labels), or a dict of columns, its labels named "
            f"'label' or 'labels'; that of {whose} split is {described(batch)}. Pass a DataLoader "
            "whose collate_fn makes pairs."
        )
    inputs, labels = (as_tensors(part, whose=whose) for part in pair)
    if not isinstance(labels, Tensor):
        raise DataError(
            f"the labels of a batch must be one tensor; those of {whose} split are "
            f"{described(labels)}. Let each example's label be a number or a tensor, text as the "
            "number of its class, or pass a DataLoader whose collate_fn makes one tensor."
        )
    if not is_inputs(inputs):
        raise DataError(
            "the inputs of a batch must be a tensor, or a tuple, list or dict of tensors; those "
            f"of {whose} split are {described(inputs)}. Drop what the model does not take, as with "
            "select_columns, or pass a DataLoader whose collate_fn makes tensors."
        )
    return inputs, labels


def _from_columns(batch: Mapping[str, Any], *, whose: str) -> tuple[Any, Any]:
    """Inputs and labels of a batch with named columns, as of Hugging Face datasets.

    One column of inputs is a tensor, several are a dict.
    """
    names = [name for name in batch if name in LABEL_COLUMNS]
    inputs = {name: part for name, part in batch.items() if name not in names}
    if len(names) != 1 or not inputs:
        raise DataError(
            "a batch that is a dict must hold columns of inputs and one named 'label' or "
            f"'labels'; got {', '.join(map(str, batch))} in {whose} split. Keep what is needed "
            "with select_columns and name the labels with rename_column, or pass a DataLoader "
            "whose collate_fn makes pairs."
        )
    (first, *more) = inputs.values()
    return (inputs if more else first), batch[names[0]]


def check_finite(values: Tensor, *, what: str, whose: str) -> None:
    """Refuse numbers of a whole split that are not finite.

    Raises
    ------
    DataError
        If there are some: how many rows, and the first of them.
    """
    if not values.is_floating_point() or not values.numel():
        return
    low, high = values.detach().aminmax()  # both are NaN where one value is; no copy
    if math.isfinite(low) and math.isfinite(high):
        return
    rows = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero().flatten()
    raise DataError(
        f"{whose} split must hold finite {what}; {len(rows)} of {len(values)} examples hold values "
        f"that are infinite or not a number, example {int(rows[0])} first. Remove or fill them."
    )
