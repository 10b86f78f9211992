"""Who are agent i's neighbors in round t: the graph over which agents exchange masks.

Agents are numbered 0..N-1. A link (i, j) means that i sends and j receives; an
undirected graph has both directions of every link. No agent links to itself, a link
given twice counts once, and a graph need not be connected: ``Topology.describe`` says
whether it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

from flower_mcepl.config.specs import parse_spec
from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import check_seed
from flower_mcepl.topology import checks, families, recording
from flower_mcepl.topology.description import counted, describe_links, describe_union
from flower_mcepl.topology.families import Edge
from flower_mcepl.topology.files import read_graph
from flower_mcepl.topology.mixing import MIXING
from flower_mcepl.topology.schedules import (
    FixedLinks,
    Schedule,
    Table,
    checked_schedule,
    links_of,
    random_neighbors,
)
from flower_mcepl.topology.specs import TOPOLOGIES


@final
@dataclass(frozen=True)
class Topology:
    """The communication graph: immutable, picklable, comparable.

    Build it with one of the class methods.

    Attributes
    ----------
    name : str
        The kind of graph, e.g. ``"ring"``.
    num_agents : int
        N; agents are 0..N-1.
    """

    name: str
    num_agents: int
    _schedule: Schedule = field(repr=False)

    @property
    def directed(self) -> bool:
        """Whether i may send to j without j sending to i."""
        return self._schedule.directed

    @property
    def time_varying(self) -> bool:
        """Whether neighbors may change from round to round."""
        return not isinstance(self._schedule, FixedLinks)

    def in_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those whose masks `agent` receives in `round`."""
        return self._links(round).into[self._agent(agent)]

    def out_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those who receive the mask of `agent` in `round`."""
        return self._links(round).out[self._agent(agent)]

    def links(self, *, round: int = 0) -> tuple[tuple[int, int], ...]:
        """Return the directed links (sender, receiver), sorted."""
        return tuple(self._links(round).edges())

    def mixing(
        self, *, kind: Literal["neighbors", "metropolis"] = "neighbors", round: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the [N, N] mixing matrix; row i weighs what agent i averages.

        Parameters
        ----------
        kind : str (default: "neighbors")
            ``"neighbors"`` is MCE-PL's: ``W_ij = 1/|N_i|`` over the others only, so
            rows sum to 1 and the diagonal is 0 (the row of an agent that receives
            nothing is 0). ``"metropolis"`` is ``W_ij = 1/(1 + max(d_i, d_j))`` with the
            rest on the diagonal: doubly stochastic, undirected graphs only.
        """
        return checks.lookup(MIXING, kind, "mixing kind")(self._links(round))

    def to_networkx(self, *, round: int = 0) -> Any:
        """Return one round's ``networkx.Graph``, a ``DiGraph`` if directed."""
        # here: a device knows its neighbors from the relay, and never loads it
        import networkx as nx

        graph = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.num_agents))
        graph.add_edges_from(self.links(round=round))
        return graph

    def components(self, *, round: int = 0) -> Table:
        """Return the connected components, strongly so if directed, sorted."""
        import networkx as nx

        split = nx.strongly_connected_components if self.directed else nx.connected_components
        return tuple(sorted(tuple(sorted(part)) for part in split(self.to_networkx(round=round))))

    def is_connected(self, *, round: int = 0) -> bool:
        """Say whether every agent reaches every other one in one round's graph."""
        return len(self.components(round=round)) == 1

    def describe(self, round: int = 0) -> str:
        """Return one line about the graph of `round` for a person to read."""
        links = describe_links(self._links(round), len(self.components(round=round)))
        who = f"{self.name}: {counted(self.num_agents, 'agent')}"
        if not self.time_varying:
            return f"{who}, {links}"
        rounds = (self._links(t) for t in range(self.num_agents))
        union = describe_union(rounds, self.num_agents)
        return f"{who}, round {round}: {links}; {union}"

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able record, from which ``from_config`` rebuilds this.

        Raises
        ------
        TopologyError
            If the links change with time, and nothing that is installed under this name
            builds the same links again.
        """
        return recording.to_config(self.name, self.num_agents, self._schedule)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Topology":
        """Rebuild what ``to_config`` recorded.

        Raises
        ------
        TopologyError
            If it is no such record, or needs a package that is not installed here.
        """
        return cls(*recording.from_config(config))

    @classmethod
    def parse(cls, spec: str, *, num_agents: int, seed: int = 0) -> "Topology":
        """Build a topology from one line, ``name`` or ``name:key=value,key=value``.

        Known are ``ring``, ``path``, ``star``, ``complete``, ``torus`` (as square as
        possible) or ``torus:rows=4``, ``erdos-renyi:degree=10`` (the mean) or
        ``erdos-renyi:probability=0.5``, ``small-world:degree=4,rewiring=0.1``,
        ``random-regular:degree=4``, ``random-neighbors:degree=3``, ``file:PATH``,
        ``directed-file:PATH``, and what installed packages add (`TOPOLOGIES`).
        """
        name, entry, options = parse_spec(spec, TOPOLOGIES, noun="topology", error=TopologyError)
        n, seed = checks.agents(num_agents), check_seed(seed)
        return cls.from_schedule(entry.build(n, seed=seed, **options), num_agents=n, name=name)

    @classmethod
    def ring(cls, n: int) -> "Topology":
        """Link every agent to the next and the last to the first."""
        return cls._linked("ring", families.ring(n), n)

    @classmethod
    def path(cls, n: int) -> "Topology":
        """Link every agent to the next one."""
        return cls._linked("path", families.path(n), n)

    @classmethod
    def torus(cls, rows: int, cols: int) -> "Topology":
        """Link agent ``r * cols + c`` to its four on a grid that wraps around."""
        edges = families.torus(rows, cols)  # checks both
        return cls._linked("torus", edges, rows * cols)

    @classmethod
    def star(cls, n: int) -> "Topology":
        """Link every agent to agent 0."""
        return cls._linked("star", families.star(n), n)

    @classmethod
    def complete(cls, n: int) -> "Topology":
        """Link every agent to every other one."""
        return cls._linked("complete", families.complete(n), n)

    @classmethod
    def erdos_renyi(
        cls,
        n: int,
        *,
        probability: float | None = None,
        mean_degree: float | None = None,
        seed: int,
    ) -> "Topology":
        """Link each pair with one probability, given as such or by mean degree."""
        edges = families.erdos_renyi(n, probability=probability, mean_degree=mean_degree, seed=seed)
        return cls._linked("erdos-renyi", edges, n)

    @classmethod
    def small_world(cls, n: int, *, degree: int, rewiring: float, seed: int) -> "Topology":
        """Link to the `degree` nearest on a ring, then rewire by chance."""
        edges = families.small_world(n, degree=degree, rewiring=rewiring, seed=seed)
        return cls._linked("small-world", edges, n)

    @classmethod
    def random_regular(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """Draw a graph in which every agent has `degree` neighbors."""
        edges = families.random_regular(n, degree=degree, seed=seed)
        return cls._linked("random-regular", edges, n)

    @classmethod
    def random_neighbors(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """Let each agent receive from `degree` others, drawn anew in every round."""
        schedule = random_neighbors(n, degree=degree, seed=seed)
        return cls.from_schedule(schedule, num_agents=n, name="random-neighbors")

    @classmethod
    def from_edges(
        cls, edges: Iterable[tuple[int, int]], *, num_agents: int, directed: bool = False
    ) -> "Topology":
        """Build a graph from (sender, receiver) pairs, in any order."""
        return cls._linked("edges", edges, num_agents, directed=directed)

    @classmethod
    def from_schedule(cls, schedule: Schedule, *, num_agents: int, name: str) -> "Topology":
        """Build a graph whose links a schedule gives, round by round.

        Parameters
        ----------
        schedule : Schedule
            Links of every round.
        num_agents : int
            N.
        name : str
            The name under which `TOPOLOGIES` has the schedule's spec. A run record can
            only be made of a time-varying schedule that is known there.

        Raises
        ------
        TopologyError
            If it is no `Schedule`, or not one of N agents.
        """
        n = checks.agents(num_agents)
        return cls(name, n, checked_schedule(schedule, n, name))

    @classmethod
    def from_networkx(cls, graph: Any) -> "Topology":
        """Take over the edges of a networkx graph with the nodes 0..N-1.

        Raises
        ------
        TopologyError
            If the nodes are others, or an edge links an agent to itself or has a
            ``weight`` that is not 1.
        """
        num_agents = graph.number_of_nodes()
        if set(graph.nodes) != set(range(num_agents)):
            raise TopologyError(
                f"the nodes of a networkx graph must be 0..{num_agents - 1}; got "
                f"{list(graph.nodes)!r:.80}. Rename them with "
                "networkx.convert_node_labels_to_integers."
            )
        for sender, receiver, weight in graph.edges(data="weight", default=1):
            if weight != 1:
                raise TopologyError(
                    f"links have no weights here; edge ({sender}, {receiver}) of the networkx "
                    f"graph has {weight!r:.40}. Leave out the edge attribute 'weight'."
                )
        return cls._linked("networkx", graph.edges(), num_agents, directed=graph.is_directed())

    @classmethod
    def from_file(
        cls, path: str | Path, *, num_agents: int | None = None, directed: bool = False
    ) -> "Topology":
        """Read a graph from an adjacency matrix or from an edge list.

        A ``.npy`` file is a matrix. Any other file is text: numbers separated by blanks
        or commas, ``#`` starts a comment, blank lines are skipped. If every line holds
        two numbers, it is an edge list, otherwise a matrix. (A text matrix of two
        agents hence reads as the same graph or is refused.)

        In a matrix, ``A[i, j] = 1`` means that i sends to j; a symmetric matrix gives
        an undirected graph. A line ``i j`` of an edge list links i and j; repeated
        lines are harmless.

        Parameters
        ----------
        num_agents : int, optional
            N. An edge list without it ends at the highest agent it names, and names at
            least half of them; a matrix has to agree with it.
        directed : bool (default: False)
            Read the links as one-way: edge lists as ``sender receiver``, symmetric
            matrices as directed.
        """
        links = read_graph(path, num_agents=num_agents, directed=directed)
        return cls("file", len(links.out), links)

    @classmethod
    def _linked(
        cls, name: str, edges: Iterable[Edge], num_agents: int, *, directed: bool = False
    ) -> "Topology":
        links = FixedLinks.from_edges(edges, num_agents=num_agents, directed=directed)
        return cls(name, len(links.out), links)

    def _links(self, round: int) -> FixedLinks:
        round = checks.round(round)
        if isinstance(self._schedule, FixedLinks):
            return self._schedule
        return _drawn_links(self._schedule, self.num_agents, round)

    def _agent(self, agent: int) -> int:
        return checks.whole(agent, "agent", most=self.num_agents - 1)


# typed: schedules of two classes are different, even where they compare equal
_drawn_links = lru_cache(maxsize=8, typed=True)(links_of)
