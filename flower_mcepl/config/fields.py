"""Reading settings: frozen dataclasses whose fields are kebab-case keys of Flower's run config."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from flower_mcepl.errors import ConfigError

T = TypeVar("T")
RunConfig = Mapping[str, Any]


def read_fields(cls: type[T], run_config: RunConfig, **overrides: Any) -> T:
    """Build a settings dataclass from the run-config keys that bear its fields' names in kebab-case.

    Keys that are absent keep the field's default; ``overrides`` win.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = field.name.replace("_", "-")
        if field.name not in overrides and key in run_config:
            values[field.name] = _typed(key, run_config[key], field.type)
    return cls(**values, **overrides)


def _typed(key: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is not kind:
        raise ConfigError(
            f"run-config key {key} must be {kind.__name__}; got {value!r} ({type(value).__name__})."
        )
    return value


def field_keys(*classes: type) -> set[str]:
    """Return the run-config keys that the settings classes read."""
    return {field.name.replace("_", "-") for cls in classes for field in dataclasses.fields(cls)}


def with_section(run_config: RunConfig, section: str) -> dict[str, Any]:
    """Return the run config in which the keys of a section stand in place of the plain ones.

    The section ``dsgd`` of ``{"lr": 0.1, "dsgd.lr": 0.05, "local.lr": 0.03}`` gives
    ``{"lr": 0.05}``, so that one app config can hold the settings of several
    algorithms.
    """
    plain = {key: value for key, value in run_config.items() if "." not in key}
    prefix = section + "."
    return plain | {
        key.removeprefix(prefix): value
        for key, value in run_config.items()
        if key.startswith(prefix)
    }


def refuse_unknown_keys(run_config: RunConfig, known: Iterable[str]) -> None:
    """Raise ConfigError for a key that nobody reads, with the closest known one."""
    known = sorted(known)
    for key in run_config:
        if key not in known:
            raise ConfigError(f"unknown run-config key {key!r}. {closest(key, known)}")


def closest(key: str, known: Iterable[str]) -> str:
    """Say which known key is meant, or all of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."


def per_agent(key: str, value: Any) -> list[float]:
    """Read a ratio that may differ between agents: ``0.3``, or ``"0.1, 0.3, 0.5"`` given in turn."""
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


def per_layer(key: str, value: Any) -> dict[str, float]:
    """Read ratios by layer, ``"conv1.weight=0.6, fc*=0.95"``; empty for none."""
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
                f"run-config key {key} must be NAME=RATIO, each layer once, separated by commas, "
                "such as "
                f'"conv1.weight=0.6, fc*=0.95"; got {value!r}.'
            )
        ratios[name] = number
    return ratios


def check(holds: bool, rule: str, value: object, way_out: str = "") -> None:
    """Raise ConfigError unless ``holds``."""
    if not holds:
        raise ConfigError(f"{rule}; got {value!r}.{' ' + way_out if way_out else ''}")
