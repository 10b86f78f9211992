"""How an agent takes in its neighbors' masks: rules of fusion, each a few formulas.

Symbols as in `formulas`: ``z`` scores, ``m`` mask, ``n`` what was heard from the
neighbors, ``y`` aggregation tensor. Every formula handles one layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from flower_mcepl.config.checks import check
from flower_mcepl.config.registry import Registry
from flower_mcepl.errors import ConfigError, FlowerMceplError
from flower_mcepl.masks import formulas as maths


class Blend(Protocol):
    """What multiplies the weights in place of the mask."""

    def __call__(self, m: Tensor, n: Tensor, *, num_neighbors: int) -> Tensor:
        """Return a float tensor for the own mask ``m`` (float, 0 or 1) and ``n``."""


def neighbor_average(masks: Sequence[Tensor], own: Tensor) -> Tensor:
    """Average the neighbors' masks, ``n = 1/|N| Σ m_j``, without the own one.

    Of masks whose votes have faded, ``n = 1/|N| Σ v_j m_j``.
    """
    if masks[0].is_floating_point():
        return maths.faded_mean(masks, num_neighbors=len(masks))
    count = torch.zeros_like(masks[0], dtype=maths.count_dtype(len(masks)))
    for mask in masks:
        count += mask
    return maths.neighbor_mean(count, num_neighbors=len(masks))


def scores_alone(z: Tensor, n: Tensor) -> Tensor:
    """Rank the agent's own scores, ``y = z``, whatever the neighbors keep."""
    return z


@final
@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A rule of fusion; the default is that of MCE-PL.

    Parameters
    ----------
    hear : callable
        ``hear(masks, own) -> n``: the bool masks of the neighbors, at least one, and
        the agent's own, the one that it has sent; gives a float tensor of the same
        shape, and leaves the masks as they are: other agents may hear them, too. The
        default is the mean of the neighbors' masks. An agent that hears nobody has no
        ``n``, and ranks its scores alone. Where votes have faded (``age-decay``), all
        masks come as floats, each times its vote in (0, 1].
    rank : callable
        ``rank(z, n) -> y``: the aggregation tensor, whose largest magnitudes are the
        mask; differentiable in ``z``. The default is
        ``y = z + mean(|z|) * sign(z) * n``. ``n`` comes times the fusion strength c.
    blend : callable, optional
        ``blend(m, n, num_neighbors=k) -> x``: what the frozen weights are multiplied by
        in place of the own mask ``m``, a float tensor. The gradient passes it as if it
        were ``m``.
    exchanges : bool (default: True)
        False: agents neither send masks nor take any in.

    Examples
    --------
    A weight counts as kept if most neighbors keep it:

    >>> def majority(masks, own):
    ...     return (neighbor_average(masks, own) > 0.5).float()
    >>> MAJORITY = Fusion(hear=majority)
    """

    hear: Callable[[Sequence[Tensor], Tensor], Tensor] = neighbor_average
    rank: Callable[[Tensor, Tensor], Tensor] = maths.aggregate_scores
    blend: Blend | None = None
    exchanges: bool = True

    def __post_init__(self) -> None:
        for name in ("hear", "rank", "blend"):
            formula = getattr(self, name)
            check(
                callable(formula) or (formula is None and name == "blend"),
                f"a fusion rule's {name} must be a function",
                formula,
            )

    @property
    def averages(self) -> bool:
        """Whether the mean of the neighbors' masks is heard, without the own one."""
        return self.hear is neighbor_average


MCEPL = Fusion()
MASK_AVERAGING = Fusion(rank=scores_alone, blend=maths.mean_with_own)
NONE = Fusion(rank=scores_alone, exchanges=False)

FUSIONS = Registry(
    "flower_mcepl.fusions",
    Fusion,
    {
        "mcepl": "flower_mcepl.masks.fusion:MCEPL",
        "mask-averaging": "flower_mcepl.masks.fusion:MASK_AVERAGING",
        "none": "flower_mcepl.masks.fusion:NONE",
    },
    noun="fusion rule",
)


