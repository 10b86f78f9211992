"""Atomic files: whoever reads one gets the old one whole or the new one whole."""

import os
import sys
from pathlib import Path


def replace_file(path: Path, *parts: bytes, mode: int = 0o666) -> None:
    """Write a file in one step: the old one, the new one or none is there at any time.

    When this returns, the file survives a loss of power.

    Parameters
    ----------
    path : Path
        The file; its folder must be there.
    *parts : bytes
        What it is to hold, one behind the other.
    mode : int (default: 0o666)
        Who may read and write it, less the process's umask.

    Raises
    ------
    OSError
        If it cannot be written; what stood there before stands there still.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed writers of files with this prefix left behind.

    Call it while nobody else writes them.
    """
    for leftover in folder.glob(f".{prefix}*.tmp"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a rename survive a loss of power; Windows has no means for it."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
