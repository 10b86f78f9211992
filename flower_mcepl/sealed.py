"""Files that are whole or refused: written atomically, under a checksum over all that they hold.

A sealed file is a header (8 bytes that say of which kind it is, its format version, a digest) and a body. The digest
covers everything else, so a file that was cut off or has a flipped bit anywhere shows.
"""

import contextlib
import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flower_mcepl.errors import StateError

_HEADER = struct.Struct(">8sH16s")  # kind, version, digest


class Kind(NamedTuple):
    """What a sealed file holds."""

    magic: bytes  # 8 bytes
    version: int  # raise it when the body changes its meaning
    name: str  # for messages


class DamagedError(Exception):
    """A sealed file is not what was written; the message completes "the file is damaged: ...". Callers catch it."""


def write_sealed(path: Path, body: bytes, kind: Kind) -> None:
    """Write a file for its owner alone, so that at any moment the old one, the new one or none stands under its name.

    When this returns, the file survives a loss of power.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(_HEADER.pack(kind.magic, kind.version, _digest(body, kind.magic, kind.version)))
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
        raise StateError(f"{path} cannot be read ({error}). Give this process the right to read it.") from error
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
            f"{path} is {kind.name} of format version {version}, but this release of flower-mcepl writes and reads "
            f"version {kind.version}. Use the release that wrote it, or move the file away."
        )
    return body


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed writers of files whose names begin so left behind; call it while nobody else writes them."""
    for leftover in folder.glob(f".{prefix}*.tmp"):
        leftover.unlink(missing_ok=True)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file, so that it can be looked at later; return its new name, None if that is impossible."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}{f'-{number}' if number else ''}.damaged")
        if not aside.exists():
            with contextlib.suppress(OSError):
                os.replace(path, aside)
                return aside
            break
    return None


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool, busy: str = "") -> Iterator[None]:
    """Hold a lock; the operating system lets go of it when the process ends, however it ends.

    On Windows, which has no such locks, it does nothing.

    Raises
    ------
    StateError
        If another process holds it and `wait` is False: ``busy``, where ``{process}`` becomes that process's id.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise StateError(busy.replace("{process}", file.read().strip() or "?")) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _digest(body: bytes | memoryview, magic: bytes, version: int) -> bytes:
    digest = hashlib.blake2b(magic + version.to_bytes(2, "big"), digest_size=16)
    digest.update(body)
    return digest.digest()


def _sync_folder(folder: Path) -> None:
    """Let a rename survive a loss of power; Windows has no means for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
