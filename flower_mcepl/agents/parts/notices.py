"""Notices of a device: what its log says once in a process."""

from functools import lru_cache
from logging import getLogger


@lru_cache
def warn_once(text: str) -> None:
    """Log a warning, unless this process has already."""
    getLogger(__name__).warning("%s", text)
