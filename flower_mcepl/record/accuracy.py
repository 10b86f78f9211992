"""Accuracy over the agents: mean, spread, worst and best of their last evaluations."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from flower_mcepl.record.layout import Row


def accuracy_summary(rows: Iterable[Mapping[str, Any]]) -> Row:
    """Mean, population standard deviation and extremes over the agents' last lines.

    Agents whose accuracy is ``None`` or not finite do not count; with none left every
    value is ``None``. Of equal agents the lowest number is named. ``round`` is the
    latest one among the lines that count.
    """
    last = last_rows(rows)
    scores = {
        agent: float(row["accuracy"])
        for agent, row in sorted(last.items())
        if _is_finite(row["accuracy"])
    }
    if not scores:
        return dict.fromkeys(("mean", "std", "worst", "worst_agent", "best", "best_agent", "round"))
    worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return {
        "mean": statistics.fmean(scores.values()),
        "std": statistics.pstdev(scores.values()),
        "worst": scores[worst],
        "worst_agent": worst,
        "best": scores[best],
        "best_agent": best,
        "round": max(int(last[agent]["round"]) for agent in scores),
    }


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
