"""Optional packages: an import that fails names the extra to install."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from flower_mcepl.errors import ConfigError


def report_extra() -> AbstractContextManager[None]:
    """Name the extra to install where an import for a report fails."""
    return needs_extra("report", what="reports")


@contextmanager
def needs_extra(extra: str, *, what: str) -> Iterator[None]:
    """Name the extra to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} need {error.name}: install flower-mcepl with its extra {extra!r} "
            f"(in a clone: pip install -e '.[{extra}]')."
        ) from error
