"""Selection by the main metric: rounds of best states, and when a run stops early."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flower_mcepl.record.layout import Row
from flower_mcepl.record.metric import MainMetric, last_rows

# what an answer says of the state that the agent keeps as its best; columns of its row
BEST_ROUND, BEST_VALUE = "keep-best-round", "keep-best-value"


def best_columns(metrics: Mapping[str, float]) -> Row:
    """Columns of a row about the best state; none where the agent keeps none."""
    if BEST_ROUND not in metrics or BEST_VALUE not in metrics:
        return {}
    return {"best_round": int(metrics[BEST_ROUND]), "best_value": metrics[BEST_VALUE]}


def best_states(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Agent, round and value of every best state, as each agent said last."""
    last = last_rows(row for row in rows if row.get("best_round") is not None)
    return [
        {"agent": agent, "round": row["best_round"], "value": row.get("best_value")}
        for agent, row in last.items()
    ]


@dataclass(frozen=True)
class Stall:
    """How long the mean over the agents has not become better."""

    best_round: int
    best: float
    evaluations: int  # after the best one


def find_stall(rows: Iterable[Mapping[str, Any]], metric: MainMetric) -> Stall | None:
    """Best mean over the agents so far, of equal ones the earliest; None of none.

    A round's mean is that over the agents that answered, as everywhere in the record.
    A round in which no agent has a value of the metric does not count.
    """
    # not `metric_summary`, as this is asked again after every evaluation of a long run
    by_round: dict[int, dict[int, float]] = {}
    for row in rows:
        if (value := metric.value(row)) is not None:
            by_round.setdefault(int(row["round"]), {})[row["agent"]] = value
    stall = None
    for round, values in sorted(by_round.items()):
        mean = fmean(values.values())
        if stall is None or metric.beats(mean, stall.best):
            stall = Stall(round, mean, 0)
        else:
            stall = Stall(stall.best_round, stall.best, stall.evaluations + 1)
    return stall
