"""Resident worker of a device: keeps torch, network, data and agent between messages.

It answers one message after the other. What it keeps in memory saves time and nothing
else: an agent's state on the disk stays the truth, as for a process of one message, so
it may be killed at any time.
"""

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from flwr.app import Context, RecordDict

from flower_mcepl.clients.app import AgentApp
from flower_mcepl.clients.named import Names, load_app
from flower_mcepl.clients.naming import naming_the_agent
from flower_mcepl.clients.resident import FAILED, KEEP, KEPT, PLAYED, READY, read, write
from flower_mcepl.clients.seats import Finish

_LOOK_UP = 1.0  # seconds between looks at the clock and at the SuperNode


def main(start: Mapping[str, Any]) -> None:
    """Serve at a socket until it was idle for long enough, or the SuperNode is gone."""
    if sys.platform == "win32":  # see `resident.AVAILABLE`
        raise AssertionError("no sockets of the user's own")
    app = load_app(Names(*start["names"]), id="resident")
    with socket.socket(socket.AF_UNIX) as door:
        before = os.umask(0o177)
        door.bind(start["socket"])  # 0600
        os.umask(before)
        door.listen()
        door.settimeout(_LOOK_UP)
        try:
            _serve(door, app, parent=start["parent"], idle=start["idle"])
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(start["socket"])


def _serve(door: socket.socket, app: AgentApp, *, parent: int, idle: float) -> None:
    last = time.monotonic()
    while time.monotonic() - last < idle and _runs(parent):
        try:
            link, _ = door.accept()
        except TimeoutError:
            continue
        with link:
            link.settimeout(None)
            with link.makefile("rwb") as stream:
                serve_one(stream, app)  # type: ignore[arg-type]
        last = time.monotonic()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def serve_one(stream: BinaryIO, app: AgentApp) -> None:
    """Play a message; keep the new state once its process has let the answer pass."""
    # whoever asked may end at any time: then nobody waits for an answer
    with contextlib.suppress(EOFError, OSError), contextlib.ExitStack() as opened:
        write(stream, READY)
        _, content, context = read(stream)
        finish = _play(stream, app, content, context, opened)
        if finish is not None and read(stream) == (KEEP,):
            _keep(stream, context, finish)


def _play(
    stream: BinaryIO,
    app: AgentApp,
    content: RecordDict,
    context: Context,
    opened: contextlib.ExitStack,
) -> Finish | None:
    finish: Finish | None = None
    with _lines() as lines:
        try:
            with naming_the_agent(context):
                answer, finish = app.begin(content, context, opened)
            reply: tuple[str, Any, Any] = (PLAYED, answer, lines)
        except Exception as error:
            reply = _failed(error, lines)
    write(stream, reply)
    return finish


def _keep(stream: BinaryIO, context: Context, finish: Finish) -> None:
    with _lines() as lines:
        try:
            with naming_the_agent(context):
                finish()
            reply: tuple[str, Any, Any] = (KEPT, context.state, lines)
        except Exception as error:
            reply = _failed(error, lines)
    write(stream, reply)


def _failed(error: Exception, lines: list[tuple[int, str]]) -> tuple[str, str, Any]:
    logging.getLogger("flwr").error(traceback.format_exc())  # into the lines, too
    return FAILED, str(error), lines


@contextlib.contextmanager
def _lines() -> Iterator[list[tuple[int, str]]]:
    """What is logged meanwhile: it belongs into the log of the device."""
    lines: list[tuple[int, str]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelno, record.getMessage()))

    collector, log = Collector(), logging.getLogger("flwr")
    log.addHandler(collector)
    try:
        yield lines
    finally:
        log.removeHandler(collector)
