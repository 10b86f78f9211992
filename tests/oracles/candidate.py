"""The recipe of the preset ``best.toml`` once more, slow and obvious: NumPy in float64,
no torch.

Each agent trains the masks of a convolution of 3 x 3 without padding, a ReLU and a
linear layer; the masks of the convolution are exchanged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracles.masks import filter_normalized, topk_mask

Array = np.ndarray[Any, Any]
Batch = tuple[Array, Array]
CONV, HEAD = "conv.weight", "fc.weight"
STEPS = {CONV: 0.0005, HEAD: 0.0001}
STRENGTH, MOMENTUM, AVERAGING, RETENTION, WARMUP = 3.0, 0.9, 0.9, 0.5, 10


class Candidate:
    """One agent: ``s`` magnitudes, ``v`` velocities, ``n`` mean of neighbors' masks.

    Its steps are ``factor`` times those of the preset.
    """

    def __init__(
        self,
        weights: dict[str, Array],
        biases: tuple[Array, Array],
        s: dict[str, Array],
        *,
        factor: float,
    ) -> None:
        self.w, self.biases, self.factor = weights, biases, factor
        self.s = {name: array.astype(float) for name, array in s.items()}
        self.v = {name: np.zeros(array.shape) for name, array in s.items()}
        self.average: dict[str, Array] = {}
        self.n: Array | None = None

    def masks(self, s: dict[str, Array]) -> dict[str, Array]:
        y = dict(s)
        if self.n is not None:
            y[CONV] = s[CONV] + STRENGTH * s[CONV].mean() * self.n
        return {name: topk_mask(array, RETENTION) for name, array in y.items()}

    def step(self, batch: Batch, *, round: int) -> None:
        factor = self.factor * min(round / WARMUP, 1)
        masked = {name: self.w[name] * mask for name, mask in self.masks(self.s).items()}
        for name, gradient in gradients(masked, self.biases, batch).items():
            g = gradient * self.w[name]
            self.v[name] = MOMENTUM * self.v[name] + filter_normalized(g)
            self.s[name] = np.abs(self.s[name] - factor * STEPS[name] * self.v[name])

    def sent(self) -> Array:
        return self.masks(self.s)[CONV]

    def hear(self, masks: Sequence[Array]) -> None:
        self.n = np.mean(np.stack(masks).astype(float), axis=0)
        for name, s in self.s.items():
            old = self.average.get(name, s)
            self.average[name] = AVERAGING * old + (1 - AVERAGING) * s

    def personal(self) -> dict[str, Array]:
        return self.masks(self.average)


def gradients(w: dict[str, Array], biases: tuple[Array, Array], batch: Batch) -> dict[str, Array]:
    """The gradient of the mean cross-entropy on both weights, example by example."""
    total = {name: np.zeros(array.shape) for name, array in w.items()}
    images, labels = batch
    for image, label in zip(images, labels, strict=True):
        patches = np.stack(
            [
                image[:, row : row + 3, column : column + 3].ravel()
                for row in range(image.shape[1] - 2)
                for column in range(image.shape[2] - 2)
            ]
        )
        kernels = w[CONV].reshape(len(w[CONV]), -1)
        before = kernels @ patches.T + biases[0][:, None]  # [filters, places]
        hidden = np.maximum(before, 0).ravel()
        logits = w[HEAD] @ hidden + biases[1]
        error = np.exp(logits - logits.max())
        error /= error.sum()
        error[label] -= 1
        total[HEAD] += np.outer(error, hidden) / len(labels)
        back = (w[HEAD].T @ error).reshape(before.shape) * (before > 0)
        total[CONV] += (back @ patches).reshape(w[CONV].shape) / len(labels)
    return total
