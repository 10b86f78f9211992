"""Compact networks: without emptied filters, and without inputs that nobody reads.

Torch-Pruning's dependency graph was tried and does not fit: it knows what must go
together, but not what is constant; it takes a local response norm for elementwise, and
breaks a group norm.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.models import local_response_norm
from flower_mcepl.personal.exporting import Agreement, agreement, run_of
from flower_mcepl.personal.liveness import Group, Liveness, Value, columns_of, pads
from flower_mcepl.personal.places import PlacedNorm, placed_norm

EXACT = 1e-5  # of outputs, relative to the largest, at least 1


@dataclass(frozen=True)
class Compact:
    """A compact network, and what became of it."""

    module: nn.Module
    filters: dict[str, tuple[int, int]]  # of each layer that has lost some: before, after
    parameters: tuple[int, int]  # before, after
    locked: dict[str, str] = field(default_factory=dict)  # layers with empty filters: why they stay

    def __str__(self) -> str:
        before, after = self.parameters
        layers = ", ".join(f"{name} {a} to {b}" for name, (a, b) in self.filters.items())
        return f"{after:,} of {before:,} parameters; filters: {layers or 'all stay'}"


def compact(module: nn.Module, example_input: Tensor) -> Compact:
    """Return the network without what a mask has emptied; its outputs stay the same.

    A filter goes if what it puts out is constant, or read by nobody; its constant goes
    into the next layers' biases. That is done through convolutions, linear layers,
    batch norms, activations, pools, flatten and residual additions, again and again
    until nothing changes. A local response norm keeps the places of channels that are
    gone. Where a layer mixes channels otherwise, as a group norm does, or is not known,
    the filters before it stay, and ``locked`` says so.

    Parameters
    ----------
    module : nn.Module
        The network with its weights under their masks, in eval mode; it stays as it is.
    example_input : Tensor
        A batch of inputs.

    Raises
    ------
    UnsupportedLayerError
        If its code cannot be traced (`torch.fx`), or the outputs would differ.
    """
    traced = _traced(module, example_input)
    sizes = _sizes(traced)
    while _shrink_once(traced, liveness := Liveness(traced, example_input)):
        pass
    after = _sizes(traced)
    found = agreement(run_of(module), run_of(traced), [example_input])
    if not found.holds(EXACT):
        raise UnsupportedLayerError(
            f"a compact network must give what the whole one gives, within {EXACT:g}; got {found}. "
            "Use the whole one, and report this with the network."
        )
    return Compact(
        traced,
        {name: (sizes[name], after[name]) for name in sizes if sizes[name] != after[name]},
        (_num_parameters(module), _num_parameters(traced)),
        _locked(liveness),
    )


def compact_or_whole(module: nn.Module, batches: Sequence[Tensor]) -> tuple[nn.Module, str]:
    """The compact network if it gives the same for all batches, else the whole one.

    Returns the network, and a line that says what was done.
    """
    try:
        small = compact(module, batches[0][:8])
    except UnsupportedLayerError as error:
        return module, f"not compact: {error}"
    found: Agreement = agreement(run_of(module), run_of(small.module), batches)
    if not found.holds(EXACT):
        return module, f"not compact: the whole network and the compact one differ: {found}"
    stay = "; ".join(f"{name} stays: {why}" for name, why in small.locked.items())
    return small.module, f"compact: {small}{f' ({stay})' if stay else ''}; {found}"


def _traced(module: nn.Module, example: Tensor) -> fx.GraphModule:
    tracer = fx.Tracer(autowrap_functions=(local_response_norm,))
    whole = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        graph = tracer.trace(whole)
        traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
        with torch.no_grad():
            traced(example)
    except Exception as error:  # whatever a network's code does to a tracer
        raise UnsupportedLayerError(
            f"torch.fx cannot trace {type(module).__name__} ({type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}). Use the whole network."
        ) from error
    return traced


def _shrink_once(traced: fx.GraphModule, liveness: Liveness) -> bool:
    """Remove what can go now; whether anything went."""
    changed = False
    for group in liveness.roots():
        keep = _kept(group, liveness)
        if len(keep) < group.size:
            _shrink(traced, group, keep, liveness)
            changed = True
    traced.recompile()
    return changed


def _kept(group: Group, liveness: Liveness) -> list[int]:
    """Channels of a group that must stay; at least one."""
    everything = list(range(group.size))
    if group.locked or not group.makers or not group.readers:
        return everything
    keep = torch.zeros(group.size, dtype=torch.bool)
    for name, value in group.readers:
        keep |= ~_spared(liveness.modules[name], value)
    for _, value in group.mixing:
        keep |= ~(value.constant == 0).reshape(group.size, -1).all(1)
    return [int(channel) for channel in keep.nonzero()] or [0]


def _spared(layer: nn.Module, value: Value) -> Tensor:
    """Channels that a layer does without: unread, or constant and no zeros around."""
    unread = (columns_of(layer) == 0).all(2).all(0)
    constant = ~value.constant.isnan() & ((value.constant == 0) | (not pads(layer)))
    return (unread | constant).reshape(-1, value.factor).all(1)


def _shrink(traced: fx.GraphModule, group: Group, keep: list[int], liveness: Liveness) -> None:
    for name in group.makers:
        _keep_rows(liveness.modules[name], keep)
    for name, value in group.norms:
        _keep_norm(liveness.modules[name], _features(keep, value.factor))
    for name, value in group.readers:
        _keep_columns(liveness.modules[name], value, _features(keep, value.factor))
    for node, value in group.mixing:
        module = liveness.modules.get(str(node.target)) if node.op == "call_module" else None
        placed = placed_norm(node, module, len(value.constant)).without(keep)
        _put(traced, node, placed)


def _features(keep: list[int], factor: int) -> list[int]:
    return [channel * factor + k for channel in keep for k in range(factor)]


def _keep_rows(layer: nn.Module, keep: list[int]) -> None:
    assert isinstance(layer.weight, Tensor)
    layer.weight = _fixed(layer.weight[keep])
    if isinstance(layer.bias, Tensor):
        layer.bias = _fixed(layer.bias[keep])
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(keep))


def _keep_norm(norm: nn.Module, keep: list[int]) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is not None:
            setattr(norm, name, _fixed(tensor[keep]))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[keep].clone())
    norm.num_features = len(keep)  # type: ignore[assignment]


def _keep_columns(layer: nn.Module, value: Value, keep: list[int]) -> None:
    """Read these inputs alone; what the others were goes into the bias."""
    assert isinstance(layer.weight, Tensor)
    gone = torch.ones(len(value.constant), dtype=torch.bool)
    gone[keep] = False
    constant = torch.where(gone, value.constant.nan_to_num(0.0), 0.0)
    added = (columns_of(layer).sum(2) * constant).sum(1)
    if bool((added != 0).any()):
        bias = layer.bias.double() if isinstance(layer.bias, Tensor) else 0.0
        layer.bias = _fixed((bias + added).to(layer.weight.dtype))
    layer.weight = _fixed(layer.weight[:, keep])
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(keep))


def _put(traced: fx.GraphModule, node: fx.Node, placed: PlacedNorm) -> None:
    """Let a node call this norm."""
    name = str(node.target) if node.op == "call_module" else f"placed_{node.name}"
    traced.add_submodule(name, placed)
    source = node.all_input_nodes[0]
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _sizes(module: nn.Module) -> dict[str, int]:
    """Filters of each layer."""
    return {
        name: len(weight)
        for name, layer in module.named_modules()
        if isinstance(weight := getattr(layer, "weight", None), Tensor)
        and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def _locked(liveness: Liveness) -> dict[str, str]:
    """Layers with empty filters that stay, and why."""
    reasons = {}
    for group in liveness.roots():
        for name in group.makers if group.locked else ():
            empty = (columns_of(liveness.modules[name]) == 0).all(2).all(1)
            if bool(empty.any()):
                reasons[name] = group.locked
    return reasons


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
