"""Sealed files: written in one step, under a checksum over all that they hold.

A sealed file is a header (8 bytes that say of which kind it is, its format version, a
digest) and a body. The digest covers everything else, so a file that was cut off or has
a flipped bit anywhere shows.
"""

import contextlib
import errno
import hashlib
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from flower_mcepl.errors import FlowerMceplError, StateError
from flower_mcepl.files.atomic import replace_file

_HEADER = struct.Struct(">8sH16s")  # kind, version, digest
_LOOK_AGAIN = 0.05  # seconds between two looks at a lock that another process holds


class Kind(NamedTuple):
    """What a sealed file holds."""

    magic: bytes  # 8 bytes
    version: int  # raise it when the body changes its meaning
    name: str  # for messages


class DamagedError(Exception):
    """Damage of a sealed file; the message completes "the file is damaged: ..."."""


def write_sealed(path: Path, body: bytes, kind: Kind) -> None:
    """Write a file for its owner alone, in one step (`replace_file`)."""
    header = _HEADER.pack(kind.magic, kind.version, _digest(body, kind.magic, kind.version))
    replace_file(path, header, body, mode=0o600)


def read_sealed(path: Path, kind: Kind) -> memoryview:
    """Return the body of a sealed file.

    Raises
    ------
    DamagedError
        If the file is not what was written.
    StateError
        If it cannot be read, or is sound and has another format version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"the disk cannot read it ({error})") from error
        raise StateError(
            f"{path} cannot be read ({error}). Give this process the right to read it."
        ) from error
    if len(data) < _HEADER.size:
        raise DamagedError(f"it has {len(data)} bytes and ends within its header of {_HEADER.size}")
    magic, version, digest = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if magic != kind.magic:
        raise DamagedError(f"it does not begin as {kind.name} does")
    if digest != _digest(body, magic, version):
        raise DamagedError(f"the checksum over its {len(data)} bytes is wrong")
    if version != kind.version:
        raise StateError(
            f"{path} is {kind.name} of format version {version}, but this release of flower-mcepl "
            f"writes and reads version {kind.version}. Use the release that wrote it, or move the "
            "file away."
        )
    return body


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file for later study; return its new name, else None."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}{f'-{number}' if number else ''}.damaged")
        if not aside.exists():
            with contextlib.suppress(OSError):
                os.replace(path, aside)
                return aside
            break
    return None


@contextlib.contextmanager
def file_lock(
    path: Path,
    *,
    wait: float,
    busy: str,
    error: type[FlowerMceplError] = StateError,
    remove: bool = False,
) -> Iterator[None]:
    """Lock that the operating system releases when its process ends, however it ends.

    Parameters
    ----------
    path : Path
        The file that is locked; it and its folder are made when needed, and stay.
    wait : float
        Seconds to wait for another process that holds it.
    busy : str
        What to say where that was not long enough; ``{process}`` becomes the other
        process's id.
    error : type of FlowerMceplError (default: StateError)
        What is then raised.
    remove : bool (default: False)
        Remove the file at the end, as the last thing done under the lock. Windows
        removes no file that is open: there it stays.

    Raises
    ------
    StateError (or ``error``)
        If another process still holds it after `wait`: ``busy``.
    """
    with _open_locked(path, time.monotonic() + wait, busy, error) as file:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            if remove:
                _remove_open(path)
            _unlock(file)


def _open_locked(
    path: Path, deadline: float, busy: str, error: type[FlowerMceplError]
) -> IO[bytes]:
    """Open and lock the file that stands at a path.

    Whoever held it may have removed it meanwhile. A lock on the removed file keeps
    nobody out, as the next process makes a new one; so it is taken for none.
    """
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(path, "a+b", buffering=0))
            except FileNotFoundError:  # its folder was removed meanwhile
                continue
            while not _lock(file):
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise error(busy.replace("{process}", file.read().decode().strip() or "?"))
                time.sleep(_LOOK_AGAIN)
            if _stands_at(path, file):
                opened.pop_all()
                return file


def _stands_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is the one at a path, not one that was removed there."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_open(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        if sys.platform != "win32":
            raise


if sys.platform == "win32":
    import msvcrt

    # Nobody else reads a byte that is locked here, so it is one far behind the process
    # id.
    _LOCKED_BYTE = 1 << 30

    def _lock(file: IO[bytes]) -> bool:
        """Lock a file unless another process has it locked."""
        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        """Unlock a file at once; the system takes its time after it is closed."""
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> bool:
        """Lock a file unless another process has it locked."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        """Do nothing: the lock ends as the file is closed."""


def _digest(body: bytes | memoryview, magic: bytes, version: int) -> bytes:
    digest = hashlib.blake2b(magic + version.to_bytes(2, "big"), digest_size=16)
    digest.update(body)
    return digest.digest()
