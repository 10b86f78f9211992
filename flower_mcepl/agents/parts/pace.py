"""Pace of a device: the share of filters whose local step fits a budget.

A pure rule from measured steps to a level. Symbols::

    ρ_l  share of filters that are on at level l, ascending
    c_l  cost of a step at level l over that of one with all filters on
    s    what a step took: seconds, or joules
    b    budget, in the unit of s

Measured at one level, a step says what one would take at any other, ``s * c_k / c_l``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flower_mcepl.config.checks import check
from flower_mcepl.errors import StateError

LEVELS = (0.25, 0.375, 0.5, 0.75, 1.0)
# Why a level was taken: at the start; as before; after a step that was late; because
# there was room for the next level; because the device was short of something; because
# a record says so.
START, HOLD, LATE, ROOM, REPLAY = "start", "hold", "late", "room", "replay"
STRAINS = MEMORY, BATTERY, TEMPERATURE = "memory", "battery", "temperature"
REASONS = (START, HOLD, LATE, ROOM, REPLAY, *STRAINS)

WINDOW = 8  # steps of which the slowest counts before a level is raised
SETTLED = 3  # steps at a level before it is raised, or lowered by a strain once more
SPARE = 0.1  # share of a predicted step that must fit besides

# metrics of training that tell a decision; reasons travel as their place in REASONS
SHARE_METRIC, SPENT_METRIC = "train-filters", "train-filters-step"
REASON_METRIC = "train-filters-reason"


@dataclass(frozen=True)
class Pace:
    """A device's level, and what it goes by.

    Parameters
    ----------
    level : int
        Place among `LEVELS`.
    window : tuple of float (default: none)
        The last steps, each as what one with all filters on would have taken.
    since : int (default: 0)
        Steps measured at this level.
    reason : str (default: "start")
        Why this level: one of `REASONS`.
    """

    level: int
    window: tuple[float, ...] = ()
    since: int = 0
    reason: str = START

    @property
    def share(self) -> float:
        """Share of the filters that are on."""
        return LEVELS[self.level]

    def facts(self) -> dict[str, Any]:
        """What `from_facts` reads, JSON-able."""
        window = list(self.window)
        return {"level": self.level, "window": window, "since": self.since, "reason": self.reason}

    @classmethod
    def from_facts(cls, facts: object) -> "Pace":
        """Undo `facts`.

        Raises
        ------
        StateError
            If they are anything else.
        """
        if isinstance(facts, Mapping):
            level, window, since, reason = (facts.get(k) for k in cls.__dataclass_fields__)
            if (
                type(level) is int
                and 0 <= level < len(LEVELS)
                and isinstance(window, list)
                and all(isinstance(s, float) and 0 < s < float("inf") for s in window)
                and type(since) is int
                and since >= 0
                and reason in REASONS
            ):
                return cls(level, tuple(window), since, str(reason))
        raise StateError(
            f"the saved pace of a device must have level, window, since and reason; got {facts!r}. "
            "Start afresh."
        )


def first_pace(full: float, costs: Sequence[float], *, budget: float) -> Pace:
    """Largest level whose predicted step fits; the smallest where none does.

    ``full`` is what a step takes with all filters on.
    """
    fits = [level for level, cost in enumerate(costs) if full * cost <= budget]
    return Pace(max(fits, default=0), (full,))


# A late step lowers the level at once, because neighbors wait for it. Raising can wait.
# So one outlier costs a level for WINDOW steps, and noise settles at a level that it
# does not make late: this is the hysteresis.
def next_pace(
    pace: Pace, spent: float, costs: Sequence[float], *, budget: float, strain: str = ""
) -> Pace:
    """Level after a step that took ``spent``: one up, one down, or the same.

    Parameters
    ----------
    pace : Pace
        The level of that step, and what was measured before.
    spent : float
        What the step took.
    costs : sequence of float
        c by level.
    budget : float
        What a step may take.
    strain : str (default: none)
        What the device is short of: one of `STRAINS`.
    """
    window = (*pace.window, spent / costs[pace.level])[-WINDOW:]
    now = Pace(pace.level, window, pace.since + 1, HOLD)
    if strain:
        return _moved(now, -1, strain) if now.since >= SETTLED else now
    if spent > budget:
        return _moved(now, -1, LATE)
    if now.since >= SETTLED and pace.level + 1 < len(LEVELS):
        predicted = max(window) * costs[pace.level + 1]
        if predicted * (1 + SPARE) <= budget:
            return _moved(now, 1, ROOM)
    return now


def _moved(pace: Pace, by: int, reason: str) -> Pace:
    level = max(0, pace.level + by)
    return pace if level == pace.level else replace(pace, level=level, since=0, reason=reason)


def interpolated(measured: Mapping[float, float]) -> tuple[float, ...]:
    """Costs c by level, from what a step takes at some shares, 1 among them.

    Between two of them costs lie on a line; noise that makes a smaller share dearer
    than a larger one is leveled.
    """
    shares = sorted(measured)
    check(shares[-1] == 1, "what a step takes must be known for all filters on", shares)
    costs = []
    for share in LEVELS:
        above = next(s for s in shares if s >= share)
        below = max((s for s in shares if s <= share), default=above)
        part = 0.0 if above == below else (share - below) / (above - below)
        costs.append(measured[below] + part * (measured[above] - measured[below]))
    leveled = [min(costs[level:]) / measured[1.0] for level in range(len(costs))]
    return tuple(leveled)


def decision_metrics(pace: Pace, spent: float | None) -> dict[str, float]:
    """Metrics that tell the level of a round's steps, and what one took."""
    told = {SHARE_METRIC: pace.share, REASON_METRIC: float(REASONS.index(pace.reason))}
    return told if spent is None else {**told, SPENT_METRIC: spent}


def check_decision(metrics: Mapping[str, float]) -> tuple[str, Any] | None:
    """Rule that a decision in metrics breaks, and the value; None: it breaks none."""
    if not metrics.keys() & {SHARE_METRIC, REASON_METRIC, SPENT_METRIC}:
        return None
    share, reason = metrics.get(SHARE_METRIC), metrics.get(REASON_METRIC)
    if share not in LEVELS:
        return f"{SHARE_METRIC} must be one of {', '.join(map(str, LEVELS))}", share
    if reason not in range(len(REASONS)):
        return f"{REASON_METRIC} must be a whole number in 0..{len(REASONS) - 1}", reason
    spent = metrics.get(SPENT_METRIC, 1.0)
    return None if spent > 0 else (f"{SPENT_METRIC} must be > 0", spent)


def decision_of(metrics: Mapping[str, float]) -> dict[str, Any] | None:
    """Decision in an answer's metrics, for the record; None: there is none."""
    if SHARE_METRIC not in metrics or check_decision(metrics) is not None:
        return None
    reason = REASONS[int(metrics[REASON_METRIC])]
    return {"share": metrics[SHARE_METRIC], "spent": metrics.get(SPENT_METRIC), "reason": reason}
