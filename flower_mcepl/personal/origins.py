"""Where frozen weights and first scores come from, as far as a file can say it.

A weight counts as drawn only if all that the mask leaves on are so, bit for bit. So a
wrong guess costs bytes and never a bit of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.masks.formulas import keep_variance
from flower_mcepl.masks.layers import LayerSpec
from flower_mcepl.masks.weight_init import sign_seed
from flower_mcepl.personal.layout import LIVE, SCALED, SIGNS, TERNARY, UNIFORM, Draw, Entry
from flower_mcepl.personal.recipes import Words, scaled
from flower_mcepl.streams import mersenne_seed, mersenne_words, stream_seed

_MOST_PARAMETERS = 2**27  # of a network whose draws are looked for at all
_MOST_WORDS = 2**24  # in which draws are looked for: 64 MB
_ANCHORS = 4  # largest weights of a layer, by which its place among the words shows
_ULPS = 3  # around the bound that the largest weight suggests
_SAMPLE = 64  # weights that are looked at before all of them


def with_recipe(plain: Entry, flat: Tensor, origin: "Origin | None", *, parameters: int) -> Entry:
    """The entry of a masked layer, whose weights take the fewest bytes.

    Parameters
    ----------
    plain : Entry
        The layer without a recipe.
    flat : Tensor
        Its weights, [numel]; those that are 0 are off.
    origin : Origin or None
        The run that it comes from.
    parameters : int
        Size of the network, in whose several-fold words a layer's are looked for.
    """
    stored = replace(plain, recipe=LIVE)
    sizes = flat[flat != 0].abs()
    if plain.dtype not in ("float32", "float64") or len(sizes) < _ANCHORS:
        return stored
    draws = origin if origin is not None and parameters <= _MOST_PARAMETERS else None
    if not bool(sizes.isfinite().all()):
        return stored
    if bool((sizes == sizes[0]).all()):
        constant = replace(plain, recipe=TERNARY, magnitude=float(sizes[0]))
        return (draws and draws.signs(constant, flat)) or constant
    if plain.dtype != "float32":
        return stored
    return (draws and draws.uniform(plain, flat, parameters=parameters)) or stored


@dataclass(frozen=True)
class Origin:
    """The run that a personal model comes from."""

    seed: int
    agent: int

    def signs(self, plain: Entry, flat: Tensor) -> Entry | None:
        """Recipe of a layer of ``weight-init = "signed-constant"``."""
        live = (flat != 0).numpy()
        draw = Draw(sign_seed(self.seed, plain.name), 0)
        words = mersenne_words(draw.seed, plain.numel)[live]
        if np.array_equal(words & 1 == 1, flat.numpy()[live] > 0):
            return replace(plain, recipe=SIGNS, draw=draw)
        return None

    # The model function draws its layers one after another on one stream, in an order
    # that nobody knows: modules may draw twice, and biases lie between. The ratios of a
    # layer's largest weights do not depend on the bound, and tell its place.
    def uniform(self, plain: Entry, flat: Tensor, *, parameters: int) -> Entry | None:
        """Recipe of a layer that torch's ``uniform_`` drew on the run's seed.

        Where filters are off, the others come times ``1 / sqrt(ρ)``, see `MaskRules`.
        """
        seed = mersenne_seed(stream_seed(self.seed, "weights"))
        words = _words(seed, min(3 * parameters + 1000, _MOST_WORDS))
        weights = flat.numpy()
        on = weights != 0
        factors = _factors(on.reshape(plain.shape))
        for skip in _places(words, weights):
            layer, draw = words[skip : skip + plain.numel], Draw(seed, skip)
            for factor in factors:
                for bound in _bounds(layer, weights, factor):
                    if _gives(layer[on], weights[on], bound, factor):
                        recipe = UNIFORM if factor == 1 else SCALED
                        return replace(
                            plain, recipe=recipe, magnitude=bound, draw=draw, factor=factor
                        )
        return None

    def scores(self, layers: Mapping[str, LayerSpec]) -> Iterator[dict[str, Draw]]:
        """First scores that may have been: common ones, and the agent's own."""
        for owner in (None, self.agent):
            seed = mersenne_seed(stream_seed(self.seed, "scores", agent=owner))
            skips = np.cumsum([0, *(spec.shape.numel() for spec in layers.values())])
            yield {name: Draw(seed, int(skip)) for name, skip in zip(layers, skips, strict=False)}


@lru_cache(maxsize=1)  # all layers of a network ask for the same
def _words(seed: int, count: int) -> Words:
    return mersenne_words(seed, count)


def _unit(words: Words) -> NDArray[np.float32]:
    """Words as torch's uniform numbers in ±1."""
    return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-23) - np.float32(1)


def _places(words: Words, weights: NDArray[np.float32]) -> Iterator[int]:
    """Where among the words a layer may begin."""
    count = len(words) - len(weights) + 1
    if count < 1:
        return
    anchors = np.argsort(-np.abs(weights), kind="stable")[:_ANCHORS]
    units = _unit(words)
    first = units[anchors[0] : anchors[0] + count]
    near = np.abs(first) > 0
    for anchor in anchors[1:]:
        ratio = weights[anchor] / weights[anchors[0]]
        near &= np.abs(units[anchor : anchor + count] - ratio * first) < 1e-5
    yield from map(int, np.flatnonzero(near))


def _factors(on: NDArray[np.bool_]) -> list[float]:
    """Factors that a layer's weights may have: 1, or those of its filters that are on.

    A filter that is on may have lost all of its weights, so there may be more of them.
    """
    if on.ndim < 2:
        return [1.0]
    filters, least = len(on), int(on.reshape(len(on), -1).any(1).sum())
    shares = (live / filters for live in range(least, filters))
    return [1.0, *(float(np.float32(keep_variance(share))) for share in shares)]


def _gives(words: Words, weights: NDArray[np.float32], bound: float, factor: float) -> bool:
    """Whether these words are these weights; a few are looked at first."""
    return all(
        np.array_equal(scaled(words[:end], bound, factor), weights[:end])
        for end in (_SAMPLE, len(words))
    )


def _bounds(layer: Words, weights: NDArray[np.float32], factor: float) -> Iterator[float]:
    """Bounds with which the largest weight would come of its word."""
    largest = int(np.argmax(np.abs(weights)))
    bound = np.float32(weights[largest] / _unit(layer[largest : largest + 1])[0] / factor)
    if bound > 0:
        near = bound.view(np.int32) + np.arange(-_ULPS, _ULPS + 1, dtype=np.int32)
        yield from near.astype(np.int32).view(np.float32).tolist()
