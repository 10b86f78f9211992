"""States of agents on disk: two rounds of each, one of them sound at any moment.

One file per agent and round, ``agent-0003-round-000012.state``: a sealed `Generation`
(see `flower_mcepl.files.sealed`). A writer that is killed leaves a temporary file at
most; the next one removes it.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from logging import getLogger
from pathlib import Path

from flower_mcepl.errors import StateError
from flower_mcepl.files.atomic import remove_leftovers
from flower_mcepl.files.sealed import (
    DamagedError,
    Kind,
    file_lock,
    read_sealed,
    set_aside,
    write_sealed,
)
from flower_mcepl.runs.generation import Generation

STATE = Kind(b"FMCESTAT", 2, "an agent's state")
KEPT = 2  # rounds of each agent
Log = Callable[[str], None]

_FILE = re.compile(r"agent-(\d{4,})-round-(\d{6,})\.state")
_RUN = re.compile(r"[0-9a-f]{16}")


class StateStore:
    """The states of a run's agents in one folder.

    Parameters
    ----------
    folder : Path
        Where they lie; it is made when it is needed.
    log : callable (default: the warnings of this module's logger)
        Takes a line on whatever a person should know of: a damaged file, a round that
        is played again.
    """

    def __init__(self, folder: Path, *, log: Log | None = None) -> None:
        self.folder = folder
        self._log = log or getLogger(__name__).warning

    def hold(
        self, agent: int, *, wait: bool = False, remove: bool = False
    ) -> AbstractContextManager[None]:
        """Lock on an agent's files, which `save` needs; ``remove`` it at the end.

        Raises
        ------
        StateError
            If another process holds them and `wait` is False.
        """
        busy = (
            f"one process at a time plays agent {agent}; process {{process}} is at it in "
            f"{self.folder}. Give every SuperNode a partition-id of its own, or, where several "
            "fleets share this machine, a state-dir."
        )
        return file_lock(
            self.folder / f".agent-{agent:04d}.lock",
            wait=math.inf if wait else 0,
            busy=busy,
            remove=remove,
        )

    def rounds(self, agent: int) -> list[int]:
        """Return the rounds after which a state of the agent is stored, ascending."""
        if not self.folder.is_dir():
            return []
        matches = [match for name in os.listdir(self.folder) if (match := _FILE.fullmatch(name))]
        return sorted(int(match[2]) for match in matches if int(match[1]) == agent)

    def save(self, generation: Generation, *, checkpoints: Collection[int] = ()) -> None:
        """Store a state and prune: keep it, the one before, and those of checkpoints.

        Later ones are there when a resumed run plays rounds again. ``checkpoints`` are
        rounds that the relay could go back to: for each, the newest state that is no
        later stays, too.
        """
        agent, round = generation.agent, generation.round
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_sealed(self._path(agent, round), generation.encode(), STATE)
        stored = self.rounds(agent)
        kept = [earlier for earlier in stored if earlier <= round][-KEPT:]
        kept += [
            max((r for r in stored if r <= checkpoint), default=round) for checkpoint in checkpoints
        ]
        for other in stored:
            if other not in kept:
                self._path(agent, other).unlink(missing_ok=True)
        remove_leftovers(self.folder, f"agent-{agent:04d}-")

    def load(self, agent: int, *, run: str, before: int) -> Generation | None:
        """Newest sound state that the agent had before a round; None if there is none.

        A damaged file is renamed to ``*.damaged``, and the one before it is taken.

        Raises
        ------
        StateError
            If a sound file is of another run, agent or format version, or cannot be
            read.
        """
        stored = self.rounds(agent)
        for round in reversed([round for round in stored if round < before]):
            path = self._path(agent, round)
            try:
                generation = Generation.decode(bytes(read_sealed(path, STATE)))
            except DamagedError as error:
                self._tell_damage(agent, path, error)
                continue
            except StateError as error:
                raise StateError(
                    str(error) if str(path) in str(error) else f"{path}: {error}"
                ) from error
            _check(generation, path, run=run, agent=agent, round=round)
            if stored[-1] >= before:
                self._log(
                    f"agent {agent} plays round {before} again, from its state after round "
                    f"{round}; the newest that it has is that after round {stored[-1]}."
                )
            return replace(generation, source=str(path))
        if stored:
            self._log(
                f"agent {agent} has no sound state from before round {before} in {self.folder}: "
                "it starts afresh."
            )
        return None

    def clear(self) -> None:
        """Remove all states, as when a run is over; damaged files stay."""
        if self.folder.is_dir():
            for name in os.listdir(self.folder):
                if _FILE.fullmatch(name) or re.fullmatch(r"\.agent-\d{4,}-.*\.tmp", name):
                    (self.folder / name).unlink(missing_ok=True)
                elif match := re.fullmatch(r"\.agent-(\d{4,})\.lock", name):
                    # who holds it goes on, or removes it at the end
                    with contextlib.suppress(StateError), self.hold(int(match[1]), remove=True):
                        pass

    def _path(self, agent: int, round: int) -> Path:
        return self.folder / f"agent-{agent:04d}-round-{round:06d}.state"

    def _tell_damage(self, agent: int, path: Path, error: DamagedError) -> None:
        aside = set_aside(path)
        kept = "it could not be renamed" if aside is None else f"it is kept as {aside.name}"
        self._log(
            f"agent {agent}: the state {path} is damaged: {error}; {kept}. An earlier state is "
            "taken if there is one."
        )


def device_store(root: Path, *, run: str, agent: int, log: Log | None = None) -> StateStore:
    """Store of an agent's states of one run on its device: ``<root>/<run>/agent-0003``.

    Raises
    ------
    StateError
        If ``run`` is not 16 hex digits: it comes from the network and becomes the name
        of a folder.
    """
    if not _RUN.fullmatch(run):
        raise StateError(
            f"a run's id is 16 lower-case hex digits; got {run!r:.60}. Use GossipStrategy of this "
            "release."
        )
    return StateStore(root / run / f"agent-{agent:04d}", log=log)


def forget_runs(root: Path, *, agent: int, keep: int, log: Log | None = None) -> None:
    """Remove an agent's states of all but the last ``keep`` runs.

    Runs that left no state do not count, and their folders go. Nothing is removed that
    another process holds, nor anything that is not named as states are. What cannot be
    looked at or removed stays, and ``log`` gets a line on it (default: the warnings of
    this module's logger).
    """
    folders: list[Path] = []
    with _telling_what_stays(root, log):
        folders = [run / f"agent-{agent:04d}" for run in root.iterdir() if _RUN.fullmatch(run.name)]
    written: dict[Path, float] = {}
    for folder in folders:
        with _telling_what_stays(folder, log):
            if folder.is_dir():
                written[folder] = _last_written(folder)
    with_states = sorted(
        (folder for folder in written if written[folder]), key=written.__getitem__, reverse=True
    )
    for folder in written.keys() - set(with_states[:keep]):
        with _telling_what_stays(folder, log):
            _forget(folder, agent)


@contextlib.contextmanager
def _telling_what_stays(folder: Path, log: Log | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        (log or getLogger(__name__).warning)(
            f"states of earlier runs in {folder} stay there: {error}."
        )


def _forget(folder: Path, agent: int) -> None:
    # another process may hold them
    with contextlib.suppress(StateError), StateStore(folder).hold(agent, remove=True):
        StateStore(folder).clear()
        for damaged in folder.glob("*.state*.damaged"):
            damaged.unlink()
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):  # it holds something else
            empty.rmdir()


def _last_written(folder: Path) -> float:
    """Return when the newest state in a folder was written, 0 if there is none."""
    return max((file.stat().st_mtime for file in folder.glob("*.state")), default=0.0)


def _check(generation: Generation, path: Path, *, run: str, agent: int, round: int) -> None:
    saved = {"run": generation.run, "agent": generation.agent, "round": generation.round}
    for key, mine in {"run": run, "agent": agent, "round": round}.items():
        if saved[key] != mine:
            raise StateError(
                f"{path} is of {key} {saved[key]!r}, but agent {agent} needs that of {key} "
                f"{mine!r}. Put every file back where it was written, or move it away to start "
                "afresh."
            )
