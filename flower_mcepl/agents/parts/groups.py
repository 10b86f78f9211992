"""A state as groups of tensors, ``group/layer``, on the agent's device."""

import functools
from collections.abc import Mapping
from typing import Any

import safetensors.numpy
import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.errors import StateError, UnsupportedLayerError
from flower_mcepl.masks.layers import check_shaped

Shapes = Mapping[str, tuple[int, ...]]


def state_of(facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> AgentState:
    """State of facts and groups of tensors, all of them copied to the CPU."""
    arrays = {
        group: {name: tensor.detach().cpu().clone().numpy() for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }
    return AgentState.joined(facts, arrays)


def check_savable(module: nn.Module) -> None:
    """Check that a state can hold a network's parameters and buffers.

    Raises
    ------
    UnsupportedLayerError
        If one has no shape yet, is not dense, or of a type that NumPy or safetensors
        does not have.
    """
    check_shaped(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout is not torch.strided or not _is_known(tensor.dtype):
            raise UnsupportedLayerError(
                "a network's parameters and buffers must be dense and of a type that a saved state "
                f"can hold; {name} is {tensor.dtype}, {tensor.layout}. Convert it in the model "
                "function, as with .float() or .to_dense()."
            )


@functools.cache
def _is_known(dtype: torch.dtype) -> bool:
    try:
        safetensors.numpy.save({"tensor": torch.empty(0, dtype=dtype).numpy()})
    except (TypeError, RuntimeError, safetensors.SafetensorError):
        return False
    return True


def groups_of(state: AgentState, *, device: str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Groups of a state on ``device``; a group without tensors is absent."""
    return {
        group: {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        for group, arrays in state.groups().items()
    }


# A file of tensors keeps no order of them. Who walks over a restored group, as a mask
# that regrows at random does with one stream for all layers, must go the way of one
# that was never saved.
def check_group(
    groups: dict[str, dict[str, Tensor]],
    group: str,
    full: Shapes,
    *,
    whose: str,
    may_be_absent: bool,
) -> None:
    """Check that a group holds exactly what it must hold, and put it in that order.

    Raises
    ------
    StateError
        If a tensor is missing, superfluous or has another shape.
    """
    tensors = groups.get(group, {})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != full and (shapes or not may_be_absent):
        raise StateError(
            f"the saved state of {whose} is incomplete: its {group} must hold {full}; "
            f"got {shapes}. Use another copy, or start afresh without it."
        )
    if tensors:
        groups[group] = {name: tensors[name] for name in full}
