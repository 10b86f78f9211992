"""The weight-training algorithms once more, slow and obvious: NumPy in float64,
gradients by hand, no torch.

All agents train a network of two linear layers with a tanh between them, ``w1, b1, w2,
b2``, on all of their data at once. A model is a dict of these four arrays, a mask a
dict of bool arrays of the two weights.
"""

from collections.abc import Mapping, Sequence
from math import ceil, cos, pi, sqrt
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]
Data = tuple[Array, Array]

WEIGHTS, BIASES = ("w1", "w2"), ("b1", "b2")


def gradient(x: Mapping[str, Array], data: Data) -> Weights:
    """The gradient of the mean cross-entropy, back-propagated example by example."""
    total = {name: np.zeros(value.shape) for name, value in x.items()}
    inputs, labels = data
    for row, label in zip(inputs, labels, strict=True):
        hidden = np.tanh(x["w1"] @ row + x["b1"])
        logits = x["w2"] @ hidden + x["b2"]
        error = np.exp(logits - logits.max())
        error /= error.sum()
        error[label] -= 1
        back = (x["w2"].T @ error) * (1 - hidden**2)
        total["w2"] += np.outer(error, hidden) / len(labels)
        total["b2"] += error / len(labels)
        total["w1"] += np.outer(back, row) / len(labels)
        total["b1"] += back / len(labels)
    return total


def clipped(g: Weights, norm: float) -> Weights:
    size = sqrt(sum(float(value) ** 2 for array in g.values() for value in array.ravel()))
    return {name: array * min(1.0, norm / size) for name, array in g.items()} if norm else g


def sgd(
    x: Weights,
    data: Data,
    *,
    steps: int,
    lr: float,
    decay: float,
    momentum: float,
    velocity: Weights,
    clip: float = 0.0,
) -> Weights:
    """Take steps of SGD with weight decay and heavy-ball momentum; ``velocity`` goes on
    in place.
    """
    for _ in range(steps):
        g = clipped(gradient(x, data), clip)
        for name in x:
            velocity[name] = momentum * velocity.get(name, 0.0) + g[name] + decay * x[name]
        x = {name: x[name] - lr * velocity[name] for name in x}
    return x


def metropolis(neighbors: Sequence[Sequence[int]]) -> Array:
    """The Metropolis-Hastings matrix of a graph."""
    w = np.zeros((len(neighbors), len(neighbors)))
    for i, others in enumerate(neighbors):
        for j in others:
            w[i, j] = 1 / (1 + max(len(others), len(neighbors[j])))
        w[i, i] = 1 - w[i].sum()
    return w


def mix(w: Array, models: Sequence[Weights]) -> list[Weights]:
    return [
        {name: sum(w[i, j] * models[j][name] for j in range(len(models))) for name in models[i]}
        for i in range(len(models))
    ]


def dsgd(
    x: list[Weights], data: Sequence[Data], w: Array, *, lr: float, decay: float
) -> list[Weights]:
    """One round as published: ``x_i <- Σ_j W_ij x_j - η ∇F_i(x_i)``."""
    mixed = mix(w, x)
    for i, model in enumerate(x):
        g = gradient(model, data[i])
        for name in model:
            mixed[i][name] = mixed[i][name] - lr * (g[name] + decay * model[name])
    return mixed


def heavy_ball(
    x: Weights, data: Data, *, steps: int, lr: float, decay: float, momentum: float
) -> Weights:
    """Local steps from rest: ``y' = y - η g(y) + θ (y - y_before)``."""
    before, y = x, x
    for _ in range(steps):
        g = gradient(y, data)
        after = {n: y[n] - lr * (g[n] + decay * y[n]) + momentum * (y[n] - before[n]) for n in y}
        before, y = y, after
    return y


def dfedavgm(x: list[Weights], data: Sequence[Data], w: Array, **options: Any) -> list[Weights]:
    """One round as published: local steps with momentum, then the average."""
    return mix(w, [heavy_ball(model, data[i], **options) for i, model in enumerate(x)])


def in_127_steps(change: Array) -> Array:
    """Every value as the nearest of 127 steps up to the largest one, either sign; in
    float32, as on the wire.
    """
    step = np.abs(change).max() / np.float32(127)
    return np.array(
        [
            step * np.float32(round(float(value / step))) if step else step
            for value in change.ravel()
        ],
        np.float32,
    ).reshape(change.shape)


