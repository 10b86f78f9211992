"""Compact networks: without emptied filters, and without inputs that nobody reads.

Torch-Pruning's dependency graph was tried and does not fit: it knows what must go
together, but not what is constant; it takes a local response norm for elementwise, and
breaks a group norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.models import local_response_norm
from flower_mcepl.personal.cutting import (
    features_of,
    keep_columns,
    keep_passed,
    keep_rows,
    put_norm,
    refill,
)
from flower_mcepl.personal.exporting import Agreement, agreement, run_of
from flower_mcepl.personal.liveness import Group, Liveness, Value
from flower_mcepl.personal.operations import LAYERS, columns_of, pads
from flower_mcepl.personal.places import placed_norm

EXACT = 1e-5  # of outputs, relative to the largest, at least 1
# multiplications spared a pixel, for each channel that is laid out anew for it: on one
# core 3x3 convolutions of 64 channels, half of them off, took .67 of their time (288),
# those of 16 no less than before (72), 1x1 of 64 more (32)
REFILL_WORTH = 128


@dataclass(frozen=True)
class Compact:
    """A compact network, and what became of it."""

    module: nn.Module
    filters: dict[str, tuple[int, int]]  # of each layer that has lost some: before, after
    parameters: tuple[int, int]  # before, after
    locked: dict[str, str] = field(default_factory=dict)  # layers with empty filters: why they stay
    # layers whose filters are gone, while their channels stay in place as constants
    refilled: tuple[str, ...] = ()

    def __str__(self) -> str:
        before, after = self.parameters
        layers = ", ".join(f"{name} {a} to {b}" for name, (a, b) in self.filters.items())
        return f"{after:,} of {before:,} parameters; filters: {layers or 'all stay'}"


def compact(module: nn.Module, example_input: Tensor) -> Compact:
    """Return the network without what a mask has emptied; its outputs stay the same.

    A filter goes if what it puts out is constant, or read by nobody; its constant goes
    into the next layers' biases. That is done through convolutions, linear layers,
    batch norms, activations, pools, flatten, residual additions (where all summands are
    off), group norms and grouped convolutions (whole groups), again and again until
    nothing changes. A local response norm keeps the places of channels that are gone.
    Where a channel must stay, as its sum has others that are on, or a layer mixes
    channels or is not known, ``locked`` says so; its filter is not calculated all the
    same, where that pays: a constant takes its place (``refilled``).

    Parameters
    ----------
    module : nn.Module
        The network with its weights under their masks, in eval mode; it stays as it is.
    example_input : Tensor
        A batch of inputs.

    Raises
    ------
    UnsupportedLayerError
        If its code cannot be traced (`torch.fx`) or followed, or the outputs would
        differ.
    """
    traced = _traced(module, example_input)
    try:
        return _compacted(module, traced, example_input)
    except UnsupportedLayerError:
        raise
    except Exception as error:  # such as layers in several types of floats
        raise _no_compact(f"raised {type(error).__name__}: {error!s:.200}") from error


def _compacted(module: nn.Module, traced: fx.GraphModule, example_input: Tensor) -> Compact:
    sizes = _sizes(traced)
    while _shrink_once(traced, liveness := Liveness(traced, example_input)):
        pass
    locked = _locked(liveness)
    refilled = _refill(traced, liveness)
    after = _sizes(traced)
    found = agreement(run_of(module), run_of(traced), [example_input])
    if not found.holds(EXACT):
        raise _no_compact(f"gives {found}")
    return Compact(
        traced,
        {name: (sizes[name], after[name]) for name in sizes if sizes[name] != after[name]},
        (_num_parameters(module), _num_parameters(traced)),
        locked,
        refilled,
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
    stay = "; ".join(
        f"{name} {'keeps its places' if name in small.refilled else 'stays'}: {why}"
        for name, why in small.locked.items()
    )
    return small.module, f"compact: {small}{f' ({stay})' if stay else ''}; {found}"


def _no_compact(what: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"a compact network must give what the whole one gives, within {EXACT:g}; it {what}. Use "
        "the whole one, and report this with the network."
    )


def _traced(module: nn.Module, example: Tensor) -> fx.GraphModule:
    tracer = fx.Tracer(autowrap_functions=(local_response_norm,))
    whole = own_copy(module).eval().requires_grad_(False)
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
        keep, carrier = _kept(group, liveness)
        if len(keep) < group.size:
            _shrink(traced, group, keep, carrier, liveness)
            changed = True
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return changed


def _kept(group: Group, liveness: Liveness) -> tuple[list[int], int | None]:
    """Channels of a group that must stay, one at least, and which of them carries."""
    everything = list(range(group.size))
    if group.locked or not group.makers or not group.readers:
        return everything, None
    needed = torch.zeros(group.size, dtype=torch.bool)
    for name, value in group.readers:
        needed |= ~_spared(liveness.modules[name], value)
    for _, value in group.mixing:
        needed |= ~_by_channel(value.constant == 0, group).all(1)
    carrier = _carrier(group, liveness, needed)
    needed = needed.reshape(-1, group.step).any(1).repeat_interleave(group.step)
    keep = [int(channel) for channel in needed.nonzero()] or everything[: group.step]
    return keep, carrier if len(keep) < group.size else None


def _by_channel(features: Tensor, group: Group) -> Tensor:
    return features.reshape(group.size, -1)


def _spared(layer: nn.Module, value: Value) -> Tensor:
    """Channels that a layer does without: unread, or constant and no zeros around."""
    unread = (columns_of(layer) == 0).all(2).all(0)
    constant = ~value.constant.isnan() & ((value.constant == 0) | (not pads(layer)))
    return (unread | constant).reshape(-1, value.factor).all(1)


# A constant before zeros around gives another sum at the border than within. One
# channel that is as constant carries those of all others in its own weights.
def _carrier(group: Group, liveness: Liveness, needed: Tensor) -> int | None:
    """A channel that carries other constants; the others are needed no longer."""
    readers = [(liveness.modules[name], value) for name, value in group.readers]
    if group.mixing or any(value.factor > 1 for _, value in readers):
        return None
    bent, sizes = needed.clone(), torch.full((group.size,), torch.inf, dtype=torch.float64)
    for layer, value in readers:
        bent &= _spared(layer, value) | ~value.constant.isnan()
        if pads(layer):
            sizes = torch.minimum(sizes, value.constant.abs())
    sizes = torch.where(bent, sizes.nan_to_num(0.0, posinf=0.0), 0.0)
    carrier = int(sizes.argmax())
    if int(bent.sum()) < 2 or not sizes[carrier] > 0:
        return None
    needed[bent] = False
    needed[carrier] = True
    return carrier


def _shrink(
    traced: fx.GraphModule,
    group: Group,
    keep: list[int],
    carrier: int | None,
    liveness: Liveness,
) -> None:
    for name in group.makers:
        keep_rows(liveness.modules[name], keep)
    for name, value in group.passed:
        keep_passed(liveness.modules[name], features_of(keep, value.factor))
    for name, value in group.readers:
        layer = liveness.modules[name]
        of_layer = carrier if pads(layer) else None
        keep_columns(layer, value, features_of(keep, value.factor), of_layer)
    for node, value in group.mixing:
        module = liveness.modules.get(str(node.target)) if node.op == "call_module" else None
        placed = placed_norm(node, module, len(value.constant)).without(keep)
        put_norm(traced, node, placed)


def _refill(traced: fx.GraphModule, liveness: Liveness) -> tuple[str, ...]:
    """Put constants in the place of filters that must stay, where that pays."""
    refilled = []
    for node in list(traced.graph.nodes):
        constant = liveness.made.get(str(node.target)) if node.op == "call_module" else None
        if constant is None:
            continue
        layer = liveness.modules[str(node.target)]
        off = int((~constant.isnan()).sum())
        if off * columns_of(layer)[0].numel() >= REFILL_WORTH * len(constant):
            refill(traced, node, layer, constant)
            refilled.append(str(node.target))
    traced.recompile()
    return tuple(refilled)


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
        for name in (*group.makers, *(name for name, _ in group.passed)):
            layer = liveness.modules[name]
            if isinstance(layer, LAYERS):
                empty = (columns_of(layer) == 0).all(2).all(1)
                if bool(empty.any()):
                    why = _why_kept(name, group)
                    reasons[name] = f"{int(empty.sum())} of {len(empty)} filters are off, but {why}"
    return reasons


def _why_kept(name: str, group: Group) -> str:
    if group.locked:
        return group.locked
    others = [other for other in group.makers if other != name]
    if others:
        return f"they are added to those of {', '.join(others)}, some of which are on"
    if group.step > 1:
        return f"{group.step_of} goes as a whole, {group.step} channels, some of which are on"
    if group.mixing:
        return "a local response norm mixes constants that are not zero"
    return "what is constant and not zero stays where zeros lie around it, or the last one"


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
