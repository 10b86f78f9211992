"""The method once more, slow and obvious: loops and full sorts over NumPy arrays, no
torch.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def topk_mask(y: Array, retention: float) -> Array:
    """Rank all entries, the larger magnitude first and among equals the earlier place;
    keep the head.
    """
    flat = [abs(float(value)) for value in y.ravel()]
    ranking = sorted(range(len(flat)), key=lambda place: (-flat[place], place))
    mask = np.zeros(len(flat), dtype=bool)
    mask[ranking[: len(flat) - int((1 - retention) * len(flat))]] = True
    return mask.reshape(y.shape)


def neighbor_mean(masks: Sequence[Array]) -> Array:
    mean = np.zeros(masks[0].shape)
    for place in np.ndindex(mean.shape):
        mean[place] = sum(bool(mask[place]) for mask in masks) / len(masks)
    return mean


def aggregation(z: Array, n: Array) -> Array:
    scale = sum(abs(float(value)) for value in z.ravel()) / z.size
    y = np.zeros(z.shape)
    for place in np.ndindex(z.shape):
        y[place] = z[place] + scale * np.sign(z[place]) * n[place]
    return y


def neighbor_step(z: Array, g: Array, n: Array, finetune_lr: float) -> Array:
    stepped = np.zeros(z.shape)
    for place in np.ndindex(z.shape):
        stepped[place] = z[place] - finetune_lr * g[place] * n[place]
    return stepped


def filter_places(
    shape: tuple[int, ...], transposed_groups: int = 0
) -> list[list[tuple[int, ...]]]:
    """Places in the weight of all that feeds one output, output by output."""
    if not transposed_groups:  # [out, in / groups, *kernel]
        return [[(out, *rest) for rest in np.ndindex(shape[1:])] for out in range(shape[0])]
    inputs, outputs_per_group, *kernel = shape  # [in, out / groups, *kernel]
    filters = []
    for group in range(transposed_groups):
        for out in range(outputs_per_group):
            members = range(
                group * inputs // transposed_groups, (group + 1) * inputs // transposed_groups
            )
            filters.append([(i, out, *rest) for i in members for rest in np.ndindex(*kernel)])
    return filters


def filter_normalized(g: Array, transposed_groups: int = 0) -> Array:
    """Each filter divided by the mean of its own root mean square and the layer's."""
    scaled = np.zeros(g.shape)
    of_layer = sqrt(sum(float(value) ** 2 for value in g.ravel()) / g.size)
    for places in filter_places(g.shape, transposed_groups):
        own = sqrt(sum(float(g[place]) ** 2 for place in places) / len(places))
        for place in places:
            scaled[place] = g[place] / ((of_layer + own) / 2) if of_layer else 0.0
    return scaled


def group_lasso(z: Array, transposed_groups: int = 0) -> float:
    total = 0.0
    for places in filter_places(z.shape, transposed_groups):
        total += sqrt(sum(float(z[place]) ** 2 for place in places))
    return total


def group_lasso_gradient(z: Array, transposed_groups: int = 0) -> Array:
    gradient = np.zeros(z.shape)
    for places in filter_places(z.shape, transposed_groups):
        norm = sqrt(sum(float(z[place]) ** 2 for place in places))
        for place in places:
            gradient[place] = z[place] / norm if norm else 0.0
    return gradient


def score_gradient(masked_weight_gradient: Array, w: Array, y: Array) -> Array:
    """The straight-through gradient g = dCE/d(w * m) * w * sign(y)."""
    return masked_weight_gradient * w * np.sign(y)


def linear_cross_entropy_gradient(x: Array, labels: Array, weight: Array, bias: Array) -> Array:
    """The gradient of the mean cross-entropy of ``softmax(x @ weight.T + bias)`` on
    ``weight``.
    """
    gradient = np.zeros(weight.shape)
    for row, label in zip(x, labels, strict=True):
        logits = weight @ row + bias
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        chances[label] -= 1
        gradient += np.outer(chances, row) / len(x)
    return gradient


def two_of_four(y: Array) -> Array:
    """Of every four inputs the two of larger magnitude, the earlier of equals."""
    mask = np.zeros(y.shape, dtype=bool)
    for place in np.ndindex(y.shape):
        start = place[-1] // 4 * 4
        others = [abs(float(y[(*place[:-1], start + k)])) for k in range(4)]
        own = others[place[-1] - start]
        before = sum(x > own or (x == own and start + k < place[-1]) for k, x in enumerate(others))
        mask[place] = before < 2
    return mask
