"""Schedules of links: one fixed table, or a fresh draw in every round."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, final

from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import check_seed, numpy_stream
from flower_mcepl.topology import checks
from flower_mcepl.topology.families import Edge, Edges

Table = tuple[tuple[int, ...], ...]  # one sorted row of neighbors per agent


class Schedule(Protocol):
    """The links of every round; a package of somebody else adds a class of its own.

    The links depend on the schedule's fields and on the round alone: every process asks
    again, in any order of rounds, and must get the same. Draw from a named stream, as
    ``numpy_stream(seed, "carousel", round=round)`` of `flower_mcepl.streams`. It must
    be hashable; a frozen dataclass is, and makes topologies comparable.
    """

    @property
    def directed(self) -> bool:
        """Whether an edge goes one way, from sender to receiver; False: both ways."""
        ...

    def edges(self, round: int) -> Iterable[tuple[int, int]]:
        """Edges (sender, receiver) of `round`, in any order; an edge may come twice.

        Both are agents 0..N-1, never the same one. Rounds of a run are 1, 2, ...;
        round 0 is asked for by those who draw or describe the graph.
        """
        ...

    def __hash__(self) -> int: ...

    def to_config(self) -> Mapping[str, Any]:
        """JSON-able keyword arguments with which its spec builds it again.

        These are the spec's options, and ``seed`` unless ``build`` has a default for
        it. They go into the run record beside ``name`` and ``num_agents``.
        """
        ...


@final
@dataclass(frozen=True)
class FixedLinks:
    """The schedule of a graph that never changes; build it with `from_edges`.

    Attributes
    ----------
    into, out : tuple of tuple of int, N rows
        Row i: whom agent i receives from, and who receives from it; sorted.
    directed : bool
        Whether an agent may send to another one that does not send to it.
    """

    into: Table
    out: Table  # the same object as `into` where links go both ways
    directed: bool

    @classmethod
    def from_edges(
        cls, edges: Iterable[Edge], *, num_agents: int, directed: bool = False
    ) -> "FixedLinks":
        """Tables of (sender, receiver) pairs; a link given twice counts once.

        Raises
        ------
        TopologyError
            If an edge is no pair of two different agents 0..num_agents-1.
        """
        n = checks.agents(num_agents)
        out: list[set[int]] = [set() for _ in range(n)]
        into = [set() for _ in range(n)] if directed else out
        for edge in edges:
            sender, receiver = _checked_edge(edge, n)
            out[sender].add(receiver)
            into[receiver].add(sender)
        sends = tuple(tuple(sorted(row)) for row in out)
        receives = tuple(tuple(sorted(row)) for row in into) if directed else sends
        return cls(receives, sends, directed)

    def edges(self, round: int = 0) -> Edges:
        """Edges (sender, receiver), sorted; the same in every round."""
        return ((i, j) for i, row in enumerate(self.out) for j in row)

    def to_config(self) -> dict[str, Any]:
        """What `from_edges` takes; of two directions of one link one is listed."""
        edges = [[i, j] for i, j in self.edges() if self.directed or i < j]
        return {"directed": self.directed, "edges": edges}


@final
@dataclass(frozen=True)
class RandomNeighbors:
    """Fresh senders for every agent and round, each drawn from a stream of its own."""

    directed: ClassVar[bool] = True
    num_agents: int
    degree: int
    seed: int

    def edges(self, round: int) -> Edges:
        """Edges (sender, receiver), `degree` of them for every receiver."""
        return ((j, i) for i in range(self.num_agents) for j in self._senders(i, round))

    def to_config(self) -> dict[str, Any]:
        """What the spec of ``random-neighbors`` takes."""
        return {"degree": self.degree, "seed": self.seed}

    def _senders(self, agent: int, round: int) -> list[int]:
        if self.degree == 0:
            return []
        stream = numpy_stream(self.seed, "topology", agent=agent, round=round)
        drawn = stream.choice(self.num_agents - 1, size=self.degree, replace=False)
        # the draw skips the agent
        return [int(other + (other >= agent)) for other in drawn]


def random_neighbors(num_agents: int, *, degree: int, seed: int) -> RandomNeighbors:
    """Schedule of `degree` senders for each agent, drawn anew in every round."""
    n = checks.agents(num_agents)
    return RandomNeighbors(n, checks.degree(degree, n), check_seed(seed))


def links_of(schedule: Schedule, num_agents: int, round: int) -> FixedLinks:
    """The links of one round as tables, every edge checked."""
    if isinstance(schedule, FixedLinks):
        return schedule
    return FixedLinks.from_edges(
        schedule.edges(round), num_agents=num_agents, directed=schedule.directed
    )


def checked_schedule(schedule: Any, num_agents: int, name: str) -> Schedule:
    """The same schedule, if it is one and can be one of so many agents."""
    kind = type(schedule).__name__
    if not (
        callable(getattr(schedule, "edges", None))
        and isinstance(getattr(schedule, "directed", None), bool)
    ):
        raise TopologyError(
            f"the links of a topology are a schedule, with edges(round) and directed; those of "
            f"{name!r} are a {kind}. Return FixedLinks.from_edges(...), or a Schedule."
        )
    if isinstance(schedule, FixedLinks):
        if len(schedule.out) != num_agents:
            raise TopologyError(
                f"the topology {name!r} must have {num_agents} agents; its links are of "
                f"{len(schedule.out)}. Build it with num_agents={num_agents}."
            )
        edges, directed = schedule.edges(), schedule.directed
        if schedule != FixedLinks.from_edges(edges, num_agents=num_agents, directed=directed):
            raise TopologyError(
                f"fixed links must say the same from either end; the tables of {name!r} do not. "
                "Build them with FixedLinks.from_edges."
            )
        return schedule
    try:
        hash(schedule)
    except TypeError as error:
        raise TopologyError(
            f"a schedule must be hashable, as its links are kept from one question to the next; "
            f"the {kind} of {name!r} is not ({error}). Make it a frozen dataclass of numbers, "
            "texts and tuples."
        ) from None
    return cast(Schedule, schedule)


def _checked_edge(edge: Any, n: int) -> Edge:
    try:
        sender, receiver = map(operator.index, edge)
    except (TypeError, ValueError):
        raise TopologyError(
            f"an edge must be a pair of agents 0..{n - 1}; got {edge!r}. Write it as (sender, "
            "receiver)."
        ) from None
    for agent in (sender, receiver):
        if not 0 <= agent < n:
            raise TopologyError(
                f"edge ({sender}, {receiver}) names agent {agent}, but the graph has agents "
                f"0..{n - 1}. Raise num_agents or leave the edge out."
            )
    if sender == receiver:
        raise TopologyError(
            f"edge ({sender}, {receiver}) links agent {sender} to itself; neighbors are others. "
            "Leave it out."
        )
    return sender, receiver
