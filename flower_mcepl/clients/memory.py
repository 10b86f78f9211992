"""Memory of an agent between two messages: the device's disk, or Flower's Context."""

import contextlib
from collections.abc import Collection, Iterator
from logging import getLogger
from pathlib import Path
from typing import Protocol, final

from flwr.app import Array, ArrayRecord, Context

from flower_mcepl.errors import StateError
from flower_mcepl.files.room import refuse_unusable
from flower_mcepl.messages.envelope import raw_array
from flower_mcepl.messages.order import Order
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.runs.store import device_store, forget_runs

STATE = "mcepl-state"  # the record in Context.state
_WHAT = "the device's folder of states (state-dir)"
_WAY_OUT = (
    "Give the SuperNode the right to write there and room on that disk, or another folder: "
    "--node-config 'state-dir=\"/an/absolute/path\"'."
)
logger = getLogger("flwr")


class Memory(Protocol):
    """States of one agent in one run."""

    def recall(self, *, before: int) -> Generation | None:
        """Newest state that the agent had before a round; None if it begins afresh."""

    def remember(self, generation: Generation) -> None:
        """Keep a state for the next message: all of it, or nothing where that fails."""


@final
class ContextMemory:
    """Last state, in Flower's ``Context.state``.

    It travels with every message and ends with the process. It is one array: Flower
    handles each on its own, and many small ones take longer than a large one.

    Parameters
    ----------
    context : Context
        Flower's, of the agent.
    run : str
        Of which run the state must be.
    handed : Array, optional
        State with which a resumed run begins, where the context has none.
    """

    def __init__(self, context: Context, *, run: str, handed: Array | None = None) -> None:
        self._context, self._run, self._handed = context, run, handed

    def recall(self, *, before: int) -> Generation | None:
        """Last state, if it is of this run and of an earlier round."""
        records = self._context.state.array_records
        arrays = (
            [self._handed] if STATE not in records else [*records[STATE].values(), self._handed]
        )
        states = [Generation.decode(array.data) for array in arrays if array is not None]
        for last in states:
            if last.run == self._run and last.round < before:
                return last
        for last in states:
            logger.warning(
                f"agent {last.agent} starts afresh: round {before} of run {self._run} was "
                f"asked for, and its state is that after round {last.round} of run {last.run}."
            )
        return None

    def remember(self, generation: Generation) -> None:
        """Put the state into the context."""
        array = raw_array(generation.encode(), Array)
        self._context.state[STATE] = ArrayRecord({"generation": array})


@final
class DiskMemory:
    """Last two states, and those of the relay's checkpoints, on the device's disk.

    They outlive the SuperNode; the context stays empty.

    Parameters
    ----------
    root : Path
        Below it every run has a folder, and in it every agent.
    keep_runs : int
        Of how many runs the agent's states stay.
    checkpoints : collection of int
        Rounds that the relay could go back to.
    """

    def __init__(
        self, root: Path, *, run: str, agent: int, keep_runs: int, checkpoints: Collection[int]
    ) -> None:
        self._root, self._run, self._agent, self._keep_runs = root, run, agent, keep_runs
        self._checkpoints = checkpoints
        self._store = device_store(root, run=run, agent=agent, log=logger.warning)

    def recall(self, *, before: int) -> Generation | None:
        """Newest sound state from before the round."""
        return self._store.load(self._agent, run=self._run, before=before)

    def remember(self, generation: Generation) -> None:
        """Write the state; the first one of a run replaces those of the oldest runs."""
        first = not self._store.rounds(self._agent)
        with _naming_the_disk(self._root):
            self._store.save(generation, checkpoints=self._checkpoints)
        if first:
            forget_runs(self._root, agent=self._agent, keep=self._keep_runs, log=logger.warning)


@contextlib.contextmanager
def open_memory(
    context: Context, order: Order[Array], *, agent: int, settings: DeviceSettings
) -> Iterator[Memory]:
    """Open the memory of an agent for one message, on disk for this process alone.

    Raises
    ------
    StateError
        If another process plays the same agent, or the device's folder of states cannot
        be written or has no room: before the agent's first round, not after it.
    """
    run = order.run
    folder = settings.state_folder()
    if in_simulation():
        yield ContextMemory(context, run=run, handed=order.state)
    elif folder is None:
        yield ContextMemory(context, run=run)
    else:
        store = device_store(folder, run=run, agent=agent)
        with contextlib.ExitStack() as held:
            with _naming_the_disk(folder):
                if not store.rounds(agent):
                    refuse_unusable(folder, _WHAT, error=StateError, way_out=_WAY_OUT)
                held.enter_context(store.hold(agent))
            yield DiskMemory(
                folder,
                run=run,
                agent=agent,
                keep_runs=settings.state_runs,
                checkpoints=order.checkpoints,
            )


@contextlib.contextmanager
def _naming_the_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{_WHAT} must be a folder that can be written; {folder}: {error}. {_WAY_OUT}"
        ) from error
