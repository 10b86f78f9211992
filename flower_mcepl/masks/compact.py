"""Compact training: a step that calculates the filters that are on, and no others.

It gives what the whole network gives, and the scores' gradients, up to rounding; all
but the gradients of the gates. That of a gate that is off needs the output of its
filter (see `formulas`), which is what a compact step does not calculate.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.gates import LAYER, gate_name, masks_of
from flower_mcepl.masks.layers import LayerSpec
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.placement import call_with, evaluating, slots_of
from flower_mcepl.masks.thin import Thin, called, whole
from flower_mcepl.models import local_response_norm

EXACT = 1e-4  # of outputs, relative to the largest
_F = nn.functional
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# layers and networks look functions up in torch.nn.functional, where the classes of
# arithmetic put their own
_LOOKED_UP = {id(f): name for name, f in vars(_F).items() if callable(f)}


@dataclass(frozen=True)
class _Filters:
    """Filters of a layer that are on: their masked weights and places."""

    weight: Tensor  # [filters that are on, ...]
    on: Tensor | None = None  # places among all, ascending; None: all are on
    off: Tensor | None = None


@final
class CompactNetwork:
    """A masked model that calculates its live filters alone, called like the model.

    Filters are left out of convolutions (not grouped or transposed) and linear layers,
    and so are the next layers' weights for them; between these stand elementwise
    layers, pools, batch and local response norms, flatten and residual additions. Every
    other layer sees whole tensors, in which a filter that is off is its bias.

    Parameters
    ----------
    model : MaskedModel
        The model, whose scores, rules and neighbors' masks are read at each call.

    Raises
    ------
    UnsupportedLayerError
        If the network's code cannot be traced (`torch.fx`), or it has no filters that
        could be left out.
    """

    def __init__(self, model: MaskedModel) -> None:
        self.model = model
        self._graphs = _graphs_of(model)
        self._slots = slots_of(model.module, model.layers)
        self._thin = self._thin_layers()
        if not any(name in model.rules.filters for name in self._thin.values()):
            raise UnsupportedLayerError(
                "compact training leaves out filters of convolutions and linear layers that the "
                f"network calls as modules; {type(model.module).__name__} has none with gates. "
                "Leave filters-training at full."
            )

    @property
    def is_smaller(self) -> bool:
        """Whether any filter is off."""
        rules, layers = self.model.rules, self.model.layers
        return any(rules.num_live(layers[n]) < layers[n].num_filters for n in rules.filters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with its weights masked."""
        filters, placed = self._weights()
        layers = {layer: filters[name] for layer, name in self._thin.items()}
        graph = self._graphs[self.model.module.training]
        if not placed:
            return graph.run(layers, args, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return graph.run(layers, args, kwargs)

        return call_with(run, self._slots, placed, args, kwargs)

    def _thin_layers(self) -> dict[nn.Module, str]:
        """Layers of which filters are left out, with the name of their weight."""
        modules, read = set[nn.Module](), set[int]()
        for graph in self._graphs.values():
            modules |= graph.modules()
            read |= graph.reads()
        return {
            layer: name
            for name, slots in self._slots.items()
            if id(self.model.module.get_parameter(name)) not in read
            and all(layer in modules and _is_plain(layer) for layer, _ in slots)
            for layer, _ in slots
        }

    def _weights(self) -> tuple[dict[str, _Filters], dict[str, Tensor]]:
        """Masked weights: of thin layers, then whole ones of all others."""
        y, rules, layers = self.model.aggregation(), self.model.rules, self.model.layers
        gates = {
            name: maths.largest_mask(y[gate_name(name)], keep=rules.num_live(layers[name]))
            for name in rules.filters
        }
        thin = set(self._thin.values())
        by_layer = rules.budget == LAYER and not rules.blocks
        by_layer = by_layer and all(name in thin for name in rules.filters)
        masks = None if by_layer else masks_of(y, layers, rules)
        filters, placed = {}, {}
        for name, spec in layers.items():
            mask = None if masks is None else masks[name]
            if name in thin:
                filters[name] = self._filters(spec, y[name], gates.get(name), mask)
            else:
                placed[name] = self._placed(spec, y[name], gates.get(name), mask)
        return filters, placed

    def _filters(
        self, spec: LayerSpec, y: Tensor, gates: Tensor | None, mask: Tensor | None
    ) -> _Filters:
        if gates is None or bool(gates.all()):
            return _Filters(self._masked(spec, y, mask, None))
        on, off = gates.nonzero().squeeze(1), (~gates).nonzero().squeeze(1)
        rows = None if mask is None else mask.index_select(0, on)
        return _Filters(self._masked(spec, y.index_select(0, on), rows, on), on, off)

    def _masked(self, spec: LayerSpec, y: Tensor, mask: Tensor | None, on: Tensor | None) -> Tensor:
        """Weights of filters that are on, all others left out."""
        w: Tensor = self.model.module.get_parameter(spec.name)
        w = w if on is None else w.index_select(0, on)
        masked = (
            maths.masked_weight(w, y, retention=self.model.retention[spec.name])
            if mask is None
            else w * maths.straight_through(y, mask)
        )
        return masked * self._scale(spec)

    def _placed(
        self, spec: LayerSpec, y: Tensor, gates: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        masked = self._masked(spec, y, mask, None)
        return masked if gates is None else masked * spec.spread(gates)

    def _scale(self, spec: LayerSpec) -> float:
        return self.model.rules.scale(spec) if spec.name in self.model.rules.filters else 1.0


def check_compact(compact: CompactNetwork, outputs: Callable[[Any], Tensor]) -> None:
    """Check that a compact network gives what its model gives.

    Parameters
    ----------
    compact : CompactNetwork
        The network; its model is to be in eval mode.
    outputs : callable
        Outputs of a network for some batch.

    Raises
    ------
    UnsupportedLayerError
        If they differ by more than `EXACT`.
    """
    with torch.no_grad():
        due, came = outputs(compact.model), outputs(compact)
    largest = max(float(due.abs().max()), torch.finfo(due.dtype).tiny)
    difference = float((due - came).abs().max()) / largest
    if not difference <= EXACT:
        raise UnsupportedLayerError(
            "a compact step must give what the whole one gives, within "
            f"{EXACT:g} of the largest output; got a difference of {difference:.2g}. Set "
            "filters-training to full, and report this with the network."
        )


def _graphs_of(model: MaskedModel) -> "dict[bool, _Graph]":
    """Graphs of a model's network by whether it trains, which its code may ask."""
    with evaluating(model):
        graphs = {False: _Graph(model.module)}
        model.train()
        return {**graphs, True: _Graph(model.module)}


def _traced(module: nn.Module) -> fx.Graph:
    tracer = fx.Tracer(autowrap_functions=(local_response_norm,))
    try:
        return tracer.trace(module)
    except Exception as error:  # whatever a network's code does to a tracer
        raise UnsupportedLayerError(
            f"torch.fx cannot trace {type(module).__name__} ({type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]})"
        ) from error


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's filters may be left out."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer) is nn.Linear:
        return True
    if type(layer) not in _CONVOLUTIONS:
        return False
    settings: Any = layer
    return bool(settings.groups == 1 and settings.padding_mode == "zeros")


@final
class _Graph:
    """A traced network, run node by node on tensors some of which are thin."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graph = _traced(module)
        self._signature = inspect.signature(module.forward)
        self._done: dict[fx.Node, list[fx.Node]] = {}  # by node: values that it reads as the last
        last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        for source, node in last.items():
            self._done.setdefault(node, []).append(source)

    def modules(self) -> set[nn.Module]:
        """Submodules that are called as a whole."""
        nodes = [node for node in self.graph.nodes if node.op == "call_module"]
        return {self.module.get_submodule(str(node.target)) for node in nodes}

    def reads(self) -> set[int]:
        """Ids of the parameters that the network's own code reads."""
        nodes = [node for node in self.graph.nodes if node.op == "get_attr"]
        return {id(_attribute(self.module, str(node.target))) for node in nodes}

    def run(
        self, layers: Mapping[nn.Module, _Filters], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Outputs of the network, with the filters of some layers."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                return whole(fx.node.map_arg(node.args[0], values.__getitem__))
            values[node] = (
                bound.arguments[str(node.target)]
                if node.op == "placeholder"
                else self._value(node, layers, values)
            )
            for source in self._done.get(node, ()):
                del values[source]
        raise AssertionError("a graph ends with its output")

    def _value(
        self, node: fx.Node, layers: Mapping[nn.Module, _Filters], values: dict[fx.Node, Any]
    ) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return _attribute(self.module, target)
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            layer = self.module.get_submodule(target)
            if layer in layers:
                return _run_layer(layer, layers[layer], *args, **kwargs)
            return called(layer, layer, args, kwargs)
        if node.op == "call_method":
            return called(_method(target), target, args, kwargs)
        name = _LOOKED_UP.get(id(target))
        return called(target if name is None else getattr(_F, name), target, args, kwargs)


def _run_layer(layer: nn.Module, filters: _Filters, input: Tensor | Thin) -> Tensor | Thin:
    """Outputs of a layer's live filters, from the inputs that are live."""
    weight, bias = filters.weight, layer.bias
    assert bias is None or isinstance(bias, Tensor)
    axis = 1 if isinstance(layer, _CONVOLUTIONS) else len(input.shape) - 1
    batched = len(input.shape) == weight.ndim or isinstance(layer, nn.Linear)
    if not batched:
        raise UnsupportedLayerError(
            f"compact training needs a batch on the first axis; {type(layer).__name__} was called "
            f"with {tuple(input.shape)}. Set filters-training to full."
        )
    own = bias if bias is None or filters.on is None else bias.index_select(0, filters.on)
    if isinstance(input, Thin) and input.axis == axis:
        output = _apply(layer, input.live, weight.index_select(1, input.on), own)
        if not input.is_zero:
            output = output + _apply(layer, input.rest, weight.index_select(1, input.off), None)
    else:
        output = _apply(layer, whole(input), weight, own)
    if filters.on is None or filters.off is None:
        return output
    rest = output.new_zeros(1) if bias is None else bias.index_select(0, filters.off)
    sizes = [1, *output.shape[1:]]
    sizes[axis] = len(filters.off)
    along = [-1 if place == axis else 1 for place in range(output.ndim)]
    # a copy: layers that work in place write on it
    return Thin(output, rest.view(along).expand(sizes).clone(), filters.on, filters.off, axis)


def _apply(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return _F.linear(input, weight, bias)
    convolution: Any = layer
    output: Tensor = convolution._conv_forward(input, weight, bias)
    return output


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
