"""A frozen random network with trainable masks: any module, only the scores learn."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.layers import LayerSpec, find_maskable
from flower_mcepl.masks.retention import Retention, resolve_retention
from flower_mcepl.streams import isolated_rng


def shared_module(model_fn: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """Build the network whose random weights every agent shares: the same seed gives the same bits everywhere."""
    with isolated_rng(seed, "weights"):
        return model_fn()


class MaskedModel(nn.Module):
    """Wrap a module so that its weights stay frozen and binary masks over them learn.

    Conv (1d, 2d, 3d, grouped, transposed), linear and attention-projection weights are
    masked; biases, norm layers and everything else keep their initial values. The
    module is copied: the one passed in is untouched. Layers that share a weight share
    its mask.

    Parameters
    ----------
    module : nn.Module
        The network with its shared random weights.
    retention : float or mapping (default: 0.3)
        Fraction of weights that stays, per layer; see `resolve_retention`.
    generator : torch.Generator
        Source of the initial scores (uniform in ±1/sqrt(fan_in)).

    Notes
    -----
    The running statistics of batch norm are no weights: they follow the agent's own data, stay on the agent and
    are saved with it.

    Raises
    ------
    UnsupportedLayerError
        If the module has nothing to mask.
    ConfigError
        If a retention ratio is out of range or fits no layer.
    """

    def __init__(
        self, module: nn.Module, *, retention: Retention = 0.3, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layers = find_maskable(module)
        self.retention = resolve_retention(retention, self.layers)
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.fingerprint = fingerprint(self.module, self.layers)
        self._warn_of_zero_weights()
        for name, spec in self.layers.items():
            z = maths.init_scores(spec.shape, generator=generator)
            self.register_parameter(
                _slot("scores", name), nn.Parameter(z.to(self._weight(name).device))
            )
            self.register_buffer(_slot("mean", name), None)

    @property
    def scores(self) -> dict[str, nn.Parameter]:
        """The trainable scores ``z`` by layer."""
        return {name: getattr(self, _slot("scores", name)) for name in self.layers}

    @property
    def neighbor_means(self) -> dict[str, Tensor | None]:
        """The mean ``n`` of the neighbors' masks by layer; None stands for zero everywhere."""
        return {name: getattr(self, _slot("mean", name)) for name in self.layers}

    @property
    def num_weights(self) -> int:
        """Number of maskable weights."""
        return sum(z.numel() for z in self.scores.values())

    def set_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Overwrite the scores of all layers."""
        with torch.no_grad():
            for name, z in self.scores.items():
                z.copy_(scores[name])

    def set_neighbor_means(self, means: Mapping[str, Tensor] | None) -> None:
        """Set ``n`` for all layers, float in [0, 1]; None for an agent without neighbors."""
        for name, z in self.scores.items():
            value = None if means is None else means[name].to(z.device, z.dtype)
            setattr(self, _slot("mean", name), value)

    def aggregation(self) -> dict[str, Tensor]:
        """Return the aggregation tensor ``y`` of every layer; differentiable in the scores."""
        means = self.neighbor_means
        result = {}
        for name, z in self.scores.items():
            n = means[name]
            result[name] = z if n is None else maths.aggregate_scores(z, n)
        return result

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return the bool mask of every layer at the present scores and neighbor means."""
        return {
            name: maths.topk_mask(y, retention=self.retention[name])
            for name, y in self.aggregation().items()
        }

    def masked_weights(self) -> dict[str, Tensor]:
        """Return ``w * m`` of every layer, with the straight-through gradient to the scores."""
        return {
            name: maths.masked_weight(self._weight(name), y, retention=self.retention[name])
            for name, y in self.aggregation().items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with its weights masked."""
        return torch.func.functional_call(self.module, self.masked_weights(), args, kwargs)

    def group_lasso(self) -> Tensor:
        """Return the sum over layers of the group lasso on the scores' filters."""
        terms = [maths.group_lasso(self.layers[name].rows(z)) for name, z in self.scores.items()]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def bake(self, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return an ordinary module, independent of this one, whose weights are ``w * m``.

        ``masks`` are those of `masks`, where the caller has them at hand.
        """
        baked = copy.deepcopy(self.module)
        for name, mask in (self.masks() if masks is None else masks).items():
            baked.get_parameter(name).mul_(mask)
        return baked

    def _warn_of_zero_weights(self) -> None:
        dead = [name for name in self.layers if not self._weight(name).any()]
        if dead:
            warnings.warn(
                f"all frozen weights of {', '.join(dead)} are zero, so no mask over them can "
                "learn, and nothing before them either. Initialize them at random in the model "
                "function (torchvision's ViT head is one).",
                stacklevel=3,
            )

    def _weight(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)


def _slot(role: str, name: str) -> str:
    """Attribute name of one layer's tensor; torch allows no dots in it."""
    return f"{role}:{name}".replace(".", "/")


def fingerprint(module: nn.Module, layers: Mapping[str, LayerSpec]) -> str:
    """Digest the frozen network: 32 hex characters that differ when one bit, shape, layer or layer type differs.

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
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|{name in layers}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
