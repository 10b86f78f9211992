"""Every process that descends from ours, on Linux and macOS."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import final


@final
class ProcessFamily:
    """The processes we started and all that descend from them, however they detach.

    SuperLink puts its helper into a session of its own, and Ray's agents outlive the
    processes that started them. A process belongs to the family when its parent does,
    when its process group belonged to a member, or (on Linux) when it carries our mark
    in its environment. Never by its name.

    Parameters
    ----------
    mark
        One ``NAME=value`` entry that only our processes have in their environment.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._groups: set[int] = set()

    def members(self) -> list[int]:
        """Return the living processes of the family."""
        table = _process_table()
        parents = {pid: parent for pid, parent, _ in table}
        mine = {pid for pid, _, group in table if group in self._groups or self._marked(pid)}
        for pid in parents:
            line = [pid]
            while (
                (parent := parents.get(line[-1], 0)) and line[-1] not in mine and parent not in line
            ):
                line.append(parent)
            if line[-1] in mine:
                mine.update(line)
        mine.discard(os.getpid())
        own = {group for pid, _, group in table if pid == os.getpid()}
        self._groups = {group for pid, _, group in table if pid in mine} - own
        return sorted(mine)

    def _marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # gone, somebody else's, or no /proc
            return False

    def adopt(self, pid: int) -> None:
        """Take in a process that leads its own group."""
        self._groups.add(pid)

    def end(
        self, *, grace: float, busy: Callable[[], bool] = lambda: False, patient: bool = True
    ) -> list[int]:
        """Wait, SIGTERM, SIGKILL, ``grace`` seconds each; return who is left.

        Not ``patient`` begins with SIGTERM.
        """
        if patient and self._gone_within(grace, busy):
            return []
        for name in ("SIGTERM", "SIGKILL"):
            for pid in self.members():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.Signals[name])
            if self._gone_within(grace, busy):
                return []
        return self.members()

    def _gone_within(self, seconds: float, busy: Callable[[], bool]) -> bool:
        end = time.monotonic() + seconds
        while busy() or self.members():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


def _process_table() -> list[tuple[int, int, int]]:
    """Return (pid, parent, process group) of every living process, zombies left out."""
    return _table_of_proc() if Path("/proc/self/stat").exists() else _table_of_ps()


def _table_of_proc() -> list[tuple[int, int, int]]:
    table = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                state, parent, group = stat.rpartition(")")[2].split()[:3]
                if state not in "ZX":
                    table.append((int(entry.name), int(parent), int(group)))
    return table


def _table_of_ps() -> list[tuple[int, int, int]]:
    """Return the same on macOS, which has no /proc."""
    command = ["ps", "-axo", "pid=,ppid=,pgid=,stat="]  # as BSD's and Linux's ps both understand
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    rows = [row.split() for row in shown.stdout.splitlines()]
    return [
        (int(pid), int(parent), int(group))
        for pid, parent, group, state in rows
        if state[0] not in "ZX"
    ]
