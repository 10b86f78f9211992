"""Prior of the range coder: what all agents know of every mask beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flower_mcepl.agents.parts.masked_config import INDEPENDENT
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.wire import Prior

SCORE_CLASSES, WEIGHT_CLASSES = 16, 2
_cache: dict[tuple[object, ...], Prior] = {}  # agents are built anew for every message


# The coder adapts to how often the weights of a class flip, so classes should differ in
# that. A small score changes its place in the ranking easily, a large one hardly ever;
# and a score moves in proportion to its weight.
def shared_prior(
    model: MaskedModel,
    *,
    seed: int,
    score_init: str,
    names: Sequence[str] | None = None,
) -> Prior:
    """Classes of weights that flip about equally often, by weights and first scores.

    A weight's bit depends on the size of its score, and its score moves in proportion
    to the size of the weight. Both are common knowledge at the start: the weights
    always, the scores where all agents start from the same.

    Parameters
    ----------
    model : MaskedModel
        The model as it begins, before the first training step.
    seed : int
        Seed of the run.
    score_init : str
        How all agents begin; where each draws scores of its own, the weights alone make
        the classes.
    names : sequence of str, optional
        The layers whose masks travel (default: all).
    """
    names = [*model.layers] if names is None else names
    key = (model.fingerprint, *names, seed, score_init)
    if key not in _cache:
        labels = {}
        for name in names:
            scores = model.scores[name]
            weights = model.module.get_parameter(name)
            if score_init != INDEPENDENT:
                labels[name] = _levels(scores, SCORE_CLASSES) * WEIGHT_CLASSES + _levels(
                    weights, WEIGHT_CLASSES
                )
            else:
                labels[name] = _levels(weights, SCORE_CLASSES)
        while len(_cache) > 3:
            _cache.pop(next(iter(_cache)))
        _cache[key] = Prior(labels)
    return _cache[key]


def _levels(tensor: Tensor, count: int) -> Tensor:
    """Levels of the elements' sizes, ``count`` of equal width, uint8."""
    sizes = tensor.detach().cpu().abs()
    largest = sizes.max() if sizes.numel() else torch.zeros(())
    if not largest > 0:
        return torch.zeros(sizes.shape, dtype=torch.uint8)
    return (sizes / largest * count).clamp(max=count - 1).to(torch.uint8)
