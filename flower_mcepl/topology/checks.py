"""Checks of what a graph is asked for; a wrong value raises ``TopologyError``."""

import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from flower_mcepl.config import specs
from flower_mcepl.errors import TopologyError

T = TypeVar("T")


def whole(value: Any, what: str, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number within the limits, which are part of the range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TopologyError(f"{what} must be a whole number; got {value!r}.") from None
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"in {least}..{most}"
        advice = "Change it or the number of agents." if most is not None else "Raise it."
        raise TopologyError(f"{what} must be {limits}; got {number}. {advice}")
    return number


def agents(n: Any) -> int:
    """Return the number of agents of a graph."""
    return whole(n, "num_agents", least=1)


def degree(degree: Any, n: int) -> int:
    """Return the number of neighbors that each of `n` agents can have."""
    return whole(degree, f"degree among {n} agents", most=n - 1)


def round(round: Any) -> int:
    """Return the number of a round."""
    return whole(round, "round")


def between(value: float, what: str, *, most: int) -> float:
    """Return a number in [0, most]."""
    if not 0 <= value <= most:
        raise TopologyError(f"{what} must be in [0, {most}]; got {value}. Choose a value inside.")
    return float(value)


def lookup(known: Mapping[str, T], name: str, what: str) -> T:
    """Look up a name; an unknown one is refused with the closest as a hint."""
    return specs.lookup(known, name, what, error=TopologyError)
