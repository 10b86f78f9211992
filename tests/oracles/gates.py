"""Two-level masks and the lasso's proximal step once more, slow and obvious: loops over
NumPy arrays in float64, no torch.
"""

from math import ceil, sqrt
from typing import Any

import numpy as np

from tests.oracles.masks import filter_places

Array = np.ndarray[Any, Any]


def largest(sizes: list[float], keep: int) -> list[bool]:
    """Whether each is among the ``keep`` largest; among equals the earlier ones are."""
    ranking = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    return [place in ranking[:keep] for place in range(len(sizes))]


def gates(a: Array, share: float) -> Array:
    """The top ``ceil(ρ F)`` of ``|a|``, at least one; ρ F to nine digits."""
    keep = max(1, ceil(round(share * len(a), 9)))
    return np.array(largest([abs(float(value)) for value in a], keep))


def two_level_mask(y: Array, q: Array, retention: float, groups: int = 0) -> Array:
    """Keep the share r of the weights in filters that are on; nothing in the others."""
    places = sorted(
        place for f, filter in enumerate(filter_places(y.shape, groups)) if q[f] for place in filter
    )
    chosen = largest(
        [abs(float(y[place])) for place in places],
        len(places) - int((1 - retention) * len(places)),
    )
    mask = np.zeros(y.shape, dtype=bool)
    for place, on in zip(places, chosen, strict=True):
        mask[place] = on
    return mask


def open_mask(y: Array, mask: Array, q: Array, groups: int = 0) -> Array:
    """``u``: the mask, and all in closed filters that is as large as its smallest."""
    least = min(
        (abs(float(y[place])) for place in zip(*np.nonzero(mask), strict=True)), default=9e9
    )
    u = mask.copy()
    for f, filter in enumerate(filter_places(y.shape, groups)):
        for place in filter:
            if not q[f]:
                u[place] = abs(float(y[place])) >= least
    return u


def gated_gradients(
    masked_weight_gradient: Array,
    w: Array,
    y: Array,
    a: Array,
    u: Array,
    q: Array,
    groups: int = 0,
) -> tuple[Array, Array]:
    """The straight-through gradients on y and on a."""
    scale = 1 / sqrt(sum(q) / len(q))
    on_y, on_a = np.zeros(y.shape), np.zeros(a.shape)
    for f, filter in enumerate(filter_places(y.shape, groups)):
        for place in filter:
            G = masked_weight_gradient[place] * w[place] * scale
            on_y[place] = G * q[f] * np.sign(y[place])
            on_a[f] += G * u[place] * np.sign(a[f])
    return on_y, on_a


def proximal(z: Array, step: float, groups: int = 0) -> Array:
    """``z_f * max(0, 1 - ηλ / ‖z_f‖)``, filter by filter."""
    shrunk = np.zeros(z.shape)
    for filter in filter_places(z.shape, groups):
        norm = sqrt(sum(float(z[place]) ** 2 for place in filter))
        for place in filter:
            shrunk[place] = z[place] * max(0.0, 1 - step / norm) if norm else 0.0
    return shrunk


def network_masks(y: list[Array], keep: int) -> list[Array]:
    """Keep the largest ``|y|`` of all layers, over the layer's mean of the nonzero."""
    sizes = []
    for layer in y:
        values = [abs(float(value)) for value in layer.ravel()]
        counted = [value for value in values if value > 0]
        sizes += [value / (sum(counted) / len(counted)) for value in values]
    on = np.array(largest(sizes, keep))
    ends = np.cumsum([layer.size for layer in y])[:-1]
    return [part.reshape(layer.shape) for part, layer in zip(np.split(on, ends), y, strict=True)]
