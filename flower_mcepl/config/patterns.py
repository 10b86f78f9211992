"""Keys that name layers: an exact name, or a pattern such as ``head.*``."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from flower_mcepl.errors import ConfigError


def matches_any(key: str, names: Iterable[str]) -> bool:
    """Whether a key is, or fits, one of the names."""
    return any(fnmatchcase(name, key) for name in names)


def best_key(name: str, keys: Iterable[str]) -> str | None:
    """Key that counts for a name: itself, else the first pattern that it fits."""
    keys = list(keys)
    if name in keys:
        return name
    return next((key for key in keys if fnmatchcase(name, key)), None)


def keys_by_name(names: Iterable[str], keys: Iterable[str], *, of: str) -> dict[str, str | None]:
    """Key that counts for each layer; None where none fits.

    Raises
    ------
    ConfigError
        If a key of the setting ``of`` fits no layer.
    """
    names, keys = list(names), list(keys)
    for key in keys:
        if not matches_any(key, names):
            raise ConfigError(
                f"the key {key!r} of {of} fits no layer; use names or patterns of: "
                f"{', '.join(names)}."
            )
    return {name: best_key(name, keys) for name in names}
