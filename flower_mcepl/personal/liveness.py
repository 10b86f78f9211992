"""Liveness of channels: which are constant, who reads them, which belong together.

Every value of a traced network has channels on axis 1. Values whose channels come and
go together form a group: what elementwise layers, norms, pools and additions lead from
one to the other. Convolutions and linear layers lie between groups: they make the
channels of one (their filters) and read those of another.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from flower_mcepl.masks.channelwise import (
    BINARY,
    DROPOUT_CALLS,
    DROPOUTS,
    ELEMENTWISE,
    ELEMENTWISE_CALLS,
    POOL_CALLS,
    POOLS,
)
from flower_mcepl.models import local_response_norm
from flower_mcepl.personal.places import NORMS

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# in eval mode, in which networks are compacted, a dropout does nothing
_ELEMENTWISE = (*ELEMENTWISE, *DROPOUTS)
_ELEMENTWISE_CALLS = ELEMENTWISE_CALLS | DROPOUT_CALLS
_MEANS: set[Any] = {torch.mean, "mean"}
_FLATTENS: set[Any] = {torch.flatten, "flatten"}


@dataclass
class Group:
    """Channels of several values that come and go together."""

    size: int
    locked: str = ""  # why its channels must stay; empty: they need not
    makers: list[str] = field(default_factory=list)  # layers whose filters they are
    readers: list[tuple[str, "Value"]] = field(default_factory=list)  # layers, what they read
    norms: list[tuple[str, "Value"]] = field(default_factory=list)  # batch norms
    mixing: list[tuple[fx.Node, "Value"]] = field(default_factory=list)  # local response norms
    merged: "Group | None" = None

    def root(self) -> "Group":
        """The group that it has become part of."""
        return self if self.merged is None else self.merged.root()


@dataclass
class Value:
    """One tensor of the graph: its group, and what its features are if constant."""

    group: Group
    factor: int  # features on axis 1 for each channel: more than 1 after a flatten
    constant: Tensor  # [features], float64; not a number where a feature is not constant


class Liveness:
    """Groups of the channels of a traced network."""

    def __init__(self, graph_module: fx.GraphModule, example: Tensor) -> None:
        self.modules = dict(graph_module.named_modules())
        self.groups: list[Group] = []
        self._values: dict[fx.Node, Value] = {}
        self._alone = set(_called_once(graph_module))
        with torch.no_grad():
            ShapeProp(graph_module).propagate(example)
            for node in graph_module.graph.nodes:
                self._take(node)

    def roots(self) -> Iterator[Group]:
        """The groups, each once."""
        return (group for group in self.groups if group.merged is None)

    def _take(self, node: fx.Node) -> None:
        if node.op == "output":
            self._lock(node, "it is what the network returns")
            return
        inputs = [source for source in node.all_input_nodes if source in self._values]
        target = node.target
        module = self.modules.get(str(target)) if node.op == "call_module" else None
        handle = self._rule(node, module, inputs)
        if handle is not None:
            handle()
        elif not _reads_batch_size(node):
            what = type(module).__name__ if module is not None else _name(target)
            self._lock(node, f"{what} mixes channels, or is not known")
            self._new(node, f"it comes from {what}")

    def _rule(
        self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node]
    ) -> Callable[[], None] | None:
        """What a node does to channels; None: nothing that is known."""
        if len(inputs) == 2 and node.target in BINARY and _same_shape(*inputs):
            return lambda: self._join(node, *inputs)
        if len(inputs) != 1 or not _is_tensor(node):
            return None
        (source,) = inputs
        if _is_flatten(node, module, source):
            return lambda: self._flatten(node, source)
        if node.all_input_nodes != inputs:
            return None
        kind, target = type(module), node.target
        if isinstance(module, LAYERS) and kind in LAYERS:
            return self._layer_rule(node, module, source)
        if kind in BATCH_NORMS and getattr(module, "running_mean", None) is not None:
            return (lambda: self._norm(node, source)) if target in self._alone else None
        if kind in NORMS or target in (nn.functional.local_response_norm, local_response_norm):
            return lambda: self._mix(node, source)
        if kind in _ELEMENTWISE or target in _ELEMENTWISE_CALLS or target in BINARY:
            return lambda: self._map(node, source, self._called(node, source))
        if kind in POOLS or target in POOL_CALLS or _is_spatial_mean(node, source):
            return lambda: self._map(node, source, self._values[source].constant)
        return None

    # ---- rules ----

    def _new(self, node: fx.Node, locked: str = "") -> Value | None:
        shape = _shape(node)
        if shape is None or len(shape) < 2:
            return None
        group = Group(shape[1], locked)
        self.groups.append(group)
        unknown = torch.full((shape[1],), math.nan, dtype=torch.float64)
        self._values[node] = value = Value(group, 1, unknown)
        return value

    def _lock(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            if source in self._values:
                self._values[source].group.root().locked = why

    def _layer_rule(
        self, node: fx.Node, module: nn.Module, source: fx.Node
    ) -> Callable[[], None] | None:
        if isinstance(module, nn.Linear):
            usual = len(_shape(source) or ()) == 2
        else:
            settings: Any = module
            usual = settings.groups == 1 and settings.padding_mode == "zeros"
        plain = usual and str(node.target) in self._alone
        return (lambda: self._layer(node, source)) if plain else None

    def _layer(self, node: fx.Node, source: fx.Node) -> None:
        name, read = str(node.target), self._values[source]
        read.group.root().readers.append((name, read))
        made = self._new(node)
        assert made is not None
        made.group.makers.append(name)
        made.constant = self._outputs(self.modules[name], read)

    @staticmethod
    def _outputs(layer: nn.Module, read: Value) -> Tensor:
        """Constant outputs of a layer: no input that is not constant has a weight."""
        weight = columns_of(layer)
        constant = read.constant.nan_to_num(0.0)
        bias = layer.bias.double() if isinstance(layer.bias, Tensor) else 0.0
        outputs = (weight * constant[:, None]).sum((1, 2)) + bias
        moving = read.constant.isnan() | ((constant != 0) & pads(layer))
        outputs[(weight[:, moving] != 0).any(2).any(1)] = math.nan
        return outputs

    def _map(self, node: fx.Node, source: fx.Node, constant: Tensor) -> None:
        value = self._values[source]
        self._values[node] = Value(value.group.root(), value.factor, constant)

    def _norm(self, node: fx.Node, source: fx.Node) -> None:
        value = self._values[source]
        value.group.root().norms.append((str(node.target), value))
        self._map(node, source, self._called(node, source))

    def _mix(self, node: fx.Node, source: fx.Node) -> None:
        value = self._values[source]
        value.group.root().mixing.append((node, value))
        # a channel that is 0 stays so, whatever its neighbors are
        zero = value.constant == 0
        self._map(node, source, torch.where(zero, value.constant, math.nan))

    def _join(self, node: fx.Node, one: fx.Node, other: fx.Node) -> None:
        left, right = self._values[one], self._values[other]
        if left.factor != right.factor:
            self._lock(node, "values of different layouts are added")
        merge(left.group.root(), right.group.root())
        multiplies = node.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_")
        both = torch.mul if multiplies else torch.add
        self._map(node, one, both(left.constant, right.constant))

    def _flatten(self, node: fx.Node, source: fx.Node) -> None:
        value, shape = self._values[source], _shape(node)
        assert shape is not None
        factor = shape[1] // len(value.constant)
        constant = value.constant.repeat_interleave(factor)
        self._values[node] = Value(value.group.root(), value.factor * factor, constant)

    def _called(self, node: fx.Node, source: fx.Node) -> Tensor:
        """What an elementwise layer makes of constants."""
        constant, shape = self._values[source].constant, _shape(source)
        assert shape is not None
        inputs = constant.float().reshape(1, -1, *(1 for _ in shape[2:]))
        args = [inputs if arg is source else arg for arg in node.args]
        kwargs = {key: inputs if arg is source else arg for key, arg in node.kwargs.items()}
        if node.op == "call_module":
            outputs = self.modules[str(node.target)](*args, **kwargs)
        elif node.op == "call_method":
            outputs = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            outputs = node.target(*args, **kwargs)
        return outputs.double().reshape(-1)  # type: ignore[no-any-return]


def merge(one: Group, other: Group) -> None:
    """Make two groups one."""
    if one is other:
        return
    for name in ("makers", "readers", "norms", "mixing"):
        getattr(one, name).extend(getattr(other, name))
    one.locked = one.locked or other.locked
    other.merged = one


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


def _called_once(graph_module: fx.GraphModule) -> Iterator[str]:
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


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _is_tensor(node: fx.Node) -> bool:
    return len(_shape(node) or ()) >= 2


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return _is_tensor(one) and _shape(one) == _shape(other)


def _reads_batch_size(node: fx.Node) -> bool:
    return node.target == "size" and node.args[1:] == (0,)


def _is_spatial_mean(node: fx.Node, source: fx.Node) -> bool:
    if node.target not in _MEANS or "dtype" in node.kwargs:
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    ndim = len(_shape(source) or ())
    listed = [dims] if isinstance(dims, int) else dims
    return bool(listed) and all(isinstance(d, int) and d % ndim >= 2 for d in listed)


def _is_flatten(node: fx.Node, module: nn.Module | None, source: fx.Node) -> bool:
    before = _shape(source) or ()
    if _shape(node) != (*before[:1], math.prod(before[1:])):
        return False
    if node.target in ("view", "reshape"):
        return bool(node.args[2:] == (-1,) and _first_is_batch(node, source))
    return isinstance(module, nn.Flatten) or node.target in _FLATTENS


def _first_is_batch(node: fx.Node, source: fx.Node) -> bool:
    first = node.args[1]
    return isinstance(first, fx.Node) and _reads_batch_size(first) and first.args[0] is source


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))
