"""Tasks side by side, each in a process of its own: none takes another one down."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

T = TypeVar("T")
Work = Callable[[T], str | None]  # returns what went wrong
Pipe = Any  # one end of a pipe, whose type is another one on Windows
_KILLED = -9  # exit code of a process that SIGKILL ended; Windows knows neither


def side_by_side(
    work: Work[T], tasks: Sequence[T], *, jobs: int
) -> Generator[tuple[T, str | None], None, None]:
    """Tasks with what went wrong in each, as they end; at most `jobs` at a time."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half
    waiting = list(reversed(tasks))
    # by the handle that tells of the process's end
    running: dict[object, tuple[SpawnProcess, Pipe, T]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                receiver, sender = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_work, args=(work, task, sender))
                _start_deaf(process)
                sender.close()
                running[process.sentinel] = process, receiver, task
            # either may come first: a pipe that nobody empties lets no process end
            ready = wait(
                [one for process, pipe, _ in running.values() for one in (process.sentinel, pipe)]
            )
            ended = [one for one, (_, pipe, _) in running.items() if one in ready or pipe in ready]
            for handle in ended:
                process, receiver, task = running.pop(handle)
                yield task, _outcome(process, receiver)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, receiver, _ in running.values():
            process.join()
            receiver.close()


def _start_deaf(process: SpawnProcess) -> None:
    """Start a process that Ctrl-C does not reach: its parent ends it."""
    if sys.platform == "win32":  # which blocks no signals: the process itself ignores it, later
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outcome(process: SpawnProcess, receiver: Pipe) -> str | None:
    said: list[str | None] = []
    with receiver, contextlib.suppress(EOFError, OSError):  # who dies says nothing, or half
        said = [receiver.recv()] if receiver.poll() else []
    process.join()
    if said and process.exitcode == 0:
        return said[0]
    killed = process.exitcode == _KILLED
    reason = "killed, maybe for want of memory" if killed else "see its log"
    return f"the run's process ended with exit code {process.exitcode} ({reason})."


def _work(work: Work[T], task: T, sender: Pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sender.send(work(task))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a killed study leaves nobody at work behind
