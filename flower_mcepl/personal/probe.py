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
from flower_mcepl.personal.recipes import uniform
from flower_mcepl.streams import mersenne_words

_SEED, _MOST = 5489, 2**22  # of the twister; elements of an input
TOLERANCE = 1e-3  # relative to the largest output: machines round differently
_MOST_OUTPUTS = 64  # that are kept


def probe_of(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Fact of a file: shape of the input, and the first outputs for it."""
    return {"shape": list(shape), "outputs": _outputs(module, shape)}


def probe_input(shape: tuple[int, ...]) -> Tensor:
    """Input of that shape, uniform in ±1."""
    words = mersenne_words(_SEED, math.prod(shape))
    return torch.from_numpy(uniform(words, 1.0)).view(shape)


def check_probe(probe: Any, module: nn.Module) -> None:
    """Check that a network gives the outputs that a file's probe has.

    Raises
    ------
    FingerprintError
        If it does not.
    """
    if probe is None:
        return
    shape, known = _checked(probe)
    try:
        outputs = _outputs(module, shape)
    except Exception as error:  # whatever a network says to an input that is not its own
        raise FingerprintError(
            f"the network must take inputs of shape {shape}, as that of the file does "
            f"({type(error).__name__}: {error}). Pass the model function of the run."
        ) from error
    near = len(outputs) == len(known) and np.allclose(
        outputs, known, rtol=0, atol=TOLERANCE * (1e-6 + max(map(abs, known), default=0))
    )
    if not near:
        raise FingerprintError(
            "the network must calculate what that of the file does, and with equal weights its "
            "outputs differ: a stride, an activation or an input size is another one. Pass the "
            "model function of the run, with its settings."
        )


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
