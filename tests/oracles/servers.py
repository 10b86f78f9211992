"""The server-based algorithms once more, slow and obvious: NumPy in float64, gradients
by hand, no torch.

Networks, models and masks are those of `slow_weights`.
"""

from collections.abc import Mapping, Sequence
from math import ceil, cos, pi

import numpy as np

from tests.oracles.weights import (
    WEIGHTS,
    Array,
    Data,
    Weights,
    clipped,
    drop_and_grow,
    gradient,
    sgd,
)


def fedavg(
    w: Weights, data: Sequence[Data], *, steps: int, lr: float, decay: float, momentum: float
) -> tuple[Weights, list[Weights]]:
    """One round: everyone takes its steps from the global model, ``w = Σ (n_k / n)
    w_k``.
    """
    models = [
        sgd(w, part, steps=steps, lr=lr, decay=decay, momentum=momentum, velocity={})
        for part in data
    ]
    sizes = [len(labels) for _, labels in data]
    mean = {
        name: sum(n * x[name] for n, x in zip(sizes, models, strict=True)) / sum(sizes)
        for name in w
    }
    return mean, models


def ditto_personal(
    v: Weights,
    w: Weights,
    data: Data,
    *,
    steps: int,
    lr: float,
    decay: float,
    proximal: float,
) -> Weights:
    """Steps of the personal model, held near the global ``w`` that the round began
    from.
    """
    for _ in range(steps):
        g = gradient(v, data)
        v = {n: v[n] - lr * (g[n] + proximal * (v[n] - w[n]) + decay * v[n]) for n in v}
    return v


def fedspa(
    w: Weights,
    masks: Sequence[dict[str, Array]],
    data: Sequence[Data],
    *,
    round: int,
    steps: int,
    lr: float,
    lr_decay: float,
    decay: float,
    clip: float,
    alpha: float,
    rounds: int,
) -> tuple[Weights, list[dict[str, Array]], list[Weights]]:
    """One round: ``w̃ = m_k ⊙ w``, N masked steps, ``U_k = w̃_0 - w̃_N``, masks move,
    ``w <- w - mean U_k``.
    """
    updates, moved = [], []
    for k, mask in enumerate(masks):
        start = {name: value * mask.get(name, 1) for name, value in w.items()}
        model = start
        for _ in range(steps):
            g = clipped(gradient(model, data[k]), clip)
            lr_now = lr * lr_decay ** (round - 1)
            model = {
                n: model[n] - lr_now * mask.get(n, 1) * (g[n] + decay * model[n]) for n in model
            }
        updates.append({n: start[n] - model[n] for n in model})
        share = alpha / 2 * (1 + cos(pi * (round - 1) / rounds)) if alpha else 0.0
        g = gradient(model, data[k])
        moved.append(
            {
                n: drop_and_grow(model[n], m, g[n], ceil(share * int(m.sum())))
                for n, m in mask.items()
            }
        )
    after = {n: w[n] - sum(u[n] for u in updates) / len(updates) for n in w}
    return after, moved, updates


def sigmoid(s: Array) -> Array:
    return 1 / (1 + np.exp(-s))


def fedpm_steps(
    s: Weights,
    x: Weights,
    data: Data,
    uniforms: Sequence[Weights],
    *,
    lr: float,
    decay: float,
    momentum: float,
) -> Weights:
    """Local steps on the scores; one set of uniform draws a step, ``m = 1`` where a
    draw lies below ``σ(s)``.
    """
    velocity: Weights = {}
    for draws in uniforms:
        theta = {n: sigmoid(s[n]) for n in WEIGHTS}
        drawn = {n: draws[n] < theta[n] for n in WEIGHTS}
        g = gradient({n: x[n] * drawn.get(n, 1) for n in x}, data)
        for n in WEIGHTS:
            on_scores = g[n] * x[n] * theta[n] * (1 - theta[n])
            velocity[n] = momentum * velocity.get(n, 0.0) + on_scores + decay * s[n]
        s = {n: s[n] - lr * velocity[n] for n in WEIGHTS}
    return s


def fedpm_posterior(history: Sequence[Sequence[Mapping[str, Array]]], *, reset: int) -> Weights:
    """θ after rounds of masks, bit by bit: the mode of Beta(α, β), from Beta(1, 1)
    every ``reset`` rounds.
    """
    since = len(history) if not reset else (len(history) - 1) % reset + 1
    theta = {}
    for name in history[0][0]:
        theta[name] = np.zeros(history[0][0][name].shape)
        for place in np.ndindex(theta[name].shape):
            alpha = beta = 1.0
            for masks in history[-since:]:
                for mask in masks:
                    alpha += 0.99 if mask[name][place] else 0.01
                    beta += 0.01 if mask[name][place] else 0.99
            theta[name][place] = (alpha - 1) / (alpha + beta - 2)
    return theta
