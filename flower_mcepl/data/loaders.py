"""Examples that a DataLoader draws from its dataset, by the indices of its sampler."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from flower_mcepl.errors import DataError
from flower_mcepl.streams import isolated_rng

# The indices that torch's own samplers draw from; a derived class may draw others.
_INDICES: dict[type, Callable[[Any], Iterable[Any]]] = {
    SequentialSampler: lambda sampler: range(len(sampler.data_source)),
    RandomSampler: lambda sampler: range(len(sampler.data_source)),
    SubsetRandomSampler: lambda sampler: sampler.indices,
    DistributedSampler: lambda sampler: range(len(sampler.dataset)),
    **dict.fromkeys((list, tuple, range, Tensor, np.ndarray), lambda indices: indices),
}
_WAY_OUT = (
    "An agent draws every example once a pass, in an order of its own. Pass the dataset itself, a "
    "Subset of it, or a BatchSource that yields the batches you want."
)


def loaded_dataset(loader: "DataLoader[Any]", *, whose: str) -> Any:
    """The dataset of a loader, or the Subset of it that its sampler names.

    A sampler is used where it names a set of examples: one of torch's (sequential,
    random without replacement over the whole, SubsetRandomSampler, DistributedSampler
    of one replica), a list of indices, any other whose passes name the same indices,
    each once, and a BatchSampler over one of these.

    Raises
    ------
    DataError
        If the loader draws by weights, with replacement, for one of several replicas
        or another set in each pass, has ready batches or a stream for a dataset, or
        iterates by code of its own.
    """
    _refuse_other_loaders(loader, whose=whose)
    dataset: Any = loader.dataset
    places = _places(loader.batch_sampler, len(dataset), whose=whose)
    return dataset if len(places) == len(dataset) else Subset(dataset, places)


def _refuse_other_loaders(loader: "DataLoader[Any]", *, whose: str) -> None:
    kind = type(loader)
    stream = isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized)
    if stream or not hasattr(loader.dataset, "__getitem__"):
        raise DataError(
            f"{whose} split must have examples that are reached by their index; got a "
            f"{kind.__name__} over {type(loader.dataset).__name__}. Pass a map-style "
            "dataset with a length, the list of its examples where they fit into memory, "
            "or a BatchSource."
        )
    if kind.__iter__ is not DataLoader.__iter__:
        raise DataError(
            f"{whose} split is a {kind.__name__}, a DataLoader that iterates by code of its own. "
            f"{_WAY_OUT}"
        )
    if loader.batch_sampler is None:
        raise DataError(
            f"{whose} split is a {kind.__name__} with batch_size=None, whose dataset gives ready "
            "batches. Pass a dataset of single examples (batches are made with the run's "
            "batch-size), or a BatchSource that yields these batches."
        )


def _places(sampler: Any, num_examples: int, *, whose: str) -> list[int]:
    """Indices that a sampler names, sorted.

    Raises
    ------
    DataError
        If it names none once and for all, or one that the dataset does not have.
    """
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    name = type(sampler).__name__
    refused = _refusal(sampler)
    if refused is None and type(sampler) in _INDICES:
        places = list(itertools.islice(_flat(_INDICES[type(sampler)](sampler)), num_examples + 1))
    elif refused is None:
        places, again = (_drawn(sampler, num_examples, i) for i in (1, 2))
        if set(places) != set(again):
            refused = "names other examples in each pass"
    if refused is None and len(set(places)) < len(places):
        refused = "names examples more than once"
    if refused is None and not all(0 <= place < num_examples for place in places):
        refused = f"names examples beyond the {num_examples} of its dataset"
    if refused is not None:
        raise DataError(f"the sampler of {whose} split, a {name}, {refused}. {_WAY_OUT}")
    return sorted(places)


def _refusal(sampler: Any) -> str | None:
    """Why a kind of sampler names no set of examples; None where it may."""
    if isinstance(sampler, WeightedRandomSampler):
        return "draws examples by their weights"
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas != 1:
        return f"is that of one of {sampler.num_replicas} replicas"
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "draws with replacement"
    if isinstance(sampler, RandomSampler) and sampler.num_samples != len(sampler.data_source):
        return f"draws {sampler.num_samples} of {len(sampler.data_source)} examples"
    return None


def _drawn(sampler: Iterable[Any], num_examples: int, attempt: int) -> list[int]:
    """Indices of one pass; one more than there are examples at most, as for ever's."""
    with isolated_rng(attempt, "sampler"):
        return list(itertools.islice(_flat(sampler), num_examples + 1))


def _flat(indices: Iterable[Any]) -> Iterator[int]:
    """Indices one after the other, those of batches too."""
    for index in indices:
        try:
            yield operator.index(index)
        except TypeError:
            yield from map(operator.index, index)
