"""Optional packages: an import that fails names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from flower_mcepl.errors import ConfigError


@contextmanager
def report_extra() -> Iterator[None]:
    """Name the extra to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reports need {error.name}: install flower-mcepl with its extra 'report' "
            "(in a clone: pip install -e '.[report]')."
        ) from error
