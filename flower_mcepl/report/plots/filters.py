"""Numbers behind the densities: the share of its weights that each filter keeps.

A filter is a row of a weight: of a convolution what makes one output channel, of a
linear layer one neuron. States do not tell transposed convolutions, which store input
channels first: of these a row is an input channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.report.final_masks import Masks, all_layers


@dataclass(frozen=True)
class LayerDensity:
    """One layer's filters, agent by agent."""

    name: str
    agents: tuple[int, ...]  # those that hold the layer
    shares: NDArray[np.float64]  # [agents, filters], each row sorted downwards

    @property
    def num_filters(self) -> int:
        """Number of the layer's filters."""
        return int(self.shares.shape[1])

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of kept weights in the layer, by agent; filters are equally large."""
        return np.asarray(self.shares.mean(axis=1), dtype=np.float64)

    @property
    def off(self) -> NDArray[np.int64]:
        """Number of filters that keep no weight at all, by agent."""
        return np.asarray((self.shares == 0).sum(axis=1), dtype=np.int64)


def filter_densities(masks: Mapping[int, Masks]) -> list[LayerDensity]:
    """Share of kept weights of every filter, layer by layer."""
    layers = []
    for name in all_layers(masks):
        agents = tuple(agent for agent in sorted(masks) if name in masks[agent])
        rows = [masks[agent][name].reshape(len(masks[agent][name]), -1) for agent in agents]
        kept = -np.sort([-row.mean(axis=1) for row in rows], axis=1)
        layers.append(LayerDensity(name, agents, np.asarray(kept, dtype=np.float64)))
    return layers
