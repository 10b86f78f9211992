"""Who are agent i's neighbors in round t: the graph over which agents exchange masks.

Agents are numbered 0..N-1. A link (i, j) means that i sends and j receives; an
undirected graph has both directions of every link. No agent links to itself, a link
given twice counts once, and a graph need not be connected: ``Topology.describe`` says
whether it is.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

from flower_mcepl.config.specs import parse_spec
from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import stream_seed
from flower_mcepl.topology import checks
from flower_mcepl.topology.files import read_graph
from flower_mcepl.topology.mixing import MIXING
from flower_mcepl.topology.schedules import Fixed, RandomNeighbors, Schedule, Table


@final
@dataclass(frozen=True)
class Topology:
    """The communication graph; immutable, picklable, comparable. Build it with one of the class methods.

    Attributes
    ----------
    name : str
        The kind of graph, e.g. ``"ring"``.
    num_agents : int
        N; agents are 0..N-1.
    directed : bool
        Whether i may send to j without j sending to i.
    """

    name: str
    num_agents: int
    directed: bool
    _schedule: Schedule = field(repr=False)

    @property
    def time_varying(self) -> bool:
        """Whether neighbors change from round to round."""
        return self._schedule.time_varying

    def in_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those whose masks `agent` receives in `round`; never `agent` itself."""
        return self._schedule.receives(self._agent(agent), checks.round(round))

    def out_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those who receive the mask of `agent` in `round`; never `agent` itself."""
        return self._schedule.sends(self._agent(agent), checks.round(round))

    def links(self, *, round: int = 0) -> tuple[tuple[int, int], ...]:
        """Return the directed links (sender, receiver), sorted."""
        agents = range(self.num_agents)
        return tuple((i, j) for i in agents for j in self.out_neighbors(i, round=round))

    def mixing(
        self, *, kind: Literal["neighbors", "metropolis"] = "neighbors", round: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the [N, N] mixing matrix W, in which row i weighs what agent i averages.

        Parameters
        ----------
        kind : str (default: "neighbors")
            ``"neighbors"`` is MCE-PL's: ``W_ij = 1/|N_i|`` over the others only, so
            rows sum to 1 and the diagonal is 0 (the row of an agent that receives
            nothing is 0). ``"metropolis"`` is ``W_ij = 1/(1 + max(d_i, d_j))`` with the
            rest on the diagonal: doubly stochastic, undirected graphs only.
        """
        return checks.lookup(MIXING, kind, "mixing kind")(self, round)

    def to_networkx(self, *, round: int = 0) -> Any:
        """Return the graph of one round as ``networkx.DiGraph`` if directed, else ``networkx.Graph``."""
        # here: a device knows its neighbors from the relay, and never loads it
        import networkx as nx

        graph = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.num_agents))
        graph.add_edges_from(self.links(round=round))
        return graph

    def components(self, *, round: int = 0) -> Table:
        """Return the (strongly, if directed) connected components, each sorted, by their first agent."""
        import networkx as nx

        split = nx.strongly_connected_components if self.directed else nx.connected_components
        return tuple(sorted(tuple(sorted(part)) for part in split(self.to_networkx(round=round))))

    def is_connected(self, *, round: int = 0) -> bool:
        """Say whether every agent reaches every other one within the links of one round."""
        return len(self.components(round=round)) == 1

    def describe(self, round: int = 0) -> str:
        """Return one line about the graph of `round` for a person to read."""
        agents = range(self.num_agents)
        into = [len(self.in_neighbors(i, round=round)) for i in agents]
        out = [len(self.out_neighbors(i, round=round)) for i in agents]
        if self.directed:
            links = f"{_count(sum(out), 'directed link')}, in-degree {_spread(into)}, out-degree {_spread(out)}"
        else:
            links = f"{_count(sum(out) // 2, 'link')} (directed count {sum(out)}), degree {_spread(out)}"
        isolated = [i for i in agents if not into[i] and not out[i]]
        verdict = _verdict(len(self.components(round=round)), isolated, directed=self.directed)
        who = f"{self.name}: {_count(self.num_agents, 'agent')}"
        if not self.time_varying:
            return f"{who}, {links}, {verdict}"
        return f"{who}, round {round}: {links}, {verdict}; {self._union_verdict()}"

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description from which ``from_config`` rebuilds exactly this topology."""
        head = {"name": self.name, "num_agents": self.num_agents}
        if isinstance(self._schedule, RandomNeighbors):
            return {**head, "degree": self._schedule.degree, "seed": self._schedule.seed}
        edges = [[i, j] for i, j in self.links() if self.directed or i < j]
        return {**head, "directed": self.directed, "edges": edges}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Topology":
        """Rebuild what ``to_config`` described."""
        try:
            name, num_agents = config["name"], config["num_agents"]
            if "edges" in config:
                directed = bool(config["directed"])
                return _static(str(name), config["edges"], num_agents=num_agents, directed=directed)
            degree, seed = config["degree"], config["seed"]
        except (KeyError, TypeError) as error:
            raise TopologyError(
                f"a topology's config must be what to_config() returned; {config!r:.99} fails "
                f"with {error!r}."
            ) from None
        return checks.lookup(_TIME_VARYING, str(name), "time-varying topology")(
            num_agents, degree=degree, seed=seed
        )

    @classmethod
    def parse(cls, spec: str, *, num_agents: int, seed: int = 0) -> "Topology":
        """Build a topology from one line, ``name`` or ``name:key=value,key=value``.

        Known are ``ring``, ``path``, ``star``, ``complete``, ``torus`` (as square as
        possible) or ``torus:rows=4``, ``erdos-renyi:degree=10`` (the mean) or
        ``erdos-renyi:probability=0.5``, ``small-world:degree=4,rewiring=0.1``,
        ``random-regular:degree=4``, ``random-neighbors:degree=3`` and ``file:PATH``.
        """
        from flower_mcepl.topology.specs import SPECS  # here: the specs are built from this class

        _, entry, options = parse_spec(spec, SPECS, noun="topology", error=TopologyError)
        return entry.build(num_agents, seed, **options)

    @classmethod
    def ring(cls, n: int) -> "Topology":
        """Link every agent to the next and the last to the first; a ring of 2 is one link."""
        n = checks.agents(n)
        return _static("ring", ((i, (i + 1) % n) for i in range(n) if n > 1), num_agents=n)

    @classmethod
    def path(cls, n: int) -> "Topology":
        """Link every agent to the next one."""
        return _static("path", ((i, i + 1) for i in range(checks.agents(n) - 1)), num_agents=n)

    @classmethod
    def torus(cls, rows: int, cols: int) -> "Topology":
        """Link agent ``r * cols + c`` to the four around it on a grid that wraps around."""
        rows, cols = checks.whole(rows, "rows", least=1), checks.whole(cols, "cols", least=1)
        cells = [(r, c) for r in range(rows) for c in range(cols)]
        down = ((r * cols + c, (r + 1) % rows * cols + c) for r, c in cells if rows > 1)
        right = ((r * cols + c, r * cols + (c + 1) % cols) for r, c in cells if cols > 1)
        return _static("torus", [*down, *right], num_agents=rows * cols)

    @classmethod
    def star(cls, n: int) -> "Topology":
        """Link every agent to agent 0."""
        return _static("star", ((0, i) for i in range(1, checks.agents(n))), num_agents=n)

    @classmethod
    def complete(cls, n: int) -> "Topology":
        """Link every agent to every other one."""
        return _static(
            "complete", ((i, j) for i in range(checks.agents(n)) for j in range(i)), num_agents=n
        )

    @classmethod
    def erdos_renyi(
        cls,
        n: int,
        *,
        probability: float | None = None,
        mean_degree: float | None = None,
        seed: int,
    ) -> "Topology":
        """Link every pair with equal probability; give either it or the expected number of neighbors."""
        n = checks.agents(n)
        if probability is not None and mean_degree is None:
            chance = checks.between(probability, "probability", most=1)
        elif mean_degree is not None and probability is None:
            chance = checks.between(mean_degree, "mean degree", most=n - 1) / max(n - 1, 1)
        else:
            raise TopologyError(
                "an Erdos-Renyi graph takes either a probability or a mean degree, not both or "
                f"none; got probability={probability}, mean degree={mean_degree}. Leave one out."
            )
        import networkx as nx

        return _static(
            "erdos-renyi", nx.gnp_random_graph(n, chance, seed=_nx_seed(seed)).edges(), num_agents=n
        )

    @classmethod
    def small_world(cls, n: int, *, degree: int, rewiring: float, seed: int) -> "Topology":
        """Link to the `degree` nearest on a ring, then rewire links by chance (Watts-Strogatz)."""
        n, degree, rewiring = (
            checks.agents(n),
            checks.degree(degree, n),
            checks.between(rewiring, "rewiring", most=1),
        )
        if degree % 2:  # networkx would silently use degree - 1
            raise TopologyError(
                f"a small world needs an even degree, half to each side; got {degree}. "
                f"Take {degree - 1} or {degree + 1}."
            )
        import networkx as nx

        graph = nx.watts_strogatz_graph(n, degree, rewiring, seed=_nx_seed(seed))
        return _static("small-world", graph.edges(), num_agents=n)

    @classmethod
    def random_regular(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """Draw a graph in which every agent has `degree` neighbors."""
        n, degree = checks.agents(n), checks.degree(degree, n)
        if n * degree % 2:
            raise TopologyError(
                "a regular graph needs num_agents * degree to be even; "
                f"got {n} * {degree} = {n * degree}. Change either by one."
            )
        import networkx as nx

        graph = nx.random_regular_graph(degree, n, seed=_nx_seed(seed))
        return _static("random-regular", graph.edges(), num_agents=n)

    @classmethod
    def random_neighbors(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """In every round let each agent receive from `degree` others, drawn anew without replacement."""
        n = checks.agents(n)
        schedule = RandomNeighbors(
            n, checks.degree(degree, n), checks.whole(seed, "seed", least=None)
        )
        return cls("random-neighbors", n, True, schedule)

    @classmethod
    def from_edges(
        cls, edges: Iterable[tuple[int, int]], *, num_agents: int, directed: bool = False
    ) -> "Topology":
        """Build a graph from (sender, receiver) pairs; links given twice, or both ways, are harmless."""
        return _static("edges", edges, num_agents=num_agents, directed=directed)

    @classmethod
    def from_networkx(cls, graph: Any) -> "Topology":
        """Take over the edges of a networkx graph whose nodes are 0..N-1; weights are left behind."""
        num_agents = graph.number_of_nodes()
        if set(graph.nodes) != set(range(num_agents)):
            raise TopologyError(
                f"the nodes of a networkx graph must be 0..{num_agents - 1}; got "
                f"{list(graph.nodes)!r:.80}. Rename them with "
                "networkx.convert_node_labels_to_integers."
            )
        return _static(
            "networkx", graph.edges(), num_agents=num_agents, directed=graph.is_directed()
        )

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
            N. An edge list without it ends at the highest agent it names; a matrix has
            to agree with it.
        directed : bool (default: False)
            Read the links as one-way: edge lists as ``sender receiver``, symmetric
            matrices as directed.
        """
        edges, size, directed = read_graph(path, num_agents=num_agents, directed=directed)
        return _static("file", edges, num_agents=size, directed=directed)

    def _agent(self, agent: int) -> int:
        return checks.whole(agent, "agent", most=self.num_agents - 1)

    def _union_verdict(self) -> str:
        """Say after which round the links so far connect everyone, within the first N rounds."""
        import networkx as nx

        union = nx.DiGraph()
        union.add_nodes_from(range(self.num_agents))
        for t in range(self.num_agents):
            union.add_edges_from(self.links(round=t))
            if nx.is_strongly_connected(union):
                return f"union of rounds 0 to {t} strongly connected"
        return f"union of rounds 0 to {self.num_agents - 1} NOT strongly connected"


