"""Room on a disk: whether a folder can be written, before any work depends on it."""

import os
import shutil
from pathlib import Path

from flower_mcepl.errors import FlowerMceplError

ROOM = 50_000_000  # bytes that must be free where a run or an agent writes


def refuse_unusable(
    folder: Path, what: str, *, error: type[FlowerMceplError], way_out: str = "Name another."
) -> None:
    """Raise the error for a folder that cannot be made or written, or has no room.

    Nothing is made or written for it.
    """
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise error(f"{what} must be a folder that can be written; {existing} cannot. {way_out}")
    free = shutil.disk_usage(existing).free
    if free < ROOM:
        raise error(
            f"{what} must have {ROOM // 10**6} MB of room; {existing} has {free // 10**6} MB. "
            f"Make room, or: {way_out}"
        )
