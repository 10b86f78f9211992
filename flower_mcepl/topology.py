"""Who are agent i's neighbors in round t: the graph over which agents exchange masks.

Agents are numbered 0..N-1. A link (i, j) means that i sends and j receives; an undirected graph has both
directions of every link. No agent links to itself, a link given twice counts once, and a graph need not be
connected: ``Topology.describe`` says whether it is.
"""

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, final

import networkx as nx
import numpy as np
import numpy.typing as npt

from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import numpy_stream, stream_seed

_Table = tuple[tuple[int, ...], ...]  # one sorted row of neighbors per agent
_Matrix = npt.NDArray[np.float64]
_T = TypeVar("_T")


class _Schedule(Protocol):
    """The neighbors of valid agents in valid rounds."""

    time_varying: ClassVar[bool]

    def receives(self, agent: int, round: int) -> tuple[int, ...]: ...
    def sends(self, agent: int, round: int) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class _Fixed:
    """The same neighbors in every round; undirected graphs hold one table twice."""

    time_varying: ClassVar[bool] = False
    into: _Table
    out: _Table

    def receives(self, agent: int, round: int) -> tuple[int, ...]:
        return self.into[agent]

    def sends(self, agent: int, round: int) -> tuple[int, ...]:
        return self.out[agent]


@dataclass(frozen=True)
class _RandomNeighbors:
    """Fresh senders for every agent and round, each drawn from a stream of its own."""

    time_varying: ClassVar[bool] = True
    num_agents: int
    degree: int
    seed: int

    def receives(self, agent: int, round: int) -> tuple[int, ...]:
        if self.degree == 0:
            return ()
        stream = numpy_stream(self.seed, "topology", agent=agent, round=round)
        drawn = stream.choice(self.num_agents - 1, size=self.degree, replace=False)
        return tuple(sorted(int(other) + (other >= agent) for other in drawn))  # the draw skips the agent

    def sends(self, agent: int, round: int) -> tuple[int, ...]:
        return _drawn_receivers(self, round)[agent]