def _static(
    name: str, edges: Iterable[Any], *, num_agents: int, directed: bool = False
) -> Topology:
    n = checks.agents(num_agents)
    out: list[set[int]] = [set() for _ in range(n)]
    into = [set() for _ in range(n)] if directed else out
    for edge in edges:
        sender, receiver = _checked_edge(edge, n)
        out[sender].add(receiver)
        into[receiver].add(sender)
    sends = tuple(tuple(sorted(row)) for row in out)
    receives = tuple(tuple(sorted(row)) for row in into) if directed else sends
    return Topology(name, n, directed, Fixed(receives, sends))


def _checked_edge(edge: Any, n: int) -> tuple[int, int]:
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _spread(degrees: list[int]) -> str:
    return f"{min(degrees)} to {max(degrees)} (mean {sum(degrees) / len(degrees):.1f})"


def _verdict(components: int, isolated: list[int], *, directed: bool) -> str:
    connected = "strongly connected" if directed else "connected"
    if components == 1:
        return connected
    named = ", ".join(map(str, isolated[:10])) + (
        f" and {len(isolated) - 10} more" if isolated[10:] else ""
    )
    return f"NOT {connected}: {components} components" + (
        f", isolated agents {named}" if isolated else ""
    )


def _nx_seed(seed: int) -> int:
    # networkx takes 32 bits
    return stream_seed(checks.whole(seed, "seed", least=None), "topology") % 2**32


_TIME_VARYING: dict[str, Callable[..., Topology]] = {"random-neighbors": Topology.random_neighbors}
