"""Keys that name layers: an exact name, or a pattern such as ``head.*``."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches_any(key: str, names: Iterable[str]) -> bool:
    """Whether a key is, or fits, one of the names."""
    return any(fnmatchcase(name, key) for name in names)


def best_key(name: str, keys: Iterable[str]) -> str | None:
    """Key that counts for a name: itself, else the first pattern that it fits."""
    keys = list(keys)
    if name in keys:
        return name
    return next((key for key in keys if fnmatchcase(name, key)), None)
