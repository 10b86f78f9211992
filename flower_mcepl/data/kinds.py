"""Kinds of objects that a data function may return for a split."""

from collections.abc import Mapping, Sized

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from flower_mcepl.data.pairs import described
from flower_mcepl.errors import DataError


def is_dataset(split: object) -> bool:
    """Tell whether it gives examples by index."""
    if isinstance(split, list):  # of examples; one of batches has other labels
        return all(_is_example(example) for example in split)
    other = (tuple, Mapping, str, bytes, Tensor, np.ndarray, IterableDataset)
    return (
        isinstance(split, Sized)
        and hasattr(split, "__getitem__")
        and not isinstance(split, other)
        and not hasattr(split, "iloc")  # a table of pandas
    )


def _is_example(value: object) -> bool:
    """Tell whether it is a pair of an input and one number for its label."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    label = value[1]
    shape = getattr(label, "shape", None)
    return isinstance(label, (int, float)) if shape is None else tuple(shape) == ()


def not_a_split(split: object, *, whose: str) -> DataError:
    """Error that says what a split may be, and how to make one of this."""
    return DataError(
        f"{whose} split must be a pair of tensors or arrays (inputs, labels), a dataset with a "
        "length whose examples are reached by their index, a DataLoader over one, or a "
        f"BatchSource; got {described(split)}. {_way_out(split)}"
    )


def _way_out(split: object) -> str:
    if isinstance(split, Mapping):
        return "Pass one of its entries, or the pair of its inputs and its labels."
    if hasattr(split, "iloc"):
        return "Pass the pair of its columns as arrays: table[columns].to_numpy(), ..."
    if isinstance(split, list) and split and isinstance(split[0], (tuple, list)):
        return (
            "Join ready batches to one pair with torch.cat, or pass a BatchSource that yields "
            "them; of examples with a label that is not one number, pass DataLoader(examples)."
        )
    if isinstance(split, (tuple, list)):
        return "Make one tensor of each of two lists, with torch.stack or torch.tensor."
    if hasattr(split, "__iter__"):
        return (
            "Examples of a stream must be reached by their index: pass the list of them, or a "
            "BatchSource that yields batches of the stream."
        )
    return "Let the data function return such splits."
