"""Sizes in bytes as a person writes them: ``"1GB"``, ``"512 MB"``."""

import re

from flower_mcepl.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?B|)", re.ASCII | re.IGNORECASE)


def read_bytes(text: str, *, key: str) -> int:
    """Number of bytes that a setting names.

    Raises
    ------
    ConfigError
        If it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f'{key} must be a size such as "1GB", "512MB" or "0"; got {text!r}. Units are '
            "B, kB, MB, GB and TB, of 1000 each."
        )
    return round(float(match[1]) * _UNITS[match[2].upper()])
