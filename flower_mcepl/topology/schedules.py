"""Where the neighbors of a round come from: one fixed table, or a fresh draw in every round."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

from flower_mcepl.streams import numpy_stream

Table = tuple[tuple[int, ...], ...]  # one sorted row of neighbors per agent


class Schedule(Protocol):
    """The neighbors of valid agents in valid rounds."""

    time_varying: ClassVar[bool]

    def receives(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, whom `agent` receives from in `round`."""
        ...

    def sends(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, who receives from `agent` in `round`."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same neighbors in every round; undirected graphs hold one table twice."""

    time_varying: ClassVar[bool] = False
    into: Table
    out: Table

    def receives(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, whom `agent` receives from in `round`."""
        return self.into[agent]

    def sends(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, who receives from `agent` in `round`."""
        return self.out[agent]


@dataclass(frozen=True)
class RandomNeighbors:
    """Fresh senders for every agent and round, each drawn from a stream of its own."""

    time_varying: ClassVar[bool] = True
    num_agents: int
    degree: int
    seed: int

    def receives(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, whom `agent` receives from in `round`."""
        if self.degree == 0:
            return ()
        stream = numpy_stream(self.seed, "topology", agent=agent, round=round)
        drawn = stream.choice(self.num_agents - 1, size=self.degree, replace=False)
        # the draw skips the agent
        return tuple(sorted(int(other + (other >= agent)) for other in drawn))

    def sends(self, agent: int, round: int) -> tuple[int, ...]:
        """Return, sorted, who receives from `agent` in `round`."""
        return _drawn_receivers(self, round)[agent]


@lru_cache(maxsize=8)  # who receives from an agent is known only once everyone has drawn
def _drawn_receivers(schedule: RandomNeighbors, round: int) -> Table:
    out: list[list[int]] = [[] for _ in range(schedule.num_agents)]
    for receiver in range(schedule.num_agents):
        for sender in schedule.receives(receiver, round):
            out[sender].append(receiver)
    return tuple(map(tuple, out))
