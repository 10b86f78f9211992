"""Liveness of channels: which are constant, who reads them, which belong together.

Every value of a traced network has channels on axis 1. Values whose channels come and
go together form a group: what elementwise layers, norms, pools, additions and grouped
convolutions lead from one to the other. Other convolutions and linear layers lie
between groups: they make the channels of one (their filters) and read those of another.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from flower_mcepl.agents.tasks.network import float_dtype
from flower_mcepl.models import local_response_norm
from flower_mcepl.personal import operations as ops
from flower_mcepl.personal.operations import columns_of, pads, shape_of
from flower_mcepl.personal.places import NORMS


@dataclass
class Group:
    """Channels of several values that come and go together."""

    size: int
    locked: str = ""  # why its channels must stay; empty: they need not
    # channels that stand side by side go as one, in steps of so many: a group of a norm
    step: int = 1
    step_of: str = ""  # whose step it is
    makers: list[str] = field(default_factory=list)  # layers whose filters they are
    readers: list[tuple[str, "Value"]] = field(default_factory=list)  # layers, what they read
    # norms and grouped convolutions, through which channels pass, alone or in steps
    passed: list[tuple[str, "Value"]] = field(default_factory=list)
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
        self.made: dict[str, Tensor] = {}  # constants among the outputs of each maker
        self._values: dict[fx.Node, Value] = {}
        self._alone = set(ops.called_once(graph_module))
        self._dtype = float_dtype(dict(graph_module.named_parameters()))
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
        elif not ops.reads_batch_size(node):
            what = type(module).__name__ if module is not None else ops.name_of(target)
            self._lock(node, self._why_not(node, module, what))
            self._new(node, f"it comes from {what}")

    def _why_not(self, node: fx.Node, module: nn.Module | None, what: str) -> str:
        known = isinstance(module, (*ops.LAYERS, *ops.BATCH_NORMS, nn.GroupNorm))
        if known and str(node.target) not in self._alone:
            return f"{what} {node.target} is called more than once, or shares its weights"
        return f"{what} mixes channels, or is not known"

    def _rule(
        self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node]
    ) -> Callable[[], None] | None:
        """What a node does to channels; None: nothing that is known."""
        if len(inputs) == 2 and ops.is_join(node, *inputs):
            return lambda: self._join(node, *inputs)
        if len(inputs) != 1 or not ops.is_tensor(node):
            return None
        (source,) = inputs
        if ops.is_flatten(node, module, source):
            return lambda: self._flatten(node, source)
        if node.all_input_nodes != inputs:
            return None
        if module is not None and str(node.target) in self._alone:
            rule = self._module_rule(node, module, source)
            if rule is not None:
                return rule
        return self._channelwise_rule(node, module, source)

    def _module_rule(
        self, node: fx.Node, module: nn.Module, source: fx.Node
    ) -> Callable[[], None] | None:
        """The rule of a module with parameters that are its own."""
        kind = type(module)
        if kind is nn.Linear and len(shape_of(source) or ()) == 2:
            return lambda: self._layer(node, source)
        if isinstance(module, ops.CONVOLUTIONS) and kind in ops.CONVOLUTIONS:
            if module.padding_mode != "zeros":
                return None
            if module.groups == 1:
                return lambda: self._layer(node, source)
            return self._grouped_rule(node, module, source)
        if kind in ops.BATCH_NORMS and module.running_mean is not None:
            return lambda: self._pass(node, source, self._called(node, source))
        if isinstance(module, nn.GroupNorm):
            return lambda: self._group_norm(node, module, source)
        return None

    def _channelwise_rule(
        self, node: fx.Node, module: nn.Module | None, source: fx.Node
    ) -> Callable[[], None] | None:
        kind, target = type(module), node.target
        if kind in NORMS or target in (nn.functional.local_response_norm, local_response_norm):
            return lambda: self._mix(node, source)
        calls = target in ops.ELEMENTWISE_CALLS or target in ops.BINARY
        if kind in ops.ELEMENTWISE or calls:
            return lambda: self._map(node, source, self._called(node, source))
        if ops.is_pool(node, module) or ops.is_spatial_mean(node, source):
            return lambda: self._map(node, source, self._values[source].constant)
        return None

    # ---- rules ----

    def _new(self, node: fx.Node, locked: str = "") -> Value | None:
        shape = shape_of(node)
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

    def _layer(self, node: fx.Node, source: fx.Node) -> None:
        name, read = str(node.target), self._values[source]
        read.group.root().readers.append((name, read))
        made = self._new(node)
        assert made is not None
        made.group.makers.append(name)
        made.constant = self.made[name] = self._outputs(self.modules[name], read.constant)

    @staticmethod
    def _outputs(layer: nn.Module, read: Tensor) -> Tensor:
        """Constant outputs of a layer: no input that is not constant has a weight."""
        weight = columns_of(layer)
        groups = getattr(layer, "groups", 1)
        # [groups, outputs, inputs, elements] against [groups, 1, inputs]
        weight = weight.reshape(groups, -1, *weight.shape[1:])
        read = read.reshape(groups, 1, -1)
        constant = read.nan_to_num(0.0)
        bias = layer.bias.double() if isinstance(layer.bias, Tensor) else 0.0
        outputs = (weight.sum(3) * constant).sum(2).flatten() + bias
        moving = read.isnan() | ((constant != 0) & pads(layer))
        outputs[((weight != 0).any(3) & moving).any(2).flatten()] = math.nan
        return outputs

    def _map(
        self, node: fx.Node, source: fx.Node, constant: Tensor, *, factor: int | None = None
    ) -> None:
        value = self._values[source]
        self._values[node] = Value(value.group.root(), factor or value.factor, constant)

    def _pass(
        self, node: fx.Node, source: fx.Node, constant: Tensor, *, factor: int | None = None
    ) -> None:
        value = self._values[source]
        value.group.root().passed.append((str(node.target), value))
        self._map(node, source, constant, factor=factor)

    # A norm over a group of channels sees how many there are, also of constant ones. So
    # only whole groups can go, where all channels are constant.
    def _group_norm(self, node: fx.Node, norm: nn.GroupNorm, source: fx.Node) -> None:
        self._step(source, norm.num_channels // norm.num_groups, f"a group of {node.target}")
        # of more than one pixel, which torch asks for; constants are the same in all
        self._pass(node, source, self._called(node, source, pixels=2))

    def _grouped_rule(
        self, node: fx.Node, layer: nn.Module, source: fx.Node
    ) -> Callable[[], None] | None:
        """A grouped convolution: groups of inputs and of outputs go together."""
        value, groups = self._values[source], int(layer.groups)  # type: ignore[arg-type]
        inputs, outputs = (int(getattr(layer, k)) for k in ("in_channels", "out_channels"))
        if value.factor * outputs % inputs:
            return None

        def handle() -> None:
            self._step(source, inputs // groups, f"a group of {node.target}")
            constant = self._outputs(layer, value.constant)
            self._pass(node, source, constant, factor=value.factor * outputs // inputs)

        return handle

    def _step(self, source: fx.Node, features: int, whose: str) -> None:
        """Let channels go in steps of so many features alone."""
        value = self._values[source]
        step = features // math.gcd(features, value.factor)
        _refine(value.group.root(), step, whose)

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
        if node.target in ops.PRODUCTS:
            both = left.constant * right.constant
            both[(left.constant == 0) | (right.constant == 0)] = 0
        else:
            both = left.constant + right.constant
        self._map(node, one, both)

    def _flatten(self, node: fx.Node, source: fx.Node) -> None:
        value, shape = self._values[source], shape_of(node)
        assert shape is not None
        ops.as_flatten(node, source)
        factor = shape[1] // len(value.constant)
        constant = value.constant.repeat_interleave(factor)
        self._map(node, source, constant, factor=value.factor * factor)

    def _called(self, node: fx.Node, source: fx.Node, *, pixels: int = 1) -> Tensor:
        """What a layer makes of constants."""
        constant, shape = self._values[source].constant, shape_of(source)
        assert shape is not None
        space = (pixels,) if pixels > 1 else (1 for _ in shape[2:])
        ones = torch.ones(1, len(constant), *space, dtype=self._dtype)
        inputs = ones * constant.to(self._dtype).reshape(1, -1, *(1 for _ in ones.shape[2:]))
        args = [inputs if arg is source else arg for arg in node.args]
        kwargs = {key: inputs if arg is source else arg for key, arg in node.kwargs.items()}
        if node.op == "call_module":
            outputs = self.modules[str(node.target)](*args, **kwargs)
        elif node.op == "call_method":
            outputs = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            outputs = node.target(*args, **kwargs)
        return outputs.double().reshape(len(constant), -1)[:, 0]  # type: ignore[no-any-return]


def merge(one: Group, other: Group) -> None:
    """Make two groups one."""
    if one is other:
        return
    for name in ("makers", "readers", "passed", "mixing"):
        getattr(one, name).extend(getattr(other, name))
    one.locked = one.locked or other.locked
    _refine(one, other.step, other.step_of)
    other.merged = one


def _refine(group: Group, step: int, whose: str) -> None:
    if group.step % step:
        group.step = math.lcm(group.step, step)
        group.step_of = whose
