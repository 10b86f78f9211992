"""Frozen weights: as the model function made them, or signed constants."""

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl.config.checks import check
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.layers import LayerSpec, find_maskable
from flower_mcepl.streams import mersenne_seed, mersenne_words, stream_seed

MODULE, SIGNED_CONSTANT = "module", "signed-constant"
WEIGHT_INITS = (MODULE, SIGNED_CONSTANT)


def check_weight_init(init: str) -> None:
    """Raise ConfigError unless ``init`` is one of `WEIGHT_INITS`."""
    check(init in WEIGHT_INITS, f"weight-init must be one of {', '.join(WEIGHT_INITS)}", init)


# The signs are drawn for each layer by its name, and not taken from the module's own
# initial weights: those depend on the order in which the model function builds its
# layers, on torch's release, and may be zeros. Any fair signs do as well.
def with_weights(module: nn.Module, init: str, *, seed: int) -> nn.Module:
    """Return the module, or a copy whose maskable weights are signed constants.

    Biases, norm layers and everything else that gets no mask stay as the module has
    them, and so does an embedding's row for padding (``padding_idx``), which is zero. A
    weight that several layers share is drawn once, by its first name.

    Parameters
    ----------
    module : nn.Module
        The network as from `shared_module`; it stays as it is.
    init : str
        One of `WEIGHT_INITS`.
    seed : int
        Seed of the run, the same on all agents.

    Raises
    ------
    ConfigError
        If there is no such init.
    """
    check_weight_init(init)
    if init == MODULE:
        return module
    made = own_copy(module)
    with torch.no_grad():
        for name, spec in find_maskable(made).items():
            weight = made.get_parameter(name)
            weight.copy_(signed_constant(spec, seed=seed))
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
                weight = made.get_parameter(f"{name}.weight" if name else "weight")
                weight[layer.padding_idx] = layer.weight[layer.padding_idx]
    return made


def signed_constant(spec: LayerSpec, *, seed: int) -> Tensor:
    """Draw a layer's weights ``± sqrt(1 / fan_in)``, each sign with probability 1/2.

    ``fan_in`` is the number of weights of one filter, so that outputs keep the scale of
    PyTorch's default init, whose variance is a third of this.
    """
    fan_in = max(1, spec.rows(torch.empty(spec.shape, device="meta")).shape[1])
    words = mersenne_words(sign_seed(seed, spec.name), spec.shape.numel())
    signs = torch.from_numpy((words & 1).astype(np.int64)).view(spec.shape) * 2 - 1
    return signs.mul(fan_in**-0.5)


def sign_seed(seed: int, name: str) -> int:
    """Seed of the Mersenne twister whose words have a layer's signs as lowest bits."""
    return mersenne_seed(stream_seed(seed, f"weight-signs/{name}"))
