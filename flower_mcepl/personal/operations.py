"""Operations of a traced network, by what they do to the channels on axis 1."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from flower_mcepl.masks import channelwise

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = channelwise.BATCH_NORMS
# in eval mode, in which networks are compacted, a dropout does nothing
ELEMENTWISE = (*channelwise.ELEMENTWISE, *channelwise.DROPOUTS)
ELEMENTWISE_CALLS = channelwise.ELEMENTWISE_CALLS | channelwise.DROPOUT_CALLS
BINARY = channelwise.BINARY
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_VIEWS: set[Any] = {torch.reshape, "view", "reshape"}


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value, as the example input gave it; None: it is no tensor."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value has channels."""
    return len(shape_of(node) or ()) >= 2


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes' values are tensors of one shape."""
    return is_tensor(one) and shape_of(one) == shape_of(other)


def is_join(node: fx.Node, one: fx.Node, other: fx.Node) -> bool:
    """Whether a node adds or multiplies two values of one shape, and does no more.

    An addition may have a factor, ``alpha``.
    """
    alone = node.args == (one, other) and not node.kwargs
    return alone and node.target in BINARY and same_shape(one, other)


def is_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node pools each channel by itself, so that a constant stays one."""
    if isinstance(module, channelwise.AVERAGE_POOLS):
        return not any(_tuple(module.padding)) and not module.ceil_mode
    if node.target in channelwise.AVERAGE_POOL_CALLS:  # input, kernel, stride; then what pads
        return len(node.args) <= 3 and not node.kwargs.keys() & {"padding", "ceil_mode"}
    return type(module) in channelwise.POOLS or node.target in channelwise.POOL_CALLS


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def is_spatial_mean(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node averages over axes behind the channels."""
    if node.target not in channelwise.MEANS or "dtype" in node.kwargs:
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    ndim = len(shape_of(source) or ())
    listed = [dims] if isinstance(dims, int) else dims
    return bool(listed) and all(isinstance(d, int) and d % ndim >= 2 for d in listed)


def is_flatten(node: fx.Node, module: nn.Module | None, source: fx.Node) -> bool:
    """Whether a node lays all axes behind the batch's into one."""
    before = shape_of(source) or ()
    if shape_of(node) != (*before[:1], math.prod(before[1:])):
        return False
    if node.target in _VIEWS:
        return _keeps_batch(node)
    return isinstance(module, nn.Flatten) or node.target in channelwise.FLATTENS


def _keeps_batch(node: fx.Node) -> bool:
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    first = sizes[0] if sizes else None
    return bool(first == -1) or (isinstance(first, fx.Node) and reads_batch_size(first))


def as_flatten(node: fx.Node, source: fx.Node) -> None:
    """Let a node flatten, without the number of features that its code may name."""
    if node.op != "call_module":
        node.op, node.target = "call_function", torch.flatten
        node.args, node.kwargs = (source, 1), {}


def reads_batch_size(node: fx.Node) -> bool:
    """Whether a node reads nothing of a tensor but the size of its batch."""
    if node.target == "size" and node.args[1:] == (0,):
        return True
    if node.target is operator.getitem:
        whole = node.args[0]
        return isinstance(whole, fx.Node) and _reads_shape(whole) and bool(node.args[1] == 0)
    return _reads_shape(node) and all(map(reads_batch_size, node.users))


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def name_of(target: object) -> str:
    """Name of what a node calls."""
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def columns_of(layer: nn.Module) -> Tensor:
    """Weights of a layer as [outputs, inputs, elements of the kernel], float64."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().reshape(weight.shape[0], weight.shape[1], -1)


def pads(layer: nn.Module) -> bool:
    """Whether a layer sees zeros around its inputs, so that constants are not so."""
    if isinstance(layer, nn.Linear):
        return False
    padding = layer.padding
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding)  # type: ignore[arg-type]


def called_once(graph_module: fx.GraphModule) -> Iterator[str]:
    """Submodules that one node calls, and whose parameters are theirs alone."""
    calls: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    owners: dict[int, set[str]] = {}
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    read = (str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr")
    others = shared | {name.rpartition(".")[0] for name in read}
    return (name for name, count in calls.items() if count == 1 and name not in others)
