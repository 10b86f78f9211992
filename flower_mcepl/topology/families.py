"""Edges of the known families of graphs: functions of size, parameters and seed.

Each returns (sender, receiver) pairs over the agents 0..n-1, to be read as links both
ways; no agent is linked to itself, and an edge may come twice. A wrong argument raises
``TopologyError`` when the function is called.
"""

from collections.abc import Iterable

from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import stream_seed
from flower_mcepl.topology import checks

Edge = tuple[int, int]  # (sender, receiver)
Edges = Iterable[Edge]


def ring(n: int) -> Edges:
    """Edges from every agent to the next, and from the last to the first."""
    n = checks.agents(n)
    return ((i, (i + 1) % n) for i in range(n) if n > 1)


def path(n: int) -> Edges:
    """Edges from every agent to the next."""
    return ((i, i + 1) for i in range(checks.agents(n) - 1))


def torus(rows: int, cols: int) -> Edges:
    """Edges of a grid that wraps around; row r, col c is agent ``r * cols + c``."""
    rows, cols = checks.whole(rows, "rows", least=1), checks.whole(cols, "cols", least=1)
    cells = [(r, c) for r in range(rows) for c in range(cols)]
    down = ((r * cols + c, (r + 1) % rows * cols + c) for r, c in cells if rows > 1)
    right = ((r * cols + c, r * cols + (c + 1) % cols) for r, c in cells if cols > 1)
    return [*down, *right]


def star(n: int) -> Edges:
    """Edges between agent 0 and every other one."""
    return ((0, i) for i in range(1, checks.agents(n)))


def complete(n: int) -> Edges:
    """Edges between all pairs."""
    return ((i, j) for i in range(checks.agents(n)) for j in range(i))


def erdos_renyi(
    n: int, *, probability: float | None = None, mean_degree: float | None = None, seed: int
) -> Edges:
    """Edges of a random graph G(n, p), by p or by the mean number of neighbors."""
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

    return list(nx.gnp_random_graph(n, chance, seed=_nx_seed(seed)).edges())


def small_world(n: int, *, degree: int, rewiring: float, seed: int) -> Edges:
    """Edges to the `degree` nearest on a ring, then rewired (Watts-Strogatz)."""
    n, degree = checks.agents(n), checks.degree(degree, n)
    rewiring = checks.between(rewiring, "rewiring", most=1)
    if degree % 2:  # networkx would silently use degree - 1
        raise TopologyError(
            f"a small world needs an even degree, half to each side; got {degree}. "
            f"Take {degree - 1} or {degree + 1}."
        )
    import networkx as nx

    return list(nx.watts_strogatz_graph(n, degree, rewiring, seed=_nx_seed(seed)).edges())


def random_regular(n: int, *, degree: int, seed: int) -> Edges:
    """Edges of a random graph in which every agent has `degree` neighbors."""
    n, degree = checks.agents(n), checks.degree(degree, n)
    if n * degree % 2:
        raise TopologyError(
            "a regular graph needs num_agents * degree to be even; "
            f"got {n} * {degree} = {n * degree}. Change either by one."
        )
    import networkx as nx

    if degree > n // 2:  # networkx draws until all fit, which hardly ever happens then
        apart = nx.random_regular_graph(n - 1 - degree, n, seed=_nx_seed(seed))
        return [edge for edge in complete(n) if not apart.has_edge(*edge)]
    return list(nx.random_regular_graph(degree, n, seed=_nx_seed(seed)).edges())


def _nx_seed(seed: int) -> int:
    # networkx takes 32 bits
    return stream_seed(seed, "topology") % 2**32
