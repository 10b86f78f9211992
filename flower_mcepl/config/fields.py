"""Settings as frozen dataclasses; their fields are keys of the run config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from flower_mcepl.errors import ConfigError

T = TypeVar("T")
RunConfig = Mapping[str, Any]

# Metadata of a setting that may differ when a run is resumed: no bit depends on it.
FREE = {"free": True}


def read_fields(cls: type[T], run_config: RunConfig, **overrides: Any) -> T:
    """Settings of a dataclass from the run-config keys named as its fields.

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


def free_keys(*classes: type) -> set[str]:
    """Run-config keys of these settings that may differ when a run is resumed."""
    return {
        field.name.replace("_", "-")
        for cls in classes
        for field in dataclasses.fields(cls)
        if field.metadata.get("free")
    }


def with_section(run_config: RunConfig, section: str) -> dict[str, Any]:
    """Run config in which the keys of a section stand in place of the plain ones.

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
