"""Further metrics of a user's own evaluate function, as far as a record holds them."""

import math
from collections.abc import Container, Mapping
from functools import lru_cache
from logging import getLogger
from typing import Any

import numpy as np
from torch import Tensor

from flower_mcepl.agents.tasks.task import OF_TRAINING, TAKEN, is_free

_MOST, _LONGEST = 50, 200  # metrics of one answer, characters of a name


def further_metrics(
    metrics: Mapping[str, Any], *, besides: Container[str | None]
) -> dict[str, float]:
    """Finite numbers among the metrics, but those named ``besides``.

    What is left out, such as text, lists or a name that an answer has for something
    else, is logged once in a process: an odd metric must not cost what was learned.
    """
    others = {name: value for name, value in metrics.items() if name not in besides}
    fitting = [name for name, value in others.items() if _fits(name, value)][:_MOST]
    if left := [name for name in others if name not in fitting]:
        _log_left_out(", ".join(str(name)[:_LONGEST] for name in left))
    return {name: float(others[name]) for name in fitting}


def plain_number(value: Any) -> float | None:
    """Float of a number, a NumPy scalar or a tensor without dimensions; else None."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        return None
    try:
        value = value.detach() if isinstance(value, Tensor) else value
        return None if np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _fits(name: object, value: Any) -> bool:
    number = plain_number(value)
    free = isinstance(name, str) and len(name) <= _LONGEST and name != "accuracy" and is_free(name)
    return free and number is not None and math.isfinite(number)


@lru_cache(maxsize=100)
def _log_left_out(names: str) -> None:
    getLogger("flwr").warning(
        "the evaluate function's %s is left out of the record: it holds up to %d finite numbers, "
        "under names that are not its own (accuracy, %s, %s...).",
        names,
        _MOST,
        ", ".join(TAKEN),
        OF_TRAINING,
    )