@lru_cache(maxsize=8)  # who receives from an agent is known only once everyone has drawn
def _drawn_receivers(schedule: _RandomNeighbors, round: int) -> _Table:
    out: list[list[int]] = [[] for _ in range(schedule.num_agents)]
    for receiver in range(schedule.num_agents):
        for sender in schedule.receives(receiver, round):
            out[sender].append(receiver)
    return tuple(map(tuple, out))


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
    _schedule: _Schedule = field(repr=False)

    @property
    def time_varying(self) -> bool:
        """Whether neighbors change from round to round."""
        return self._schedule.time_varying

    def in_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those whose masks `agent` receives in `round`; never `agent` itself."""
        return self._schedule.receives(self._agent(agent), _round(round))

    def out_neighbors(self, agent: int, *, round: int = 0) -> tuple[int, ...]:
        """Return, sorted, those who receive the mask of `agent` in `round`; never `agent` itself."""
        return self._schedule.sends(self._agent(agent), _round(round))

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
            ``"neighbors"`` is MCE-PL's: ``W_ij = 1/|N_i|`` over the others only, so rows sum to 1 and the
            diagonal is 0 (the row of an agent that receives nothing is 0). ``"metropolis"`` is
            ``W_ij = 1/(1 + max(d_i, d_j))`` with the rest on the diagonal: doubly stochastic, undirected
            graphs only.
        """
        return _lookup(_MIXING, kind, "mixing kind")(self, round)

    def to_networkx(self, *, round: int = 0) -> Any:
        """Return the graph of one round as ``networkx.DiGraph`` if directed, else ``networkx.Graph``."""
        graph = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.num_agents))
        graph.add_edges_from(self.links(round=round))
        return graph

    def components(self, *, round: int = 0) -> _Table:
        """Return the (strongly, if directed) connected components, each sorted, by their first agent."""
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
            links = (
                f"{_count(sum(out), 'directed link')}, in-degree {_spread(into)}, out-degree {_spread(out)}"
            )
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
        if isinstance(self._schedule, _RandomNeighbors):
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
                f"a topology's config must be what to_config() returned; {config!r:.99} fails with {error!r}."
            ) from None
        return _lookup(_TIME_VARYING, str(name), "time-varying topology")(
            num_agents, degree=degree, seed=seed
        )

    @classmethod
    def parse(cls, spec: str, *, num_agents: int, seed: int = 0) -> "Topology":
        """Build a topology from one line, ``name`` or ``name:key=value,key=value``.

        Known are ``ring``, ``path``, ``star``, ``complete``, ``torus`` (as square as possible) or
        ``torus:rows=4``, ``erdos-renyi:degree=10`` (the mean) or ``erdos-renyi:probability=0.5``,
        ``small-world:degree=4,rewiring=0.1``, ``random-regular:degree=4``, ``random-neighbors:degree=3`` and
        ``file:PATH``.
        """
        name, _, rest = str(spec).partition(":")
        entry = _lookup(_SPECS, name.strip(), "topology")
        return entry.build(num_agents, seed, **entry.options(name.strip(), rest.strip()))

    @classmethod
    def ring(cls, n: int) -> "Topology":
        """Link every agent to the next and the last to the first; a ring of 2 is one link."""
        n = _agents(n)
        return _static("ring", ((i, (i + 1) % n) for i in range(n) if n > 1), num_agents=n)

    @classmethod
    def path(cls, n: int) -> "Topology":
        """Link every agent to the next one."""
        return _static("path", ((i, i + 1) for i in range(_agents(n) - 1)), num_agents=n)

    @classmethod
    def torus(cls, rows: int, cols: int) -> "Topology":
        """Link agent ``r * cols + c`` to the four around it on a grid that wraps around."""
        rows, cols = _whole(rows, "rows", least=1), _whole(cols, "cols", least=1)
        cells = [(r, c) for r in range(rows) for c in range(cols)]
        down = ((r * cols + c, (r + 1) % rows * cols + c) for r, c in cells if rows > 1)
        right = ((r * cols + c, r * cols + (c + 1) % cols) for r, c in cells if cols > 1)
        return _static("torus", [*down, *right], num_agents=rows * cols)

    @classmethod
    def star(cls, n: int) -> "Topology":
        """Link every agent to agent 0."""
        return _static("star", ((0, i) for i in range(1, _agents(n))), num_agents=n)

    @classmethod
    def complete(cls, n: int) -> "Topology":
        """Link every agent to every other one."""
        return _static("complete", ((i, j) for i in range(_agents(n)) for j in range(i)), num_agents=n)

    @classmethod
    def erdos_renyi(
        cls, n: int, *, probability: float | None = None, mean_degree: float | None = None, seed: int
    ) -> "Topology":
        """Link every pair with equal probability; give either it or the expected number of neighbors."""
        n = _agents(n)
        if probability is not None and mean_degree is None:
            chance = _between(probability, "probability", most=1)
        elif mean_degree is not None and probability is None:
            chance = _between(mean_degree, "mean degree", most=n - 1) / max(n - 1, 1)
        else:
            raise TopologyError(
                "an Erdos-Renyi graph takes either a probability or a mean degree, not both or none; "
                f"got probability={probability}, mean degree={mean_degree}. Leave one out."
            )
        return _static(
            "erdos-renyi", nx.gnp_random_graph(n, chance, seed=_nx_seed(seed)).edges(), num_agents=n
        )

    @classmethod
    def small_world(cls, n: int, *, degree: int, rewiring: float, seed: int) -> "Topology":
        """Link to the `degree` nearest on a ring, then rewire links by chance (Watts-Strogatz)."""
        n, degree, rewiring = _agents(n), _degree(degree, n), _between(rewiring, "rewiring", most=1)
        if degree % 2:  # networkx would silently use degree - 1
            raise TopologyError(
                f"a small world needs an even degree, half to each side; got {degree}. "
                f"Take {degree - 1} or {degree + 1}."
            )
        graph = nx.watts_strogatz_graph(n, degree, rewiring, seed=_nx_seed(seed))
        return _static("small-world", graph.edges(), num_agents=n)

    @classmethod
    def random_regular(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """Draw a graph in which every agent has `degree` neighbors."""
        n, degree = _agents(n), _degree(degree, n)
        if n * degree % 2:
            raise TopologyError(
                "a regular graph needs num_agents * degree to be even; "
                f"got {n} * {degree} = {n * degree}. Change either by one."
            )
        graph = nx.random_regular_graph(degree, n, seed=_nx_seed(seed))
        return _static("random-regular", graph.edges(), num_agents=n)

    @classmethod
    def random_neighbors(cls, n: int, *, degree: int, seed: int) -> "Topology":
        """In every round let each agent receive from `degree` others, drawn anew without replacement."""
        n = _agents(n)
        schedule = _RandomNeighbors(n, _degree(degree, n), _whole(seed, "seed", least=None))
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
                f"the nodes of a networkx graph must be 0..{num_agents - 1}; got {list(graph.nodes)!r:.80}. "
                "Rename them with networkx.convert_node_labels_to_integers."
            )
        return _static("networkx", graph.edges(), num_agents=num_agents, directed=graph.is_directed())

    @classmethod
    def from_file(
        cls, path: str | Path, *, num_agents: int | None = None, directed: bool = False
    ) -> "Topology":
        """Read a graph from an adjacency matrix or from an edge list.

        A ``.npy`` file is a matrix. Any other file is text: numbers separated by blanks or commas, ``#``
        starts a comment, blank lines are skipped. If every line holds two numbers, it is an edge list,
        otherwise a matrix. (A text matrix of two agents hence reads as the same graph or is refused.)

        In a matrix, ``A[i, j] = 1`` means that i sends to j; a symmetric matrix gives an undirected graph. A
        line ``i j`` of an edge list links i and j; repeated lines are harmless.

        Parameters
        ----------
        num_agents : int, optional
            N. An edge list without it ends at the highest agent it names; a matrix has to agree with it.
        directed : bool (default: False)
            Read the links as one-way: edge lists as ``sender receiver``, symmetric matrices as directed.
        """
        rows = _read_npy(path) if Path(path).suffix == ".npy" else _read_text(path)
        if isinstance(rows, list) and all(len(row) == 2 for row in rows):
            edges = _edge_list(rows, path)
            size = 1 + max(map(max, edges), default=-1) if num_agents is None else num_agents
            return _static("file", edges, num_agents=size, directed=directed)
        matrix = _adjacency(rows, path)
        if num_agents not in (None, len(matrix)):
            raise TopologyError(
                f"the matrix in {path} has {len(matrix)} agents, but {num_agents} are asked for. "
                "Change num_agents or the file."
            )
        directed = directed or not np.array_equal(matrix, matrix.T)
        return _static("file", np.argwhere(matrix).tolist(), num_agents=len(matrix), directed=directed)

    def _agent(self, agent: int) -> int:
        return _whole(agent, "agent", most=self.num_agents - 1)

    def _union_verdict(self) -> str:
        """Say after which round the links so far connect everyone, within the first N rounds."""
        union = nx.DiGraph()
        union.add_nodes_from(range(self.num_agents))
        for t in range(self.num_agents):
            union.add_edges_from(self.links(round=t))
            if nx.is_strongly_connected(union):
                return f"union of rounds 0 to {t} strongly connected"
        return f"union of rounds 0 to {self.num_agents - 1} NOT strongly connected"


