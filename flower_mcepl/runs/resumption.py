"""Resumption of runs: the relay's side lies in the run record, and goes on from there.

A checkpoint of round t is written after all answers of round t were taken in, and only
where the order of round t asked every agent to store its state, too: else the two would
not fit together.

Agents first, the checkpoint last. A kill between the two leaves states that no
checkpoint needs, which the next round writes over; never a checkpoint whose states are
missing. Two of each are kept, so that a file that a kill or a bad disk has damaged
costs the rounds since the one before it, not the run.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, final

from flower_mcepl.errors import RecordError
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import FrameT
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.files.sealed import file_lock
from flower_mcepl.record.layout import (
    CHECKPOINT,
    CONFIG,
    EVENTS,
    FRAMES,
    RELAY,
    ROUNDS,
    SUMMARY,
    TRAFFIC,
    checkpoint_rounds,
)
from flower_mcepl.record.parsing import read_raw
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.values import package_versions, utc_now
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.checkpoint import (
    ROUND,
    drop_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    set_damaged_aside,
)
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.runs.same_run import check_same_agents, check_same_run
from flower_mcepl.runs.store import StateStore

LOCK = ".lock"  # in the run record
RUN = "run"  # key of config.json: 16 hex digits that stand for the run, however often it is resumed
LAST_FRAMES = "last-frames"  # key of a checkpoint: round of each agent's last frame by then
_FILES = (ROUNDS, RELAY, TRAFFIC)
_ALSO = (EVENTS,)  # of some runs


def new_run_id() -> str:
    """Return 16 hex digits that no other run has."""
    return secrets.token_hex(8)


class Reopened(NamedTuple):
    """A run record that was set back to its last checkpoint."""

    record: RunRecord
    checkpoint: Bundle
    answered: int  # agents that took part in the last round before the run broke off


@final
class RunCheckpoints(Generic[FrameT]):
    """Checkpoints of the relay's side of a run, in its record.

    Parameters
    ----------
    record : RunRecord
        The record of the run.
    exchange : Relay or Center
        The exchange between the agents.
    monitor : RunMonitor
        The run's progress so far.
    every : int
        Rounds between checkpoints; 0 writes none.
    """

    def __init__(
        self,
        record: RunRecord,
        exchange: Exchange[FrameT],
        monitor: RunMonitor[FrameT],
        *,
        every: int,
    ) -> None:
        self.folder, self.every = record.path / CHECKPOINT, every
        self._record, self._exchange, self._monitor = record, exchange, monitor

    def due(self, round: int) -> bool:
        """Whether a checkpoint follows ``round``; agents store their states then.

        One follows the last round, too: what was learned must not hang on the closing
        exchange.
        """
        return self.every > 0 and (round % self.every == 0 or round == self._monitor.num_rounds)

    def rounds(self) -> list[int]:
        """Return the rounds of the checkpoints that are there, ascending."""
        return checkpoint_rounds(self.folder)

    def save(self, round: int, more: Bundle) -> None:
        """Write the checkpoint of ``round``, with ``more`` beside it.

        All answers of the round were taken in.
        """
        state = self._exchange.state(round=round)
        facts = {
            "exchange": state.facts,
            "monitor": self._monitor.state(),
            "files": {file: _synced_size(self._record.path / file) for file in self._files()},
            **more.facts,
        }
        groups = {**more.groups(), "exchange": state.arrays}
        save_checkpoint(self.folder, round, Bundle.joined(facts, groups))

    def _files(self) -> list[str]:
        return [*_FILES, *(file for file in _ALSO if (self._record.path / file).exists())]

    def restore(self, checkpoint: Bundle) -> None:
        """Let exchange and monitor go on where `save` was called.

        The record is as `reopen` left it.
        """
        exchange = Bundle(checkpoint.facts["exchange"], checkpoint.group("exchange"))
        self._exchange.restore(exchange)
        self._monitor.restore(checkpoint.facts["monitor"], read_run(self._record.path))

    def clear(self) -> None:
        """Delete the checkpoints of a finished run, the agents' side, too."""
        drop_checkpoints(self.folder)
        StateStore(self._record.agents_dir).clear()


