"""Calls of a network: inputs go to the device, and outputs become one tensor."""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flower_mcepl.errors import DataError

SQUASHES = ("sigmoid", "sigmoid_", "expit", "softmax")  # functions of torch
OUTPUTS = ("logits", "out")  # what Transformers and torchvision call them in a dict


def call(network: Callable[..., Any], inputs: Any, *, device: str, dtype: torch.dtype) -> Any:
    """Outputs of a network for a batch of inputs.

    A tensor is the network's one argument, a tuple or list its arguments in order, a
    mapping its arguments by name. Floats take ``dtype``, that of the network's weights;
    whole numbers and booleans stay as they are, because they may be indices.
    """
    placed = moved(inputs, device=device, dtype=dtype)
    if isinstance(placed, Mapping):
        return network(**placed)
    return network(*placed) if isinstance(placed, (tuple, list)) else network(placed)


@final
class Squashing(TorchFunctionMode):
    """Context that sees whether a network's outputs come from a sigmoid or softmax.

    What such a function returned last is kept, and outputs that lie in its memory are
    the same numbers, whatever their shape. An attention's softmax is none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: Any = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, and keep what it returns if it squashes."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in SQUASHES:
            self._last = result
        return result

    def gave(self, outputs: Tensor) -> bool:
        """Whether these are the outputs of the last such function."""
        if not isinstance(self._last, Tensor):
            return False
        return outputs.untyped_storage().data_ptr() == self._last.untyped_storage().data_ptr()


def float_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Dtype of a network's float weights; that of most of their elements."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def taken(inputs: Any, network: nn.Module) -> Any:
    """Inputs on the CPU as `call` gives them to a network: floats in its dtype."""
    return moved(inputs, device="cpu", dtype=float_dtype(dict(network.named_parameters())))


def one_output(outputs: Any) -> Tensor:
    """The tensor that a network predicts with, where there is one meaning.

    That is a tensor; ``logits`` or ``out`` of a mapping, object or named tuple; or the
    only entry of a mapping, tuple or list.

    Raises
    ------
    DataError
        If it returns anything else.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in OUTPUTS:
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    values = [*outputs.values()] if isinstance(outputs, Mapping) else outputs
    if isinstance(values, (tuple, list)) and len(values) == 1 and isinstance(values[0], Tensor):
        return values[0]
    raise DataError(
        "a network must return one tensor, or one that is called logits or out; got "
        f"{described(outputs)}. Let its forward return the predictions alone, or pass "
        "Task(outputs=...) with a function that picks them."
    )


def described(value: Any) -> str:
    """Type, shape, dtype and range of what came, on one line."""
    if isinstance(value, Tensor):
        return _described(value)
    if isinstance(value, Mapping):
        entries = (f"{key}: {described(entry)}" for key, entry in [*value.items()][:4])
        return f"{type(value).__name__} of {', '.join(entries) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        more = ", ..." if len(value) > 4 else ""
        entries = (described(entry) for entry in value[:4])
        return f"{type(value).__name__} of {', '.join(entries) or 'nothing'}{more}"
    return repr(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__


def _described(tensor: Tensor) -> str:
    text = str(tensor.dtype).removeprefix("torch.")
    try:
        text += f" {list(tensor.shape)}"
        if tensor.numel() and tensor.dtype != torch.bool and not tensor.is_complex():
            text += f" with values {tensor.min().item():g}..{tensor.max().item():g}"
    except RuntimeError:  # sparse, nested and rare types have no minimum, or no shape
        return text
    return text


def moved(inputs: Any, *, device: str, dtype: torch.dtype) -> Any:
    """Inputs on the device of the network, floats in its dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype)
    if isinstance(inputs, Mapping):
        return {key: moved(value, device=device, dtype=dtype) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [moved(value, device=device, dtype=dtype) for value in inputs]
    return inputs
