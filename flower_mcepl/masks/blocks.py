"""Masks in blocks, for hardware that has them: which layers, what they keep."""

import warnings
from collections.abc import Collection, Mapping

from torch import nn

from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.layers import LayerSpec

NONE, TWO_OF_FOUR = "none", "2:4"
BLOCKS = (NONE, TWO_OF_FOUR)
IN_BLOCK, KEPT_IN_BLOCK = 4, 2
BLOCK_RETENTION = KEPT_IN_BLOCK / IN_BLOCK


# Only layers that multiply by a matrix of inputs, as the hardware's units do. Rows of
# recurrent and attention weights would do, too; nobody has asked for them.
def block_layers(block: str, module: nn.Module, layers: Mapping[str, LayerSpec]) -> tuple[str, ...]:
    """Linear layers whose masks are in blocks; a warning names those that cannot be.

    Their number of inputs is no multiple of 4.

    Raises
    ------
    ConfigError
        If no layer can be.
    """
    if block == NONE:
        return ()
    linear = [name for name in layers if _is_linear(module, name)]
    fit = tuple(name for name in linear if layers[name].shape[1] % IN_BLOCK == 0)
    if not fit:
        listed = ", ".join(f"{name} with {layers[name].shape[1]}" for name in linear)
        raise ConfigError(
            "block 2:4 is for linear layers (torch.nn.Linear) whose number of inputs is a "
            f"multiple of 4; this network has {f'only {listed}' if linear else 'none'}. Leave "
            "block out, or change the network."
        )
    if len(fit) < len(linear):
        others = ", ".join(name for name in linear if name not in fit)
        warnings.warn(
            f"block {block}: the number of inputs of {others} is no multiple of 4, so masks there "
            "are as without it.",
            stacklevel=3,
        )
    return fit


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear)


def check_block_retention(blocks: Collection[str], retention: Mapping[str, float]) -> None:
    """Raise ConfigError unless layers in blocks keep half of their weights."""
    for name in blocks:
        if retention[name] != BLOCK_RETENTION:
            raise ConfigError(
                f"block 2:4 keeps 2 of every 4 inputs, so the retention of {name} must be "
                f"{BLOCK_RETENTION:g}; got {retention[name]:g}. Leave retention-linear out or set "
                f'it to {BLOCK_RETENTION:g} (and of single layers, retention-layers = "{name}='
                f'{BLOCK_RETENTION:g}"), or leave block out.'
            )
