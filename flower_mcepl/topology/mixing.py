"""The mixing matrices of a graph; ``Topology.mixing`` says what stands in them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flower_mcepl.errors import TopologyError

if TYPE_CHECKING:
    from flower_mcepl.topology.graph import Topology

Matrix = npt.NDArray[np.float64]


def _neighbors_mixing(topology: "Topology", round: int) -> Matrix:
    mixing = np.zeros((topology.num_agents, topology.num_agents))
    for agent in range(topology.num_agents):
        neighbors = topology.in_neighbors(agent, round=round)
        mixing[agent, list(neighbors)] = 1 / max(len(neighbors), 1)
    return mixing


def _metropolis_mixing(topology: "Topology", round: int) -> Matrix:
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


MIXING: dict[str, Callable[["Topology", int], Matrix]] = {
    "neighbors": _neighbors_mixing,
    "metropolis": _metropolis_mixing,
}
