"""Tensors in the place of a module's weights for a while, and modules kept in eval."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Variable

Slot = tuple[nn.Module, str]
"""A submodule, and the name of one of its own parameters."""


def slots_of(module: nn.Module, names: Mapping[str, object]) -> dict[str, list[Slot]]:
    """Every place of the named parameters in a module, each once.

    Layers that share a weight are several places; one layer that is registered under
    two names is one.
    """
    slots: dict[str, list[Slot]] = {name: [] for name in names}
    by_id = {id(module.get_parameter(name)): name for name in names}
    for submodule in module.modules():  # each once, whatever its names
        for local, parameter in submodule._parameters.items():
            name = by_id.get(id(parameter))
            if name is not None:
                slots[name].append((submodule, local))
    return slots


# torch.func.functional_call would do but for two things: a layer with two names is left
# with a plain tensor where its parameter was; and it puts the weights back before the
# backward pass, in which gradient checkpointing calls the layers once more.
def call_with(
    module: Callable[..., Any],
    slots: Mapping[str, list[Slot]],
    tensors: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a module with tensors in the place of its weights.

    They stand there in the forward pass, and again in the backward pass.
    """
    with in_place(slots, tensors):
        outputs = module(*args, **(kwargs or {}))

    def again(gradient: Tensor) -> None:
        first = next(iter(tensors))
        submodule, local = slots[first][0]
        if submodule._parameters[local] is not tensors[first]:  # not of another output
            stack = contextlib.ExitStack()
            stack.enter_context(in_place(slots, tensors))
            Variable._execution_engine.queue_callback(stack.close)

    for output in _tensors(outputs):
        if output.requires_grad:
            output.register_hook(again)  # type: ignore[no-untyped-call]
    return outputs


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _tensors(value)


@contextlib.contextmanager
def in_place(slots: Mapping[str, list[Slot]], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let tensors stand in the place of weights, inside the block alone."""
    before = [(slot, slot[0]._parameters[slot[1]]) for name in tensors for slot in slots[name]]
    try:
        for name, tensor in tensors.items():
            for submodule, local in slots[name]:
                _put(submodule, local, tensor)
        yield
    finally:
        for (submodule, local), parameter in before:
            _put(submodule, local, parameter)


def _put(submodule: nn.Module, local: str, tensor: Tensor | None) -> None:
    submodule._parameters[local] = tensor  # type: ignore[assignment]
    if isinstance(submodule, nn.RNNBase):  # it calculates with a list of its own
        place = submodule._flat_weights_names.index(local)
        submodule._flat_weights[place] = tensor


def kept_in_eval(module: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that the model function left in eval mode.

    None where the whole network is: so are those that libraries hand out.
    """
    if not module.training:
        return ()
    return tuple(name for name, submodule in module.named_modules() if not submodule.training)


def train_mode(module: nn.Module, frozen: tuple[str, ...]) -> None:
    """Put a module in train mode, but for the submodules that stay in eval mode."""
    module.train()
    for name in frozen:
        module.get_submodule(name).training = False


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and afterwards every submodule back as it was."""
    before = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in before:
            submodule.training = training