def reopen(
    path: Path,
    config: Mapping[str, Any],
    *,
    held: contextlib.ExitStack,
    agents: Iterable[Mapping[str, Any]] = (),
    with_frames: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Reopened:
    """Set a run record back to its last checkpoint, and note the resumption in it.

    Lines and frames of later rounds go: these rounds come again, and nothing is written
    twice. Nothing is changed before everything has been checked.

    Parameters
    ----------
    path : Path
        The record.
    config : mapping
        What `RunRecord.create` would get for the new run.
    held : ExitStack
        Gets the hold on the record, see `only_writer`.
    agents : iterable of mapping
        Introductions of the agents, where they are known before the first round.
    with_frames : bool (default: False)
        As in `RunRecord.create`.
    log : callable
        Is told of damaged checkpoints that were passed over.

    Raises
    ------
    RecordError
        If the run has finished, is still going on, or has no checkpoint that is whole
        and can be used.
    ConfigError
        If its settings were others, or its agents' parameters or data.
    """
    held.enter_context(only_writer(path))
    run = read_run(path)
    if run.finished:
        raise RecordError(
            f"a run can be resumed until it has finished, and the one in {path} has, after round "
            f"{run.num_rounds}. Start a new run (without resume)."
        )
    _run_id(run)
    recorded = read_raw(path / CONFIG)
    check_same_run(recorded, config)
    check_same_agents(recorded, agents)
    checkpoint = newest_checkpoint(path / CHECKPOINT, log)
    last = int(checkpoint.facts[ROUND])
    sizes: Mapping[str, int] = checkpoint.facts["files"]
    for file, size in sizes.items():
        _check_size(path / file, size)
    for file, size in sizes.items():
        os.truncate(path / file, size)
    _drop_later_frames(path / FRAMES, last, checkpoint.facts.get(LAST_FRAMES))
    (path / SUMMARY).unlink(missing_ok=True)
    set_damaged_aside(path / CHECKPOINT, after=last)
    record, answered = RunRecord(path, with_frames=with_frames), _last_answered(run)
    noted = {
        "resumed": utc_now(),
        "after_round": last,
        "answered": answered,
        "versions": package_versions(),
    }
    record.amend_config(
        num_rounds=config["num_rounds"], resumptions=[*(recorded.get("resumptions") or []), noted]
    )
    return Reopened(record, checkpoint, answered)


def _drop_later_frames(folder: Path, last: int, by_agent: Sequence[int] | None) -> None:
    """Delete frames of rounds that come again, without a barrier by agent."""
    for frame in folder.glob("*-agent-*.frame"):
        round, _, rest = frame.name.partition("-agent-")
        agent = rest.partition("-")[0].removesuffix(".frame")
        if round.isdecimal() and agent.isdecimal():
            limit = last if by_agent is None else by_agent[int(agent)]
            if int(round) > limit:
                frame.unlink()


def how_to_resume(path: Path) -> str:
    """Line that says how the run of a record that broke off goes on."""
    rounds = checkpoint_rounds(path / CHECKPOINT)
    if not rounds:
        return (
            f"The run in {path} has no checkpoint to go on from (checkpoint-every): start it anew."
        )
    return (
        f"The run in {path} can go on after round {rounds[-1]}: flwr run . --run-config "
        f"'resume=\"{path}\"' with the settings it began with "
        "(without Flower: simulate(..., resume=...))."
    )


def run_id_of(record: RunRecord) -> str:
    """Return the run id that its config holds."""
    return _run_id(read_run(record.path))


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock on a run record: one process at a time writes it.

    Raises
    ------
    RecordError
        If it is no run record, or a run that is still going on writes it.
    """
    if not (path / CONFIG).is_file():
        raise RecordError(
            f"a run record is a folder with {CONFIG}; {path} has none. Check the path."
        )
    busy = (
        f"a record is written by one run at a time, and the run in {path} is still going on, in "
        f"process {{process}}. Wait for its end, or stop it first."
    )
    with file_lock(path / LOCK, wait=0, busy=busy, error=RecordError, remove=True):
        yield


def _run_id(run: Run) -> str:
    if not run.config.get(RUN):
        raise RecordError(
            f"{run.path / CONFIG} must say the id of its run (key {RUN}), and does not. "
            "Put back the whole file, or start the run anew."
        )
    return str(run.config[RUN])


def _last_answered(run: Run) -> int:
    """Agents that took part in the last round in which any did; 0: none."""
    resumptions = run.config.get("resumptions") or []
    last = run.relay[-1]["round"] if run.relay else 0
    if resumptions and resumptions[-1].get("after_round") == last:
        return int(resumptions[-1].get("answered") or 0)  # broken off again before a round was over
    return next((int(line["answered"]) for line in reversed(run.relay) if line.get("answered")), 0)


def _synced_size(path: Path) -> int:
    """Size in bytes of the file once it has reached the disk."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:  # Windows syncs no file that is open for reading only
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _check_size(path: Path, size: int) -> None:
    now = path.stat().st_size if path.exists() else 0
    if now < size:
        raise RecordError(
            f"{path} had {size} bytes when the checkpoint was written and has {now} now: lines "
            "are missing. Put back the whole file, or start the run anew."
        )
    if size and _byte(path, size - 1) != b"\n":
        raise RecordError(
            f"{path} must hold what it held when the checkpoint was written, and then a line ended "
            f"with its byte {size}; now none does. Something has rewritten the file, such as its "
            "line ends. Put back what was there, or start the run anew."
        )


def _byte(path: Path, place: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(place)
        return file.read(1)
