"""Where an agent's state is kept between two messages: on the device's disk, or in Flower's ``Context.state``."""

import contextlib
import sys
from collections.abc import Collection, Iterator
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol, final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from flower_mcepl.errors import ConfigError
from flower_mcepl.messages import keys
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.runs.store import StateStore, device_store, forget_runs

STATE = "mcepl-state"  # the record in Context.state
logger = getLogger("flwr")


class Memory(Protocol):
    """What an agent remembers in one run."""

    def recall(self, *, before: int) -> Generation | None:
        """Return the newest state that the agent had before a round; None if it begins afresh."""

    def remember(self, generation: Generation) -> None:
        """Keep a state for the next message: all of it, or, where anything fails, nothing."""


@final
class ContextMemory:
    """The last state, in Flower's ``Context.state``: it travels with every message and ends with the process.

    It is one array: Flower handles each on its own, and many small ones take longer
    than a large one.
    """

    def __init__(self, context: Context, *, run: str) -> None:
        self._context, self._run = context, run

    def recall(self, *, before: int) -> Generation | None:
        """Return the last state, if it is of this run and of an earlier round."""
        records = self._context.state.array_records
        if STATE not in records:
            return None
        found = Generation.decode(records[STATE]["generation"].data)
        if found.run == self._run and found.round < before:
            return found
        logger.warning(
            f"agent {found.agent} starts afresh: round {before} of run {self._run or '?'} was "
            f"asked for, and its state is that after round {found.round} of run "
            f"{found.run or '?'}."
        )
        return None

    def remember(self, generation: Generation) -> None:
        """Put the state into the context."""
        data = generation.encode()
        # Bytes as they are: NumPy's format, in which Flower carries arrays, would copy
        # them twice more.
        array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
        self._context.state[STATE] = ArrayRecord({"generation": array})


@final
class DiskMemory:
    """The last two states, and those of the relay's checkpoints, on the device's disk: they outlive the SuperNode.

    The context stays empty.

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
        """Return the newest sound state from before the round."""
        return self._store.load(self._agent, run=self._run, before=before)

    def remember(self, generation: Generation) -> None:
        """Write the state; the first one of a run makes room by removing those of the oldest runs."""
        first = not self._store.rounds(self._agent)
        self._store.save(generation, checkpoints=self._checkpoints)
        if first:
            forget_runs(self._root, agent=self._agent, keep=self._keep_runs, log=logger.warning)


@final
class CheckpointedMemory:
    """A simulated agent's state: in the context, and in the run record as well, from which a run is resumed.

    It is written there in the rounds that a checkpoint follows (``store``), and read in
    any.
    """

    def __init__(
        self, context: Context, folder: Path, *, run: str, agent: int, store: bool
    ) -> None:
        self._context, self._run, self._agent, self._stores = (
            ContextMemory(context, run=run),
            run,
            agent,
            store,
        )
        self._store = StateStore(folder, log=logger.warning)

    def recall(self, *, before: int) -> Generation | None:
        """Return the state in the context; in a resumed run, whose contexts are empty, that in the run record."""
        found = self._context.recall(before=before)
        return (
            self._store.load(self._agent, run=self._run, before=before) if found is None else found
        )

    def remember(self, generation: Generation) -> None:
        """Keep the state in both places, or in the context alone."""
        if self._stores:
            with self._store.hold(self._agent, wait=True):
                self._store.save(generation)
        self._context.remember(generation)


@contextlib.contextmanager
def open_memory(
    context: Context, order: ConfigRecord, *, agent: int, settings: DeviceSettings
) -> Iterator[Memory]:
    """Give the memory of an agent for one message; on disk, no other process has it meanwhile.

    Raises
    ------
    ConfigError
        If the message does not say of which run it is.
    StateError
        If another process plays the same agent.
    """
    run = order.get(keys.RUN)
    if not isinstance(run, str):
        raise ConfigError(
            f"an order must say of which run it is ({keys.RUN}); got {run!r}. Use GossipStrategy."
        )
    folder = settings.state_folder()
    if in_simulation() or folder is None:
        if keys.AGENTS_DIR in order and in_simulation():
            record, store = Path(str(order[keys.AGENTS_DIR])), bool(order.get(keys.STORE))
            yield CheckpointedMemory(context, record, run=run, agent=agent, store=store)
        else:
            yield ContextMemory(context, run=run)
    else:
        with device_store(folder, run=run, agent=agent).hold(agent):
            checkpoints: Any = order.get(keys.CHECKPOINTS, [])
            yield DiskMemory(
                folder, run=run, agent=agent, keep_runs=settings.state_runs, checkpoints=checkpoints
            )


def in_simulation() -> bool:
    """Tell whether this process is a worker of Flower's Ray simulation; on devices the state stays on the device."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
