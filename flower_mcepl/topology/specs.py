"""The names that ``Topology.parse`` knows, and what may stand after their colon.

A spec builds the schedule of a graph as ``build(num_agents, seed=seed, **options)``. A
package of somebody else adds one by an entry point of the group
``flower_mcepl.topologies``.
"""

import math
from collections.abc import Callable
from typing import Any

from flower_mcepl.config.registry import Registry
from flower_mcepl.config.specs import NUMBER, PATH, WHOLE, Spec
from flower_mcepl.errors import TopologyError
from flower_mcepl.topology import checks, families
from flower_mcepl.topology.families import Edges
from flower_mcepl.topology.files import read_graph
from flower_mcepl.topology.schedules import FixedLinks, Schedule, random_neighbors


def _fixed(edges: Callable[..., Edges]) -> Callable[..., Schedule]:
    """The builder of a graph that never changes, whose links go both ways."""

    def build(num_agents: int, seed: int, **options: Any) -> FixedLinks:
        return FixedLinks.from_edges(edges(num_agents, seed, **options), num_agents=num_agents)

    return build


def _torus(n: int, seed: int, rows: int | None = None) -> Edges:
    n = checks.agents(n)
    if rows is None:
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if rows == 1 < n:
            raise TopologyError(
                f"a torus needs agents that fill rows and columns; {n} is prime. "
                "Change the number of agents, or ask for 'torus:rows=1', which is a ring."
            )
    if n % checks.whole(rows, "torus:rows", least=1, most=n):
        raise TopologyError(
            f"the rows of a torus must divide the number of agents; got rows={rows} for {n} "
            "agents. Change rows, or leave it out for the most square torus."
        )
    return families.torus(rows, n // rows)


def _erdos_renyi(
    n: int, seed: int, degree: float | None = None, probability: float | None = None
) -> Edges:
    return families.erdos_renyi(n, mean_degree=degree, probability=probability, seed=seed)


RING = Spec(_fixed(lambda n, seed: families.ring(n)))
PATH_GRAPH = Spec(_fixed(lambda n, seed: families.path(n)))
STAR = Spec(_fixed(lambda n, seed: families.star(n)))
COMPLETE = Spec(_fixed(lambda n, seed: families.complete(n)))
TORUS = Spec(_fixed(_torus), takes={"rows": WHOLE})
ERDOS_RENYI = Spec(_fixed(_erdos_renyi), takes={"degree": NUMBER, "probability": NUMBER})
SMALL_WORLD = Spec(
    _fixed(lambda n, seed, **options: families.small_world(n, seed=seed, **options)),
    needs={"degree": WHOLE, "rewiring": NUMBER},
)
RANDOM_REGULAR = Spec(
    _fixed(lambda n, seed, degree: families.random_regular(n, degree=degree, seed=seed)),
    needs={"degree": WHOLE},
)
RANDOM_NEIGHBORS: Spec[Schedule] = Spec(random_neighbors, needs={"degree": WHOLE})
FILE: Spec[Schedule] = Spec(
    lambda n, seed, path: read_graph(path, num_agents=n), needs={"path": PATH}
)
DIRECTED_FILE: Spec[Schedule] = Spec(
    lambda n, seed, path: read_graph(path, num_agents=n, directed=True), needs={"path": PATH}
)

TOPOLOGIES: Registry[Spec[Schedule]] = Registry(
    "flower_mcepl.topologies",
    Spec,
    {
        "ring": f"{__name__}:RING",
        "path": f"{__name__}:PATH_GRAPH",
        "star": f"{__name__}:STAR",
        "complete": f"{__name__}:COMPLETE",
        "torus": f"{__name__}:TORUS",
        "erdos-renyi": f"{__name__}:ERDOS_RENYI",
        "small-world": f"{__name__}:SMALL_WORLD",
        "random-regular": f"{__name__}:RANDOM_REGULAR",
        "random-neighbors": f"{__name__}:RANDOM_NEIGHBORS",
        "file": f"{__name__}:FILE",
        "directed-file": f"{__name__}:DIRECTED_FILE",
    },
    noun="topology",
    error=TopologyError,
)