def _static(name: str, edges: Iterable[Any], *, num_agents: int, directed: bool = False) -> Topology:
    n = _agents(num_agents)
    out: list[set[int]] = [set() for _ in range(n)]
    into = [set() for _ in range(n)] if directed else out
    for edge in edges:
        sender, receiver = _checked_edge(edge, n)
        out[sender].add(receiver)
        into[receiver].add(sender)
    sends = tuple(tuple(sorted(row)) for row in out)
    receives = tuple(tuple(sorted(row)) for row in into) if directed else sends
    return Topology(name, n, directed, _Fixed(receives, sends))


def _checked_edge(edge: Any, n: int) -> tuple[int, int]:
    try:
        sender, receiver = map(operator.index, edge)
    except (TypeError, ValueError):
        raise TopologyError(
            f"an edge must be a pair of agents 0..{n - 1}; got {edge!r}. Write it as (sender, receiver)."
        ) from None
    for agent in (sender, receiver):
        if not 0 <= agent < n:
            raise TopologyError(
                f"edge ({sender}, {receiver}) names agent {agent}, but the graph has agents 0..{n - 1}. "
                "Raise num_agents or leave the edge out."
            )
    if sender == receiver:
        raise TopologyError(
            f"edge ({sender}, {receiver}) links agent {sender} to itself; neighbors are others. Leave it out."
        )
    return sender, receiver


