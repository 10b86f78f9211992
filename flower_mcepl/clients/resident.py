"""Resident worker of a device, seen from a message's process: found, started, asked.

The worker listens at a socket of the same user's. What goes over it are pickles, so
nobody else may reach it: the socket is 0600, in a folder that is 0700.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO, cast

from flwr.app import ArrayRecord, Context, RecordDict

from flower_mcepl.clients.naming import agent_index
from flower_mcepl.clients.seats import Finish
from flower_mcepl.errors import FlowerMceplError, StateError

AVAILABLE = hasattr(socket, "AF_UNIX") and hasattr(os, "getuid")

READY, PLAY, PLAYED = "ready", "play", "played"
KEEP, KEPT, FAILED = "keep", "kept", "failed"

_LONGEST = 80  # bytes of its folder's path: a socket's may have 103 in all
_PATIENCE = 300.0  # seconds that a worker may take to load torch and the app
_CODE = (
    "import json, sys; start = json.loads(sys.argv[1]); sys.path[:] = start['path']; "
    "from flower_mcepl.clients.worker import main; main(start)"
)
# Flower's secrets of one message, of no use to a process that outlives it
_SECRETS = ("TOKEN", "SECRET", "PASSWORD")
# Python warns of a Popen that is dropped while its process runs
_workers: "list[subprocess.Popen[bytes]]" = []
logger = getLogger("flwr")


@dataclass(frozen=True)
class Place:
    """Files of one worker: its socket, what it prints, and the lock of its start."""

    socket: Path
    log: Path
    lock: Path


def begin(
    names: Sequence[str | None],
    content: RecordDict,
    context: Context,
    opened: contextlib.ExitStack,
    *,
    idle: float,
) -> tuple[RecordDict, Finish]:
    """Play a round in the worker, which is started where there is none.

    Raises
    ------
    FlowerMceplError
        If the worker cannot be started, ends, or the round fails in it.
    """
    place = place_of(names, agent=agent_index(context))
    stream = opened.enter_context(_connect(place) or _started(place, names, idle=idle))
    answer = _ask(stream, place, (PLAY, content, context), expected=PLAYED)

    def finish() -> dict[str, ArrayRecord]:
        state = _ask(stream, place, (KEEP,), expected=KEPT)
        for name in [*context.state]:
            del context.state[name]
        context.state.update(state)
        return {}  # a device hands nothing over

    return answer, finish


def place_of(names: Sequence[str | None], *, agent: int) -> Place:
    """Place of the worker of an agent of this device's SuperNode and of this app.

    Another version of the app has another file or time of change, a restarted SuperNode
    another process; both get workers of their own.
    """
    source = importlib.util.find_spec(str(names[0]).partition(":")[0])
    origin = source.origin if source is not None and source.origin else ""
    changed = os.stat(origin).st_mtime_ns if os.path.exists(origin) else 0
    facts = [*names, agent, origin, changed, sys.executable, os.getppid()]
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    folder = _own_folder()
    if len(os.fsencode(folder)) > _LONGEST:
        raise StateError(
            f"a socket's path must be short, its folder at most {_LONGEST} bytes; got {folder}. "
            'Set XDG_RUNTIME_DIR to a shorter one, or worker = "none" on the node.'
        )
    return Place(*(folder / f"{name}.{ending}" for ending in ("sock", "log", "lock")))


def write(stream: BinaryIO, message: Any) -> None:
    """Send one message."""
    pickle.dump(message, stream)
    stream.flush()


def read(stream: BinaryIO) -> Any:
    """Receive one message.

    Raises
    ------
    EOFError
        If the other side has ended.
    """
    return pickle.load(stream)


def _own_folder() -> Path:
    """Folder for sockets that nobody else can enter.

    Raises
    ------
    StateError
        If it is another user's, or others may enter it.
    """
    if sys.platform == "win32":  # as in all of this file: `AVAILABLE`
        raise AssertionError("no sockets of the user's own")
    root = os.environ.get("XDG_RUNTIME_DIR", "") or tempfile.gettempdir()
    folder = Path(root) / f"flower_mcepl-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise StateError(
            f"the folder of a device's resident worker must be the user's own, and closed to "
            f"others (mode 700); {folder} belongs to user {facts.st_uid} and has mode "
            f'{stat.S_IMODE(facts.st_mode):o}. Remove it, or set worker = "none" on the node.'
        )
    return folder


# A process that has just been killed may still take a connection: only one that says it
# is ready is there.
def _connect(place: Place) -> BinaryIO | None:
    """Connection to a worker that is ready for a message; None where there is none."""
    if sys.platform == "win32":
        raise AssertionError("no sockets of the user's own")
    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect(str(place.socket))
            stream = cast(BinaryIO, link.makefile("rwb"))
        except OSError:
            return None
    with contextlib.suppress(EOFError, OSError):
        if read(stream) == READY:  # after the messages that came earlier
            return stream
    stream.close()
    return None


def _started(place: Place, names: Sequence[str | None], *, idle: float) -> BinaryIO:
    if sys.platform == "win32":
        raise AssertionError("no sockets of the user's own")
    import fcntl

    with place.lock.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker, however many messages come at once
        stream = _connect(place)
        if stream is not None:
            return stream
        place.socket.unlink(missing_ok=True)
        start = {
            "path": sys.path,
            "socket": str(place.socket),
            "names": [*names],
            "parent": os.getppid(),
            "idle": idle,
        }
        with place.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _CODE, json.dumps(start)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # it outlives this process
            )
        _workers.append(process)
        return _wait_for(process, place)


def _wait_for(process: "subprocess.Popen[bytes]", place: Place) -> BinaryIO:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        stream = _connect(place)
        if stream is not None:
            return stream
        if process.poll() is not None:
            raise FlowerMceplError(
                f"the device's resident worker ended as it started, with exit code "
                f"{process.returncode}: {_last_line(place.log)}. All that it printed is in "
                f'{place.log}; worker = "none" in the node config does without it.'
            )
        time.sleep(0.05)
    process.kill()
    raise FlowerMceplError(
        f"the device's resident worker did not start within {_PATIENCE:g} s; see {place.log}, or "
        'set worker = "none" in the node config.'
    )


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("FLWR_") and any(word in name for word in _SECRETS))
    }


def _ask(stream: BinaryIO, place: Place, question: Any, *, expected: str) -> Any:
    try:
        write(stream, question)
        kind, answer, lines = read(stream)
    except (EOFError, OSError) as error:
        raise FlowerMceplError(
            f"the device's resident worker ended while it played ({_last_line(place.log)}). What "
            f"it printed is in {place.log}; the next message starts a new one."
        ) from error
    for level, line in lines:
        logger.log(level, line)
    if kind == FAILED:
        raise FlowerMceplError(answer)
    assert kind == expected
    return answer


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return lines[-1][:300] if lines else "it printed nothing"
