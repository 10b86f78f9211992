"""Two-level masks: which layers have gates, and all masks of a network at once.

A gate is one bit a filter; symbols as in `formulas`. The tensors of a layer's gates
bear its name with `GATES` behind it, in payloads and states.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flower_mcepl.config.patterns import keys_by_name
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import LayerSpec

GATES = ":filters"
LAYER, NETWORK = "layer", "network"
BUDGETS = (LAYER, NETWORK)
_CONVOLUTIONS = nn.modules.conv._ConvNd


def gate_name(layer: str) -> str:
    """Name of the gates of a layer's weight."""
    return layer + GATES


def check_share(share: float, *, of: str) -> None:
    """Raise ConfigError unless ``0 < share <= 1``."""
    if not 0 < share <= 1:
        raise ConfigError(
            f"the share of filters that stays on, {of}, must be in (0, 1]; got {share!r}. Use for "
            "example 0.5 to turn half of them off."
        )


# The first layer reads the input and is small, and every neuron of the last one is a
# class: turning a filter off there costs much and saves little. Rows of embeddings,
# recurrent and attention weights are no filters that could go alone.
def resolve_filters(
    share: float,
    by_layer: Mapping[str, float],
    module: nn.Module,
    layers: Mapping[str, LayerSpec],
    *,
    may_be_none: bool = False,
) -> dict[str, float]:
    """Share ρ of each layer that has gates.

    These are convolutions and linear layers but the first and the last layer, and
    those that ``by_layer`` names with a share below 1; one named with 1 has none.

    Raises
    ------
    ConfigError
        If a share is out of range, a key fits no layer, or no layer is left, where it
        must.
    """
    check_share(share, of="filters")
    names = list(layers)
    for key, value in by_layer.items():
        check_share(value, of=f"filters-layers, {key}")
    keys = keys_by_name(names, by_layer, of="filters-layers")
    shares = {n: by_layer[key] for n, key in keys.items() if key is not None and by_layer[key] < 1}
    shares |= {n: share for n in names[1:-1] if keys[n] is None and _has_filters(module, n)}
    if not shares and not may_be_none:
        raise ConfigError(
            "filters turns off filters of convolutions and linear layers between the first and "
            f"the last layer; this network has none there, only {', '.join(names)}. Name layers "
            'in filters-layers, such as "conv1.weight=0.5", or leave filters at 1.'
        )
    return {name: shares[name] for name in names if name in shares}


def _has_filters(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), (nn.Linear, _CONVOLUTIONS))


@dataclass(frozen=True, kw_only=True)
class MaskRules:
    """How many filters and weights stay, by layer.

    Parameters
    ----------
    retention : mapping
        r of every layer.
    filters : mapping (default: none)
        ρ of the layers that have gates, in the end.
    budget : str (default: "layer")
        "layer": each keeps its share r; "network": all together keep as many weights,
        those of the largest `relative_sizes`, wherever they lie.
    blocks : collection of str (default: none)
        Layers that keep 2 of every 4 inputs, and so have r = 0.5.
    opening : float (default: 0.0)
        Share of the filters above ρ that is on still: ρ + (1 - ρ) * opening stay.
    """

    retention: Mapping[str, float]
    filters: Mapping[str, float] = field(default_factory=dict)
    budget: str = LAYER
    opening: float = 0.0
    blocks: Collection[str] = ()

    def num_live(self, spec: LayerSpec) -> int:
        """Number of a layer's filters that are on."""
        share = self.filters.get(spec.name, 1.0)
        share += (1 - share) * self.opening
        return maths.kept_filters(spec.num_filters, share=share)

    def num_kept(self, spec: LayerSpec) -> int:
        """Number of weights that stay: the share r of those in filters that are on."""
        numel = spec.shape.numel() // spec.num_filters * self.num_live(spec)
        return maths.kept_weights(numel, retention=self.retention[spec.name])

    def as_if_open(self, spec: LayerSpec, y: Tensor, mask: Tensor, live: Tensor) -> Tensor:
        """``u``: what a layer's mask would be if all of its gates were open."""
        if spec.name in self.blocks:
            return maths.two_of_four(y)
        return maths.as_if_open(y, mask, live)

    def scale(self, spec: LayerSpec) -> float:
        """Factor on the weights that stay."""
        return maths.keep_variance(self.num_live(spec) / spec.num_filters)


def masks_of(
    y: Mapping[str, Tensor], layers: Mapping[str, LayerSpec], rules: MaskRules
) -> dict[str, Tensor]:
    """All masks of a network at its aggregation tensors: weights, then gates."""
    gates = {
        name: maths.largest_mask(y[gate_name(name)], keep=rules.num_live(layers[name]))
        for name in rules.filters
    }
    live = {name: layers[name].spread(gate) for name, gate in gates.items()}
    if rules.budget == NETWORK:
        masks = _of_network(y, live, layers, rules)
    else:
        masks = {
            name: _of_layer(y[name], live.get(name), spec, rules) for name, spec in layers.items()
        }
    return masks | {gate_name(name): gate for name, gate in gates.items()}


def _of_layer(y: Tensor, live: Tensor | None, spec: LayerSpec, rules: MaskRules) -> Tensor:
    if spec.name in rules.blocks:
        mask = maths.two_of_four(y)
        return mask if live is None else mask & live
    if live is None:
        return maths.topk_mask(y, retention=rules.retention[spec.name])
    return maths.live_mask(y, live, keep=rules.num_kept(spec))


def _of_network(
    y: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    layers: Mapping[str, LayerSpec],
    rules: MaskRules,
) -> dict[str, Tensor]:
    alike = {name: maths.relative_sizes(y[name]) for name in layers}
    chosen = {name: alike[name][live[name]] if name in live else alike[name] for name in layers}
    keep = sum(rules.num_kept(spec) for spec in layers.values())
    masks = maths.budget_masks(chosen, keep=keep)
    for name, where in live.items():
        whole = torch.zeros(where.shape, dtype=torch.bool, device=where.device)
        whole[where] = masks[name]
        masks[name] = whole
    return masks