def _neighbors_mixing(topology: Topology, round: int) -> _Matrix:
    mixing = np.zeros((topology.num_agents, topology.num_agents))
    for agent in range(topology.num_agents):
        neighbors = topology.in_neighbors(agent, round=round)
        mixing[agent, list(neighbors)] = 1 / max(len(neighbors), 1)
    return mixing


def _metropolis_mixing(topology: Topology, round: int) -> _Matrix:
    if topology.directed:
        raise TopologyError(
            f"Metropolis weights need an undirected graph; {topology.name} is directed. "
            "Use kind='neighbors' or link both ways."
        )
    linked = _neighbors_mixing(topology, round) > 0
    degree = linked.sum(axis=1)
    mixing = np.where(linked, 1 / (1 + np.maximum.outer(degree, degree)), 0.0)
    np.fill_diagonal(mixing, 1 - mixing.sum(axis=1))
    return mixing


_MIXING: dict[str, Callable[[Topology, int], _Matrix]] = {
    "neighbors": _neighbors_mixing,
    "metropolis": _metropolis_mixing,
}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _spread(degrees: list[int]) -> str:
    return f"{min(degrees)} to {max(degrees)} (mean {sum(degrees) / len(degrees):.1f})"


def _verdict(components: int, isolated: list[int], *, directed: bool) -> str:
    connected = "strongly connected" if directed else "connected"
    if components == 1:
        return connected
    named = ", ".join(map(str, isolated[:10])) + (f" and {len(isolated) - 10} more" if isolated[10:] else "")
    return f"NOT {connected}: {components} components" + (f", isolated agents {named}" if isolated else "")


def _read_npy(path: str | Path) -> _Matrix:
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise TopologyError(f"a .npy graph must be a saved matrix of 0 and 1; {path}: {error}.") from error


