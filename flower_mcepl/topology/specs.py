"""The names that ``Topology.parse`` knows, and what may stand after their colon."""

import math

from flower_mcepl.config.specs import NUMBER, PATH, WHOLE, Spec
from flower_mcepl.errors import TopologyError
from flower_mcepl.topology import checks
from flower_mcepl.topology.graph import Topology


def _torus(n: int, seed: int, rows: int | None = None) -> Topology:
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
    return Topology.torus(rows, n // rows)


def _erdos_renyi(
    n: int, seed: int, degree: float | None = None, probability: float | None = None
) -> Topology:
    return Topology.erdos_renyi(n, mean_degree=degree, probability=probability, seed=seed)


SPECS: dict[str, Spec[Topology]] = {  # built from the number of agents, the seed and the options
    "ring": Spec(lambda n, seed: Topology.ring(n)),
    "path": Spec(lambda n, seed: Topology.path(n)),
    "star": Spec(lambda n, seed: Topology.star(n)),
    "complete": Spec(lambda n, seed: Topology.complete(n)),
    "torus": Spec(_torus, takes={"rows": WHOLE}),
    "erdos-renyi": Spec(_erdos_renyi, takes={"degree": NUMBER, "probability": NUMBER}),
    "small-world": Spec(
        lambda n, seed, **options: Topology.small_world(n, seed=seed, **options),
        needs={"degree": WHOLE, "rewiring": NUMBER},
    ),
    "random-regular": Spec(
        lambda n, seed, degree: Topology.random_regular(n, degree=degree, seed=seed),
        needs={"degree": WHOLE},
    ),
    "random-neighbors": Spec(
        lambda n, seed, degree: Topology.random_neighbors(n, degree=degree, seed=seed),
        needs={"degree": WHOLE},
    ),
    "directed-file": Spec(
        lambda n, seed, path: Topology.from_file(path, num_agents=n, directed=True),
        needs={"path": PATH},
    ),
    "file": Spec(
        lambda n, seed, path: Topology.from_file(path, num_agents=n), needs={"path": PATH}
    ),
}
