"""Checks of settings: rules, unknown keys, the closest known name."""

import difflib
from collections.abc import Iterable

from flower_mcepl.config.fields import RunConfig
from flower_mcepl.errors import ConfigError


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


def check(holds: bool, rule: str, value: object, way_out: str = "") -> None:
    """Raise ConfigError unless ``holds``."""
    if not holds:
        raise ConfigError(f"{rule}; got {value!r}.{' ' + way_out if way_out else ''}")