def _read_text(path: str | Path) -> list[list[float]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(
            f"a graph must be a readable text file or a .npy file; {path}: {error}."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append([float(x) for x in line.partition("#")[0].replace(",", " ").split()])
        except ValueError:
            raise TopologyError(
                f"a graph in text holds only numbers and # comments; line {number} of {path} is {line!r:.80}."
            ) from None
    return [row for row in rows if row]


def _edge_list(rows: list[list[float]], path: str | Path) -> list[tuple[int, ...]]:
    for row in rows:
        if not all(x.is_integer() and x >= 0 for x in row):
            raise TopologyError(f"an edge list holds pairs of agents 0, 1, 2...; {path} has a line {row}.")
    return [tuple(map(int, row)) for row in rows]


def _adjacency(rows: _Matrix | list[list[float]], path: str | Path) -> npt.NDArray[np.bool_]:
    shape = rows.shape if isinstance(rows, np.ndarray) else (len(rows), *sorted({len(row) for row in rows}))
    if len(shape) != 2 or shape[0] != shape[1]:
        raise TopologyError(
            f"an adjacency matrix must be square; {path} has {shape[0] if shape else 0} rows of "
            f"{' or '.join(map(str, shape[1:])) or 'no'} numbers. An edge list has two numbers in every line."
        )
    matrix = np.asarray(rows)
    for i, j in np.argwhere(~np.isin(matrix, (0, 1)))[:1]:
        raise TopologyError(
            f"an adjacency matrix holds only 0 and 1; {path} has {matrix[i, j]:g} in row {i}, column {j} "
            "(from 0). Links have no weights here."
        )
    return matrix.astype(np.bool_)


def _whole(value: Any, what: str, *, least: int | None = 0, most: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TopologyError(f"{what} must be a whole number; got {value!r}.") from None
    if (least is not None and number < least) or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"in {least}..{most}"
        advice = "Change it or the number of agents." if most is not None else "Raise it."
        raise TopologyError(f"{what} must be {limits}; got {number}. {advice}")
    return number


def _agents(n: Any) -> int:
    return _whole(n, "num_agents", least=1)


def _degree(degree: Any, n: int) -> int:
    return _whole(degree, f"degree among {n} agents", most=n - 1)


def _round(round: Any) -> int:
    return _whole(round, "round")


def _between(value: float, what: str, *, most: int) -> float:
    if not 0 <= value <= most:
        raise TopologyError(f"{what} must be in [0, {most}]; got {value}. Choose a value inside.")
    return float(value)


def _nx_seed(seed: int) -> int:
    return stream_seed(_whole(seed, "seed", least=None), "topology") % 2**32  # networkx takes 32 bits


def _lookup(known: Mapping[str, _T], name: str, what: str) -> _T:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise TopologyError(f"unknown {what} {name!r}; known: {', '.join(sorted(known)) or 'none'}.{hint}")


@dataclass(frozen=True)
class _Spec:
    """One name that ``Topology.parse`` knows: how to build it and what stands after the colon."""

    build: Callable[..., Topology]  # (num_agents, seed, **options)
    needs: Mapping[str, type] = field(default_factory=dict)
    takes: Mapping[str, type] = field(default_factory=dict)

    def options(self, name: str, text: str) -> dict[str, Any]:
        pairs = [part.partition("=")[::2] for part in text.split(",")] if text else []
        if text and "path" in self.needs:
            pairs = [("path", text)]  # a path may hold , and =
        options: dict[str, Any] = {}
        for key, value in ((key.strip(), value.strip()) for key, value in pairs):
            kind = _lookup({**self.needs, **self.takes}, key, f"parameter of {name}")
            if key in options:
                raise TopologyError(f"{name} takes {key} once; got {text!r}. Leave one out.")
            options[key] = _convert(kind, value, f"{name}:{key}")
        if missing := [key for key in self.needs if key not in options]:
            example = ",".join(f"{key}=..." for key in self.needs)
            raise TopologyError(
                f"{name} needs {' and '.join(missing)}; got {text!r}. Write '{name}:{example}'."
            )
        return options


def _convert(kind: type, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise TopologyError(f"{what} must be {noun}; got {text!r}. Write it as key=value.") from None


def _torus(n: int, seed: int, rows: int | None = None) -> Topology:
    n = _agents(n)
    if rows is None:
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if rows == 1 < n:
            raise TopologyError(
                f"a torus needs agents that fill rows and columns; {n} is prime. "
                "Change the number of agents, or ask for 'torus:rows=1', which is a ring."
            )
    if n % _whole(rows, "torus:rows", least=1, most=n):
        raise TopologyError(
            f"the rows of a torus must divide the number of agents; got rows={rows} for {n} agents. "
            "Change rows, or leave it out for the most square torus."
        )
    return Topology.torus(rows, n // rows)


def _erdos_renyi(
    n: int, seed: int, degree: float | None = None, probability: float | None = None
) -> Topology:
    return Topology.erdos_renyi(n, mean_degree=degree, probability=probability, seed=seed)


_SPECS: dict[str, _Spec] = {
    "ring": _Spec(lambda n, seed: Topology.ring(n)),
    "path": _Spec(lambda n, seed: Topology.path(n)),
    "star": _Spec(lambda n, seed: Topology.star(n)),
    "complete": _Spec(lambda n, seed: Topology.complete(n)),
    "torus": _Spec(_torus, takes={"rows": int}),
    "erdos-renyi": _Spec(_erdos_renyi, takes={"degree": float, "probability": float}),
    "small-world": _Spec(
        lambda n, seed, **options: Topology.small_world(n, seed=seed, **options),
        needs={"degree": int, "rewiring": float},
    ),
    "random-regular": _Spec(
        lambda n, seed, degree: Topology.random_regular(n, degree=degree, seed=seed), needs={"degree": int}
    ),
    "random-neighbors": _Spec(
        lambda n, seed, degree: Topology.random_neighbors(n, degree=degree, seed=seed), needs={"degree": int}
    ),
    "file": _Spec(lambda n, seed, path: Topology.from_file(path, num_agents=n), needs={"path": Path}),
}
_TIME_VARYING: dict[str, Callable[..., Topology]] = {"random-neighbors": Topology.random_neighbors}
