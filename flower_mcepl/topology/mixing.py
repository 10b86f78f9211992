"""Mixing matrices of the links of a round; see ``Topology.mixing``."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flower_mcepl.errors import TopologyError
from flower_mcepl.topology.schedules import FixedLinks

Matrix = npt.NDArray[np.float64]  # [N, N]


def _neighbors_mixing(links: FixedLinks) -> Matrix:
    mixing = np.zeros((len(links.into), len(links.into)))
    for agent, neighbors in enumerate(links.into):
        mixing[agent, list(neighbors)] = 1 / max(len(neighbors), 1)
    return mixing


def _metropolis_mixing(links: FixedLinks) -> Matrix:
    if links.directed:
        raise TopologyError(
            "Metropolis weights need an undirected graph; this one is directed. "
            "Use kind='neighbors' or link both ways."
        )
    linked = _neighbors_mixing(links) > 0
    degree = linked.sum(axis=1)
    mixing = np.where(linked, 1 / (1 + np.maximum.outer(degree, degree)), 0.0)
    np.fill_diagonal(mixing, 1 - mixing.sum(axis=1))
    return mixing


MIXING: dict[str, Callable[[FixedLinks], Matrix]] = {
    "neighbors": _neighbors_mixing,
    "metropolis": _metropolis_mixing,
}