def heard_by(fusion: Fusion, masks: Sequence[Tensor], own: Tensor) -> Tensor:
    """Return what a rule makes of masks, whose votes may have faded.

    Raises
    ------
    ConfigError
        If it fails, takes bits alone where votes have faded, changes a mask in place,
        or gives another shape, no floats, or numbers that are not finite.
    """
    # the neighbors' first masks are common to all agents, and the own one is sent
    lent = [*masks, own]
    versions = [mask._version for mask in lent]
    try:
        n = fusion.hear(masks, own)
    except (RuntimeError, TypeError) as error:
        if not masks[0].is_floating_point():
            raise _failed("hear", fusion.hear, error) from error
        raise ConfigError(
            "where votes have faded (age-decay below 1), a fusion rule's hear gets masks as "
            f"floats, each times its vote; this one failed on them ({error}). Mend the rule, or "
            "set age-decay to 1."
        ) from error
    except FlowerMceplError:
        raise
    except Exception as error:  # whatever the rule of a package raises
        raise _failed("hear", fusion.hear, error) from error
    check(
        [mask._version for mask in lent] == versions,
        "a fusion rule's hear must leave the masks as they are; it changed one in place",
        _name(fusion.hear),
        "Let it calculate on copies: other agents hear the same masks.",
    )
    if not bool(check_formula(n, own, name="hear").isfinite().all()):
        raise ConfigError(
            "a fusion rule's hear must return finite numbers; got some that are infinite or "
            f"not a number, from {len(masks)} masks. Mend the rule."
        )
    # a rule may give one tensor for all, filled anew each time
    return n if fusion.averages else n.clone()


def ranked_by(fusion: Fusion, z: Tensor, n: Tensor) -> Tensor:
    """Return ``y`` of a layer by a rule.

    Raises
    ------
    ConfigError
        If the rule fails, gives another shape or no floats, or a tensor of which
        nothing can be learned.
    """
    try:
        y = fusion.rank(z, n)
    except FlowerMceplError:
        raise
    except Exception as error:  # whatever the rule of a package raises
        raise _failed("rank", fusion.rank, error) from error
    check(
        check_formula(y, z, name="rank").requires_grad
        or not (torch.is_grad_enabled() and z.requires_grad),
        "a fusion rule's rank must be differentiable in the scores z; what it returned has no "
        "gradient",
        _name(fusion.rank),
        "Leave out detach(), .data and no_grad() on the way from z.",
    )
    return y


def blended_by(blend: Blend, m: Tensor, n: Tensor, *, num_neighbors: int) -> Tensor:
    """Return what a rule multiplies the weights of a layer with.

    Raises
    ------
    ConfigError
        If the rule fails, or gives another shape or no floats.
    """
    try:
        x = blend(m, n, num_neighbors=num_neighbors)
    except FlowerMceplError:
        raise
    except Exception as error:  # whatever the rule of a package raises
        raise _failed("blend", blend, error) from error
    return check_formula(x, m, name="blend")


def _failed(name: str, formula: Callable[..., object], error: Exception) -> ConfigError:
    """Error that names the function of a rule, and what it raised."""
    return ConfigError(
        f"a fusion rule's {name} must take every layer; {_name(formula)} raised "
        f"{type(error).__name__}: {error}. Mend the rule (docs/extending.md)."
    )


def _name(formula: Callable[..., object]) -> str:
    module = getattr(formula, "__module__", "")
    return f"{module}.{getattr(formula, '__qualname__', repr(formula))}"


def check_formula(result: Tensor, like: Tensor, *, name: str) -> Tensor:
    """Return what a formula of a rule gave.

    Raises
    ------
    ConfigError
        If it is no tensor of floats in the layer's shape.
    """
    if (
        not isinstance(result, Tensor)
        or result.shape != like.shape
        or not result.dtype.is_floating_point
    ):
        raise ConfigError(
            f"a fusion rule's {name} must return a tensor of floats in the layer's shape "
            f"{tuple(like.shape)}; got {_described(result)}. Mend the rule."
        )
    return result


def _described(result: object) -> str:
    if not isinstance(result, Tensor):
        return type(result).__name__
    return f"{result.dtype} {tuple(result.shape)}"
