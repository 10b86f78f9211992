"""Settings as frozen dataclasses; their fields are keys of the run config."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
    hints = get_type_hints(cls)  # fields of a postponed annotation have its text as type
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = field.name.replace("_", "-")
        if field.name not in overrides and key in run_config:
            values[field.name] = _typed(key, run_config[key], hints[field.name])
    return cls(**values, **overrides)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value, if it is one that the field's type has; a whole number may be a float.

    A run config holds bool, int, float and str: of a union those members count.
    """
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        known = ", ".join(map(repr, get_args(kind)))
        raise ConfigError(f"run-config key {key} must be one of {known}; got {value!r}.")
    kinds = [one for one in _members(kind) if one in _PLAIN]
    if not kinds:
        raise ConfigError(
            f"run-config key {key} cannot be set: a run config holds bool, int, float and str, "
            f"and its field is of type {kind}; got {value!r}. Leave the key out, or let the "
            "field be a text that the config class reads."
        )
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = " or ".join(one.__name__ for one in kinds)
    raise ConfigError(
        f"run-config key {key} must be {names}; got {value!r} ({type(value).__name__})."
    )


_PLAIN = (bool, int, float, str)


def _members(kind: Any) -> tuple[Any, ...]:
    if kind is Any or kind is object:
        return _PLAIN
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


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
