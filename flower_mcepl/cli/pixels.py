"""Options ``--mean`` and ``--std``: how pixels become a network's inputs."""

import math
from typing import Any

from flower_mcepl.errors import ConfigError


def pixels_of(mean: str | None, std: str | None) -> dict[str, Any]:
    """Mean and deviation that a person gave, one number a channel; empty: none.

    Raises
    ------
    ConfigError
        If one is missing, or no list of numbers.
    """
    if mean is None and std is None:
        return {}
    if mean is None or std is None:
        raise ConfigError("--mean and --std belong together: (pixel - mean) / std. Give both.")
    given = {"mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    if not all(given["std"]):
        raise ConfigError(f"--std must not be 0; got {std}.")
    return given


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{option} is one number, or one a channel as in .5,.5,.5; got {text!r}.")
    return numbers
