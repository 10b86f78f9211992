"""Accuracy over the agents: mean, spread, worst and best of one evaluated round."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from flower_mcepl.record.layout import Row

_KEYS = ("mean", "std", "worst", "worst_agent", "best", "best_agent", "round", "agents")


def accuracy_summary(rows: Iterable[Mapping[str, Any]]) -> Row:
    """Mean, population standard deviation and extremes of the last evaluated round.

    ``round`` is that round, and ``agents`` the number of agents in it: who was last
    evaluated in an earlier one does not count. Nor does an accuracy that is ``None`` or
    not finite; with none left every value is ``None``. Of equal agents the lowest
    number is named.
    """
    last = last_evaluated(rows)
    scores = {agent: float(row["accuracy"]) for agent, row in last.items()}
    if not scores:
        return dict.fromkeys(_KEYS)
    worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return {
        "mean": statistics.fmean(scores.values()),
        "std": statistics.pstdev(scores.values()),
        "worst": scores[worst],
        "worst_agent": worst,
        "best": scores[best],
        "best_agent": best,
        "round": next(int(row["round"]) for row in last.values()),
        "agents": len(scores),
    }


def last_evaluated(rows: Iterable[Mapping[str, Any]]) -> dict[int, Row]:
    """Lines with an accuracy of the last round that has any, by agent."""
    known = [row for row in rows if _is_finite(row["accuracy"])]
    newest = max((int(row["round"]) for row in known), default=0)
    return last_rows(row for row in known if int(row["round"]) == newest)


def mean_loss(rows: Iterable[Mapping[str, Any]]) -> float:
    """Mean of the losses that are finite; not a number where none is."""
    losses = [float(row["loss"]) for row in rows if _is_finite(row.get("loss"))]
    return statistics.fmean(losses) if losses else math.nan


def of_agents(count: int, of: int) -> str:
    """Number of agents that a mean is of: ``"9 of 10 agents"``, ``"10 agents"``."""
    noun = "agent" if of == 1 else "agents"
    return f"{count} {noun}" if count >= of else f"{count} of {of} {noun}"


def last_rows(rows: Iterable[Mapping[str, Any]]) -> dict[int, Row]:
    """Last line of each agent, by agent."""
    last: dict[int, Row] = {}
    for row in rows:
        agent = int(row["agent"])
        if agent not in last or row["round"] >= last[agent]["round"]:
            last[agent] = dict(row)
    return dict(sorted(last.items()))


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
