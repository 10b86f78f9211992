"""Agents that a process has built and keeps, within a number of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import nn

from flower_mcepl.agents import Agent
from flower_mcepl.agents.agent import AgentState

Place = tuple[object, ...]  # run, app and agent


@dataclass(frozen=True)
class _Entry:
    agent: Agent
    size: int


@final
class KeptAgents:
    """Agents of one run in this process; those that were used last come last."""

    def __init__(self) -> None:
        self._entries: dict[Place, _Entry] = {}

    def __iter__(self) -> Iterator[Place]:
        return iter(self._entries)

    def take(self, place: Place) -> Agent | None:
        """Take an agent out, if it is there."""
        entry = self._entries.pop(place, None)
        return None if entry is None else entry.agent

    def keep(self, place: Place, agent: Agent, *, size: int, most: int) -> None:
        """Keep an agent, and of the others of its run what fits into ``most`` bytes.

        The newest one stays, whatever its size.
        """
        self._entries = {p: entry for p, entry in self._entries.items() if p[0] == place[0]}
        self._entries[place] = _Entry(agent, size)
        while len(self._entries) > 1 and self._size() > most:
            del self._entries[next(iter(self._entries))]

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def _size(self) -> int:
        return sum(entry.size for entry in self._entries.values())


def size_of(agent: Agent, state: AgentState) -> int:
    """Size in bytes of an agent's tensors: its state and its network."""
    model = getattr(agent, "model", None)
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return sum(t.nbytes for t in tensors) + sum(array.nbytes for array in state.arrays.values())
