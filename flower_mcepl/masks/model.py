"""A frozen random network with trainable masks: any module, only the scores learn."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.errors import ConfigError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.blocks import check_block_retention
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.fusion import MCEPL, Fusion, blended_by, heard_by, ranked_by
from flower_mcepl.masks.gates import LAYER, MaskRules, gate_name, masks_of
from flower_mcepl.masks.layers import LayerSpec, find_frozen, find_maskable
from flower_mcepl.masks.placement import call_with, kept_in_eval, slots_of, train_mode
from flower_mcepl.masks.retention import Retention, resolve_retention
from flower_mcepl.streams import isolated_rng

MUCH_FROZEN = 0.1  # share of a network above which its random rest is warned of


def shared_module(model_fn: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """Build the network whose random weights all agents share, by the run's seed.

    Raises
    ------
    ConfigError
        If the model function returns something else than a torch module.
    """
    with isolated_rng(seed, "weights"):
        module = model_fn()
    _check_network(module)
    return module


def _check_network(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(
            "masks lie over the weights of a torch network, and a model function returns one "
            f"(torch.nn.Module); here came {type(module).__name__}. A model of another framework "
            "keeps its own train and evaluate functions and gossips its arrays: "
            "ClientApp(mods=[neighbor_average_mod]), see docs/existing-apps.md."
        )


class MaskedModel(nn.Module):
    """Wrap a module so that its weights stay frozen and binary masks over them learn.

    Conv (1d, 2d, 3d, grouped, transposed), linear, bilinear, recurrent, embedding and
    attention-projection weights are masked; biases, norm layers and everything else
    keep their initial values, and `frozen` names them. The module is copied: the one
    passed in is untouched. Layers that share a weight share its mask. Submodules that
    the model function left in eval mode stay in it, such as a frozen batch norm.

    Parameters
    ----------
    module : nn.Module
        The network with its shared random weights.
    retention : float or mapping (default: 0.3)
        Fraction of weights that stays, per layer; see `resolve_retention`.
    fusion : Fusion (default: that of MCE-PL)
        How the neighbors' masks count.
    fusion_strength : float (default: 1.0)
        Factor c on what was heard, where the rule ranks with it: ``rank(z, c * n)``.
    filters : mapping, optional
        Share of the filters that stays on, by layer, in those that have gates; see
        `resolve_filters`. Gate scores begin equal, at the bound of the layer's scores.
    budget : str (default: "layer")
        Whether each layer keeps its own ratio, or the network as many weights in all;
        see `MaskRules`.
    blocks : collection of str (default: none)
        Linear layers that keep 2 of every 4 inputs; see `block_layers`.
    generator : torch.Generator
        Source of the initial scores (uniform in ±1/sqrt(fan_in)).

    Notes
    -----
    The running statistics of batch norm are no weights: they follow the agent's own
    data, stay on the agent and are saved with it.

    Raises
    ------
    UnsupportedLayerError
        If the module has nothing to mask.
    ConfigError
        If a retention ratio is out of range or fits no layer.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        retention: Retention = 0.3,
        fusion: Fusion = MCEPL,
        fusion_strength: float = 1.0,
        filters: Mapping[str, float] | None = None,
        budget: str = LAYER,
        blocks: Collection[str] = (),
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        _check_network(module)
        self.fusion, self.fusion_strength = fusion, fusion_strength
        self.num_neighbors = 0  # of whom `neighbor_means` was heard
        self._holders: dict[str, int] = {}  # fewer of them, in layers that not all of them hold
        self.layers = find_maskable(module)
        self.retention = resolve_retention(retention, self.layers)
        self.rules = MaskRules(
            retention=self.retention, filters=filters or {}, budget=budget, blocks=blocks
        )
        self._check_rules()
        self.module = own_copy(module).requires_grad_(False)
        self._slots = slots_of(self.module, self.layers)
        self._frozen = kept_in_eval(module)
        self.fingerprint = fingerprint(self.module, self.layers)
        self.frozen = find_frozen(self.module, self.layers)
        self._warn_of_zero_weights()
        self._warn_of_frozen_weights()
        for name, spec in self.layers.items():
            z = maths.init_scores(spec.shape, generator=generator)
            self.register_parameter(
                _slot("scores", name), nn.Parameter(z.to(self.weight(name).device))
            )
            self.register_buffer(_slot("mean", name), None)
        for name in self.rules.filters:
            spec, gate = self.layers[name], gate_name(name)
            s = torch.full((spec.num_filters,), spec.fan_in**-0.5)
            self.register_parameter(
                _slot("scores", gate), nn.Parameter(s.to(self.weight(name).device))
            )
            self.register_buffer(_slot("mean", gate), None)

    @property
    def scores(self) -> dict[str, nn.Parameter]:
        """The trainable scores ``z`` by layer."""
        return {name: getattr(self, _slot("scores", name)) for name in self.layers}

    @property
    def all_scores(self) -> dict[str, nn.Parameter]:
        """All that trains: the scores, then the gates' scores by `gate_name`."""
        names = (*self.layers, *map(gate_name, self.rules.filters))
        return {name: getattr(self, _slot("scores", name)) for name in names}

    @property
    def neighbor_means(self) -> dict[str, Tensor | None]:
        """What was heard from the neighbors, ``n`` by layer; None: nobody was."""
        return {name: getattr(self, _slot("mean", name)) for name in self.all_scores}

    @property
    def num_weights(self) -> int:
        """Number of maskable weights."""
        return sum(z.numel() for z in self.scores.values())

    def set_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Overwrite the scores of all layers and gates."""
        with torch.no_grad():
            for name, z in self.all_scores.items():
                z.copy_(scores[name])

    def set_opening(self, opening: float) -> None:
        """Set which share of the filters that are to go is on still, 0 to 1."""
        self.rules = replace(self.rules, opening=opening)

    def set_filters(self, filters: Mapping[str, float]) -> None:
        """Set the share of filters that stays on, of the layers that have gates."""
        self.rules = replace(self.rules, filters=dict(filters))

    def num_holders(self, name: str) -> int:
        """Number of masks that ``n`` of a layer was heard from."""
        return self._holders.get(name, self.num_neighbors)

    def set_neighbor_means(
        self,
        means: Mapping[str, Tensor] | None,
        *,
        num_neighbors: int = 1,
        holders: Mapping[str, int] | None = None,
    ) -> None:
        """Set ``n`` by layer, and of how many masks it is; None: of nobody.

        Layers that are missing are personal, or none of the neighbors holds them:
        nobody's masks count in them. ``holders`` are the layers that fewer than all
        neighbors hold, and how many do.
        """
        self.num_neighbors = 0 if means is None else num_neighbors
        self._holders = {} if means is None else dict(holders or {})
        for name, z in self.all_scores.items():
            n = None if means is None else means.get(name)
            setattr(self, _slot("mean", name), None if n is None else n.to(z.device, z.dtype))

    @torch.no_grad()
    def hear(self, payloads: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in the neighbors' masks as ``n``, by the rule of fusion.

        A layer is fused over those payloads that hold it.

        Raises
        ------
        ConfigError
            If the rule fails, changes a mask in place, or gives another shape, no
            floats, or numbers that are not finite.
        """
        means = {}
        # ranking takes long, and the mean of the neighbors has no use for the own mask
        needs_own = payloads and not self.fusion.averages
        for name, own in (self.masks() if needs_own else self.all_scores).items():
            heard = [payload[name].to(own.device) for payload in payloads if name in payload]
            if heard:
                means[name] = heard_by(self.fusion, heard, own)
        self.set_heard(means, payloads)

    def set_heard(
        self, means: Mapping[str, Tensor], payloads: Collection[Mapping[str, Tensor]]
    ) -> None:
        """Set what was heard from payloads, ``n`` by layer, and how many hold each."""
        counts = {name: sum(name in payload for payload in payloads) for name in self.all_scores}
        fewer = {name: count for name, count in counts.items() if count < len(payloads)}
        self.set_neighbor_means(means or None, num_neighbors=len(payloads), holders=fewer)

    def aggregation(self) -> dict[str, Tensor]:
        """Return the aggregation tensor ``y`` by layer, differentiable in scores."""
        means = self.neighbor_means
        return {
            name: z if (n := means[name]) is None else self.ranked(z, n)
            for name, z in self.all_scores.items()
        }

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return the bool masks at the present scores and ``n``, then the gates."""
        return masks_of(self.aggregation(), self.layers, self.rules)

    @torch.no_grad()
    def live_masks(self) -> dict[str, Tensor]:
        """Return what multiplies the frozen weights: the masks, or their blend.

        Where filters are off, the masks come times `MaskRules.scale`.
        """
        masks = self.masks()
        masks = {name: masks[name] for name in self.layers}
        if self.fusion.blend is not None:
            return {name: self.blended(mask.float(), name=name) for name, mask in masks.items()}
        scales = {name: self.rules.scale(self.layers[name]) for name in self.rules.filters}
        return masks | {name: masks[name] * scale for name, scale in scales.items() if scale != 1}

    def masked_weights(self) -> dict[str, Tensor]:
        """Return ``w * m`` by layer, with the gradient straight to the scores."""
        if self.is_structured():
            return self._structured_weights()
        return {
            name: maths.masked_weight(
                self.weight(name),
                y,
                retention=self.retention[name],
                blend=partial(self.blended, name=name) if self.fusion.blend else None,
            )
            for name, y in self.aggregation().items()
        }

    def _structured_weights(self) -> dict[str, Tensor]:
        """Return ``w * u * q * scale`` by layer, as in `formulas`."""
        y = self.aggregation()
        masks = masks_of(y, self.layers, self.rules)
        return {
            name: self._gated(name, y, masks)
            if name in self.rules.filters
            else self.weight(name) * maths.straight_through(y[name], masks[name])
            for name in self.layers
        }

    def _gated(self, name: str, y: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        spec, gate = self.layers[name], gate_name(name)
        q = spec.spread(masks[gate])
        return maths.gated_weight(
            self.weight(name),
            y[name],
            self.rules.as_if_open(spec, y[name], masks[name], q),
            a=spec.spread(y[gate]),
            q=q,
            scale=self.rules.scale(spec),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with its weights masked."""
        return call_with(self.module, self._slots, self.masked_weights(), args, kwargs)

    def train(self, mode: bool = True) -> "MaskedModel":
        """Set train mode; what the model function left in eval mode stays there."""
        super().train(mode)
        if mode:
            train_mode(self.module, self._frozen)
        return self

    def group_lasso(self) -> Tensor:
        """Return the sum over layers of the group lasso on the scores' filters."""
        terms = [maths.group_lasso(self.layers[name].rows(z)) for name, z in self.scores.items()]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def bake(self, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return an ordinary module with the weights ``w * m``, a copy.

        ``masks`` are those of `live_masks`, where the caller has them at hand.
        """
        baked = own_copy(self.module)
        for name, mask in (self.live_masks() if masks is None else masks).items():
            baked.get_parameter(name).mul_(mask)
        return baked

    def ranked(self, z: Tensor, n: Tensor) -> Tensor:
        """Return ``y`` of one layer of which ``n`` was heard."""
        strong = n if self.fusion_strength == 1 else self.fusion_strength * n
        return ranked_by(self.fusion, z, strong)

    def blended(self, m: Tensor, *, name: str) -> Tensor:
        """What multiplies the weights in place of a layer's mask ``m`` of floats."""
        n = self.neighbor_means[name]
        if n is None or self.fusion.blend is None:
            return m
        return blended_by(self.fusion.blend, m, n, num_neighbors=self.num_holders(name))

    def is_structured(self) -> bool:
        """Whether masks are more than the largest of each layer."""
        return bool(self.rules.filters or self.rules.budget != LAYER or self.rules.blocks)

    def _check_rules(self) -> None:
        check_block_retention(self.rules.blocks, self.retention)
        if self.is_structured() and self.fusion.blend is not None:
            raise ConfigError(
                "filters, block and retention-budget need a rule of fusion under whose own mask "
                "the network runs; this one blends it with the neighbors', so that nothing would "
                "be off. Use fusion mcepl, or leave filters, block and retention-budget as they "
                "are."
            )

    def _warn_of_zero_weights(self) -> None:
        dead = [name for name in self.layers if not self.weight(name).any()]
        if dead:
            warnings.warn(
                f"all frozen weights of {', '.join(dead)} are zero, so no mask over them can "
                "learn, and nothing before them either. Initialize them at random in the model "
                "function (torchvision's ViT head is one).",
                stacklevel=3,
            )

    def _warn_of_frozen_weights(self) -> None:
        if self.frozen.named_share > MUCH_FROZEN:
            warnings.warn(
                f"{self.frozen.named_share:.0%} of the weights of {type(self.module).__name__} get "
                f"no mask and keep their random values: {self.frozen.facts()['frozen-weights']}. "
                "Register their layers with flower_mcepl.masks.maskable, or use an algorithm that "
                "trains weights.",
                stacklevel=3,
            )

    def weight(self, name: str) -> nn.Parameter:
        """The frozen weights ``w`` of a layer."""
        return self.module.get_parameter(name)


def _slot(role: str, name: str) -> str:
    """Attribute name of one layer's tensor; torch allows no dots in it."""
    return f"{role}:{name}".replace(".", "/")


def fingerprint(module: nn.Module, layers: Mapping[str, LayerSpec]) -> str:
    """Digest of a frozen network: 32 hex characters, for its bits, shapes and layers.

    blake2b over the name, dtype, shape and bytes of every parameter and buffer, which
    of them are maskable, and the types of all submodules. Running statistics do not
    count, they are an agent's own; nor do settings that are neither tensors nor types,
    such as a stride.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, submodule in module.named_modules():
        digest.update(f"{name}|{type(submodule).__qualname__}|".encode())
    own = {
        f"{prefix}.{name}" if prefix else name
        for prefix, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._NormBase)
        for name, _ in norm.named_buffers(recurse=False)
    }
    tensors = [
        *module.named_parameters(),
        *(pair for pair in module.named_buffers() if pair[0] not in own),
    ]
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{name in layers}|".encode())
        digest.update(bits_of(tensor))
    return digest.hexdigest()


def bits_of(tensor: Tensor) -> memoryview:
    """Bytes of a tensor's values, in C order."""
    value = tensor.detach().cpu().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data
