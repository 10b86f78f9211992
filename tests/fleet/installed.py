"""Packages of somebody else, laid into a folder as an installer does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flower_mcepl.config.registry import Registry, _installed


def install(folder: Path, package: str, entry_points: str, module: str = "") -> None:
    """Lay a package of one module into ``folder``, to be put on the path."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"{entry_points}\n")
    (folder / f"{package}.py").write_text(module)


@contextmanager
def installed(folder: Path, registry: Registry) -> Iterator[None]:
    """Let this process find the packages in ``folder``; forget them afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(registry, "_loaded", dict(registry._loaded))
        _installed.cache_clear()
        yield
    _installed.cache_clear()
