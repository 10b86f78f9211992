"""Which weights of a module can be masked: a registry by layer type."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.errors import UnsupportedLayerError

CONV, LINEAR = "conv", "linear"
NAMED = 4  # layers that a note of what is frozen names


@dataclass(frozen=True)
class LayerSpec:
    """One maskable weight: its parameter's name, kind, shape and order of filters."""

    name: str  # "layer1.0.conv1.weight", as in named_parameters()
    kind: str  # CONV or LINEAR: the kinds that may have their own retention
    shape: torch.Size
    transposed_groups: int = 0  # 0: filters are rows; else the groups of a transposed convolution

    def rows(self, weight: Tensor) -> Tensor:
        """View a tensor of the weight's shape as [filters, weights of one filter]."""
        if not self.transposed_groups:
            return weight.flatten(1)
        # a transposed convolution stores [in, out / groups, *kernel]
        groups = self.transposed_groups
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)

    @property
    def num_filters(self) -> int:
        """Number of filters, those that `rows` gives."""
        groups = self.transposed_groups
        return self.shape[1] * groups if groups else self.shape[0]

    @property
    def fan_in(self) -> int:
        """Number of weights of one filter, as `init_scores` counts them."""
        return max(1, math.prod(self.shape[1:]))

    def spread(self, per_filter: Tensor) -> Tensor:
        """View one number a filter as a tensor of the weight's shape."""
        if not self.transposed_groups:
            return per_filter.view(-1, *[1] * (len(self.shape) - 1)).expand(self.shape)
        groups, inputs, outputs = self.transposed_groups, self.shape[0], self.shape[1]
        per_input = per_filter.view(groups, 1, outputs).expand(groups, inputs // groups, outputs)
        by_place = per_input.reshape(inputs, outputs, *[1] * (len(self.shape) - 2))
        return by_place.expand(self.shape)


_Finder = Callable[[nn.Module], Iterator[tuple[str, str, int]]]
_FINDERS: dict[type[nn.Module], _Finder] = {}


def maskable(*types: type[nn.Module]) -> Callable[[_Finder], _Finder]:
    """Register how to find the maskable weights of layer types and their subclasses.

    The decorated function yields, for one layer, ``(parameter name, kind, groups if
    transposed else 0)``.
    """

    def register(finder: _Finder) -> _Finder:
        _FINDERS.update(dict.fromkeys(types, finder))
        return finder

    return register


@maskable(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    yield "weight", CONV, 0


@maskable(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    yield "weight", CONV, int(layer.groups)  # type: ignore[arg-type]


@maskable(nn.Linear)
def _linear(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    yield "weight", LINEAR, 0


@maskable(nn.Bilinear)
def _bilinear(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    yield "weight", LINEAR, 0


@maskable(nn.Embedding, nn.EmbeddingBag)
def _embedding(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    for option in ("max_norm", "sparse"):
        if getattr(layer, option):
            raise UnsupportedLayerError(
                f"{type(layer).__name__} must not be made with {option}, which works on the "
                f"weights themselves; got {option}={getattr(layer, option)}. Leave it out."
            )
    yield "weight", LINEAR, 0


@maskable(nn.RNNBase)
def _recurrent(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    for name, _ in layer.named_parameters(recurse=False):
        if name.startswith("weight"):
            yield name, LINEAR, 0


@maskable(nn.RNNCellBase)
def _recurrent_cell(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    yield from (("weight_ih", LINEAR, 0), ("weight_hh", LINEAR, 0))


@maskable(nn.DataParallel, nn.parallel.DistributedDataParallel)
def _copies(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    raise UnsupportedLayerError(
        f"a network must be one module on one device; got {type(layer).__name__}, which makes "
        "copies that know no masks. Pass what it wraps, its .module."
    )
    yield  # a finder is a generator


@maskable(nn.MultiheadAttention)
def _attention(layer: nn.Module) -> Iterator[tuple[str, str, int]]:
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if getattr(layer, name) is not None:  # its output projection is a Linear layer of its own
            yield name, LINEAR, 0


def check_shaped(module: nn.Module) -> None:
    """Raise UnsupportedLayerError if a tensor of ``module`` has no shape or values."""
    lazy = nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedLayerError(
                f"{name} has no values, as it is on torch's meta device. Make the network on the "
                "CPU in the model function."
            )
        if isinstance(tensor, lazy):
            raise UnsupportedLayerError(
                f"{name} has no shape yet. Run one batch through the lazy module in the model "
                "function."
            )


def find_maskable(module: nn.Module) -> dict[str, LayerSpec]:
    """Maskable weights of ``module``, each once, by name, in the module's own order.

    A weight that several layers share appears under its first name.

    Raises
    ------
    UnsupportedLayerError
        If nothing can be masked, or a weight is not an ordinary initialised float
        parameter.
    """
    check_shaped(module)
    specs: dict[str, LayerSpec] = {}
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        finder = next((_FINDERS[base] for base in type(layer).__mro__ if base in _FINDERS), None)
        for local_name, kind, groups in finder(layer) if finder else ():
            name = f"{prefix}.{local_name}" if prefix else local_name
            weight = _ordinary_parameter(layer, local_name, name)
            if id(weight) not in seen:
                seen.add(id(weight))
                specs[name] = LayerSpec(name, kind, weight.shape, groups)
    if not specs:
        refused = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        known = ", ".join(sorted(base.__name__ for base in _FINDERS if base not in refused))
        scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
        way_out = (
            "Pass the network as it was before torch.jit.script or torch.jit.trace."
            if scripted
            else "Pass a module with at least one of them, or register your layer type with "
            "flower_mcepl.masks.maskable."
        )
        raise UnsupportedLayerError(
            f"{type(module).__name__} has nothing to mask: it holds none of the layers {known}. "
            f"{way_out}"
        )
    return specs


@dataclass(frozen=True)
class Frozen:
    """What of a network is neither masked nor trained."""

    share: float  # of all its weights
    # all but biases and norm layers, for which no mask is meant; the largest first
    names: tuple[str, ...] = ()
    named_share: float = 0.0  # of those with a name

    def facts(self) -> dict[str, Any]:
        """Facts for the handshake."""
        names = ", ".join(self.names[:NAMED]) + (", ..." if len(self.names) > NAMED else "")
        return {"frozen-share": self.share, **({"frozen-weights": names[:200]} if names else {})}


def find_frozen(module: nn.Module, learned: Iterable[str]) -> Frozen:
    """What stays as it was drawn while ``learned`` parameters are masked or train."""
    learned = set(learned)
    rest = {name: p for name, p in module.named_parameters() if name not in learned}
    total = sum(p.numel() for p in module.parameters())
    named = {name: p.numel() for name, p in rest.items() if p.ndim > 1}
    return Frozen(
        share=sum(p.numel() for p in rest.values()) / total,
        names=tuple(sorted(named, key=named.__getitem__, reverse=True)),
        named_share=sum(named.values()) / total,
    )


def _ordinary_parameter(layer: nn.Module, local_name: str, name: str) -> nn.Parameter:
    weight = layer._parameters.get(local_name)
    if weight is None:
        raise UnsupportedLayerError(
            f"{name} of {type(layer).__name__} is not a plain parameter (weight norm or another "
            "parametrization?). Remove the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations) before masking."
        )
    if weight.dtype not in (torch.float32, torch.float64):
        raise UnsupportedLayerError(
            f"{name} has dtype {weight.dtype}; scores train in float32. Call .float() on the "
            "module before masking."
        )
    return weight