def mix_held(w: Array, own: Sequence[Weights], held: Sequence[Weights]) -> list[Weights]:
    """The average of an agent's own model and what it holds of the others: ``z_i + Σ_j
    W_ij (x^_j - z_i)``.
    """
    others = w - np.diag(np.diag(w))
    return [
        {n: z[n] + sum(others[i, j] * (held[j][n] - z[n]) for j in range(len(own))) for n in z}
        for i, z in enumerate(own)
    ]


def ranked(values: Sequence[float], *, largest: bool) -> list[int]:
    """Places in order of value; among equals the earlier place first."""
    return sorted(
        range(len(values)), key=lambda place: (-values[place] if largest else values[place], place)
    )


def drop_and_grow(weight: Array, mask: Array, g: Array, count: int) -> Array:
    """Let the ``count`` smallest kept weights go, then take as many of largest gradient
    among those not kept.
    """
    flat, size, pull = mask.ravel().copy(), np.abs(weight).ravel(), np.abs(g).ravel()
    kept = [place for place in range(flat.size) if flat[place]]
    for rank in ranked([float(size[place]) for place in kept], largest=False)[:count]:
        flat[kept[rank]] = False
    free = [place for place in range(flat.size) if not flat[place]]
    for rank in ranked([float(pull[place]) for place in free], largest=True)[:count]:
        flat[free[rank]] = True
    return flat.reshape(mask.shape)


def overlap_mean(values: Sequence[Array], masks: Sequence[Array]) -> Array:
    mean = np.zeros(values[0].shape)
    for place in np.ndindex(mean.shape):
        held = [
            float(value[place]) for value, mask in zip(values, masks, strict=True) if mask[place]
        ]
        mean[place] = sum(held) / len(held) if held else 0.0
    return mean


def dispfl(
    x: list[Weights],
    masks: list[dict[str, Array]],
    data: Sequence[Data],
    neighbors: Sequence[Sequence[int]],
    *,
    round: int,
    steps: int,
    lr: float,
    lr_decay: float,
    decay: float,
    clip: float,
    alpha: float,
    rounds: int,
) -> tuple[list[Weights], list[dict[str, Array]]]:
    """One round of Dis-PFL: local steps under the mask, moving the mask, averaging
    where masks overlap.
    """
    trained, moved = [], []
    for i, model in enumerate(x):
        for _ in range(steps):
            g = clipped(gradient(model, data[i]), clip)
            lr_now = lr * lr_decay ** (round - 1)
            model = {n: model[n] - lr_now * (g[n] + decay * model[n]) for n in model}
            model = {n: model[n] * masks[i].get(n, 1) for n in model}
        trained.append(model)
        share = alpha / 2 * (1 + cos(pi * (round - 1) / rounds))
        g = gradient(model, data[i])
        moved.append(
            {
                n: drop_and_grow(model[n], m, g[n], ceil(share * int(m.sum())))
                for n, m in masks[i].items()
            }
        )
    averaged = []
    for i in range(len(x)):
        group = [i, *neighbors[i]]
        model = {
            n: overlap_mean([trained[j][n] for j in group], [masks[j][n] for j in group])
            for n in WEIGHTS
        }
        model = {n: value * moved[i][n] for n, value in model.items()}
        averaged.append(
            {**model, **{n: np.mean([trained[j][n] for j in group], axis=0) for n in BIASES}}
        )
    return averaged, moved


def erk(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Densities in the ratio ``Σ dims / Π dims``, full layers set aside one after the
    other.
    """
    full: list[str] = []
    while len(full) < len(shapes):
        rest = {name: shape for name, shape in shapes.items() if name not in full}
        wanted = density * sum(np.prod(shape) for shape in shapes.values())
        missing = wanted - sum(np.prod(shapes[name]) for name in full)
        scale = missing / sum(sum(shape) for shape in rest.values())
        densities = {
            name: float(scale * sum(shape) / np.prod(shape)) for name, shape in rest.items()
        }
        fullest = max(densities, key=lambda name: densities[name])
        if densities[fullest] <= 1:
            return {**dict.fromkeys(full, 1.0), **densities}
        full.append(fullest)
    return dict.fromkeys(shapes, 1.0)
