"""One study at a time in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from flower_mcepl.errors import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """Hold the folder of a study.

    The operating system lets go of the lock when its process ends, however it ends: a
    lock is never stale. The file that stays behind means nothing by itself; the process
    id in it is for the message only.

    Raises
    ------
    ConfigError
        If another process holds it.
    """
    import fcntl  # here: reading records works on Windows, too, which has none

    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"one process at a time runs a study; process {file.read().strip() or '?'} is at "
                f"work in {folder}. Wait for it, or give this study another folder (out)."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
