"""Retention ratios in settings: several taken in turn, and ratios of single layers."""

from typing import Any

from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.errors import ConfigError


def per_agent(key: str, value: Any) -> list[float]:
    """Ratios of agents in turn: ``0.3``, or ``"0.1, 0.3, 0.5"``."""
    parts = value.split(",") if isinstance(value, str) else [value]
    try:
        ratios = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ConfigError(
            f'run-config key {key} must be a number or numbers separated by commas, such as "0.1, '
            '0.3, 0.5"; '
            f"got {value!r}."
        ) from None
    return ratios


def ratios_of(
    key: str, run_config: RunConfig, node_config: RunConfig | None, *, agent: int, default: float
) -> tuple[list[float], float]:
    """Ratio of one agent under a key, which its node config may set."""
    ratios = per_agent(key, run_config.get(key, default))
    if not node_config or key not in node_config:
        return ratios, ratios[agent % len(ratios)]
    own = per_agent(key, node_config[key])
    check(
        len(own) == 1,
        f"the node config's {key} is one ratio, of this agent alone",
        node_config[key],
    )
    return ratios, own[0]


def per_layer(
    key: str, value: Any, *, noun: str = "RATIO", example: str = "conv1.weight=0.6, fc*=0.95"
) -> dict[str, float]:
    """Read numbers by layer, ``"conv1.weight=0.6, fc*=0.95"``; empty for none."""
    ratios: dict[str, float] = {}
    for part in str(value).split(",") if value != "" else []:
        name, _, ratio = part.partition("=")
        name = name.strip()
        try:
            number = float(ratio)
        except ValueError:
            number, name = 0.0, ""
        if not name or name in ratios or not isinstance(value, str):
            raise ConfigError(
                f"run-config key {key} must be NAME={noun}, each layer once, separated by commas, "
                f'such as "{example}"; got {value!r}.'
            )
        ratios[name] = number
    return ratios
