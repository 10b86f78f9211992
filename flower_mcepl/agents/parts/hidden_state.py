"""State that a network hides in Python attributes, where no saved state has it."""

import copy
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.placement import train_mode

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks, parameters, training


def hidden_state(
    network: nn.Module,
    call: Callable[[nn.Module], Tensor],
    rng: Callable[[], AbstractContextManager[None]],
    frozen: tuple[str, ...] = (),
) -> list[str]:
    """Attributes that a forward pass changes and a later one depends on, by name.

    One that is only written, such as attention maps kept to be drawn, does not count.

    Parameters
    ----------
    network : nn.Module
        It stays as it is.
    call : callable
        Gives the outputs of a network for the same batch each time.
    rng : callable
        Context in which random draws are the same each time.
    frozen : tuple of str
        Submodules that training leaves in eval mode (default: none).
    """
    used = own_copy(network)
    train_mode(used, frozen)
    before = attributes(used)
    with rng():
        call(used)
    names = _changed(before, attributes(used))
    if not names:
        return []
    reset = own_copy(used)
    for name in names:
        _set(reset, name, before)
    for put in (lambda module: train_mode(module, frozen), nn.Module.eval):
        outputs = []
        for module in (used, reset):
            put(module)
            with rng():
                outputs.append(call(module))
        if not torch.equal(*outputs):
            return names
    return []


def attributes(network: nn.Module) -> dict[str, Any]:
    """Plain values that a network's modules hold as attributes, by dotted name."""
    values = {}
    for prefix, module in network.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and _is_plain(value):
                values[f"{prefix}.{name}" if prefix else name] = copy.deepcopy(value)
    return values


def _set(network: nn.Module, name: str, values: Mapping[str, Any]) -> None:
    prefix, _, local = name.rpartition(".")
    module = network.get_submodule(prefix)
    if name in values:
        setattr(module, local, copy.deepcopy(values[name]))
    else:
        delattr(module, local)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or _differ(before[name], after[name])
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, deque)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Tensor):  # a recurrent layer has a list of its own parameters
        return value.grad_fn is None and not isinstance(value, nn.Parameter)
    return isinstance(value, (int, float, str, type(None), np.ndarray, np.generic))


def _differ(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return True
    if isinstance(one, Tensor):
        return not torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return not np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() != other.keys() or any(_differ(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, deque)):
        return len(one) != len(other) or any(map(_differ, one, other))
    return bool(one != other)
