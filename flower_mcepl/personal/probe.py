"""Probe: outputs for a made-up input, which show whether a network calculates the same.

Names, types and shapes do not say all: a model function with another stride or
activation builds a network that takes the same weights and predicts something else.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl.agents.tasks.network import one_output, taken
from flower_mcepl.errors import DataError, FingerprintError
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.personal.recipes import uniform
from flower_mcepl.streams import isolated_rng, mersenne_words

_SEED, _MOST = 5489, 2**22  # of the twister; elements of an input
TOLERANCE = 1e-3  # relative to the largest output: machines round differently
_MOST_OUTPUTS = 64  # that are kept


# A network may take no made-up input, such as the logarithm of one below zero, or draw
# at random, as with a dropout that is never off. That is no reason to write no file; a
# check of such outputs would refuse the right network, too.
def probe_of(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Fact of a file: shape of the input, and the first outputs for it.

    There are no outputs where the network gives none, or others the second time.
    """
    try:
        with isolated_rng(0, "probe"):
            first, second = (_outputs(own_copy(module).eval(), shape) for _ in range(2))
    except Exception:  # whatever a network says to an input that is not its own
        first, second = [], []
    return {"shape": list(shape), "outputs": first if _are_near(first, second) else []}


def probe_input(shape: tuple[int, ...]) -> Tensor:
    """Input of that shape, uniform in ±1."""
    words = mersenne_words(_SEED, math.prod(shape))
    return torch.from_numpy(uniform(words, 1.0)).view(shape)


def check_probe(probe: Any, module: nn.Module) -> None:
    """Check that a network gives the outputs that a file's probe has, if any.

    Raises
    ------
    FingerprintError
        If it does not.
    """
    if probe is None:
        return
    shape, known = _checked(probe)
    if not known:
        return
    try:
        with isolated_rng(0, "probe"):
            outputs = _outputs(own_copy(module), shape)  # a forward may change buffers
    except Exception as error:  # whatever a network says to an input that is not its own
        raise FingerprintError(
            f"the network must take inputs of shape {shape}, as that of the file does "
            f"({type(error).__name__}: {error}). Pass the model function of the run."
        ) from error
    if not _are_near(outputs, known):
        raise FingerprintError(
            "the network must calculate what that of the file does, and with equal weights its "
            "outputs differ: a stride, an activation or an input size is another one. Pass the "
            "model function of the run, with its settings."
        )


def _are_near(outputs: list[float], known: list[float]) -> bool:
    atol = TOLERANCE * (1e-6 + max(map(abs, known), default=0))
    return len(outputs) == len(known) and np.allclose(outputs, known, rtol=0, atol=atol)


def _outputs(module: nn.Module, shape: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        flat = one_output(module(taken(probe_input(shape), module))).double().reshape(-1)
    if not bool(flat.isfinite().all()):
        raise DataError("the network's outputs for a made-up input are not finite")
    return [float(value) for value in flat[:_MOST_OUTPUTS]]


def _checked(probe: Any) -> tuple[tuple[int, ...], list[float]]:
    try:
        shape = tuple(int(dim) for dim in probe["shape"])
        known = [float(value) for value in probe["outputs"]]
    except (TypeError, KeyError, ValueError) as error:
        raise FingerprintError(f"the file's probe is none ({error!r}). Export it anew.") from error
    if len(shape) > 16 or min(shape, default=1) < 0 or math.prod(shape) > _MOST:
        raise FingerprintError(f"the file's probe has shape {shape}. Export it anew.")
    return shape, known
