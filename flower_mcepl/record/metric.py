"""Main metric of a run: its value for an agent, and mean, spread, worst over agents."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flower_mcepl.record.layout import Row

FRACTION = "fraction"  # unit of values in 0..1
_KEYS = ("mean", "std", "worst", "worst_agent", "best", "best_agent", "round", "agents")


@dataclass(frozen=True)
class MainMetric:
    """What a run is judged by: name, direction and unit."""

    name: str = "accuracy"
    higher_is_better: bool = True
    unit: str = FRACTION

    @classmethod
    def of(
        cls, handshakes: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
    ) -> "MainMetric":
        """The one that the agents' handshakes tell, in snake_case; else the accuracy.

        Of a run in which no agent has a value of it, the loss.
        """
        told = next((facts for facts in handshakes if facts.get("main_metric")), {})
        metric = ACCURACY
        if told:
            higher, unit = told.get("higher_is_better", True), told.get("metric_unit", "")
            metric = cls(str(told["main_metric"]), bool(higher), str(unit))
        rows = list(rows)
        known = any(metric.value(row) is not None for row in rows)
        # before there was a column of metrics, no accuracy meant one that is not finite
        has_loss = any(LOSS.value(row) is not None and "metrics" in row for row in rows)
        return LOSS if has_loss and not known else metric

    @property
    def bounded(self) -> bool:
        """Whether its values are in 0..1."""
        return self.unit == FRACTION

    @property
    def axis(self) -> str:
        """Name and unit, as on an axis."""
        return f"{self.name} [{self.unit}]" if self.unit and not self.bounded else self.name

    @property
    def direction(self) -> str:
        """Where better is."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def value(self, row: Mapping[str, Any]) -> float | None:
        """Value in a line of ``rounds.jsonl``; None where there is no finite one."""
        value = row.get(self.name)
        if not isinstance(value, int | float):  # no column, or one that is no metric
            value = (row.get("metrics") or {}).get(self.name)
        return float(value) if value is not None and math.isfinite(value) else None

    def target_problem(self, target: float) -> str | None:
        """Reason why no run can reach a target; None where one can."""
        if self.bounded and not 0 < target <= 1:
            return f"target is an {self.name} in (0, 1]; got {target}."
        if not math.isfinite(target):
            return f"target must be a finite {self.name}; got {target}."
        return None

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is at least as good as a target."""
        return value >= target if self.higher_is_better else value <= target

    def beats(self, value: float, other: float) -> bool:
        """Whether a value is better than another; of equal ones neither is."""
        return value > other if self.higher_is_better else value < other

    def sorted(self, values: Iterable[float]) -> list[float]:
        """Values from the worst to the best."""
        return sorted(values, reverse=not self.higher_is_better)

    def facts(self) -> Row:
        """Name, direction and unit for the summary."""
        return {
            "name": self.name,
            "higher_is_better": self.higher_is_better,
            "unit": self.unit,
        }


ACCURACY = MainMetric()
LOSS = MainMetric("loss", higher_is_better=False, unit="")


def metric_summary(rows: Iterable[Mapping[str, Any]], metric: MainMetric = ACCURACY) -> Row:
    """Mean, population standard deviation and extremes of the last evaluated round.

    ``round`` is that round, and ``agents`` the number of agents in it: who was last
    evaluated in an earlier one does not count. Nor does a value that is ``None`` or not
    finite; with none left every value is ``None``. Of equal agents the lowest number is
    named. ``worst`` and ``best`` follow the metric's direction.
    """
    last = last_evaluated(rows, metric)
    scores = {agent: _known(metric, row) for agent, row in last.items()}
    if not scores:
        return dict.fromkeys(_KEYS)
    sign = 1 if metric.higher_is_better else -1
    worst = min(scores, key=lambda agent: sign * scores[agent])
    best = max(scores, key=lambda agent: sign * scores[agent])
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


def final_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lines that a run's result is of, as if of one round; all where nothing marks any.

    Without a barrier agents end after unequal numbers of rounds. So the lines of the
    closing exchange are marked, and together they are the last evaluation.
    """
    known = list(rows)
    closing = [row for row in known if row.get("closing")]
    newest = max((row["round"] for row in closing), default=0)
    return [{**row, "round": newest} for row in closing] or known


def rows_by_round(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Lines by evaluated round, in the order of the rounds.

    Those that a run's result is of (`final_rows`), where they are marked, are a round
    of their own: the last point of a curve is the result.
    """
    known = list(rows)
    rounds: dict[int, list[Mapping[str, Any]]] = {}
    for row in known:
        if not row.get("closing"):
            rounds.setdefault(int(row["round"]), []).append(row)
    if any(row.get("closing") for row in known):
        last = final_rows(known)
        rounds[int(last[0]["round"])] = last
    return dict(sorted(rounds.items()))


def last_evaluated(
    rows: Iterable[Mapping[str, Any]], metric: MainMetric = ACCURACY
) -> dict[int, Row]:
    """Lines with a value of the metric of the last round that has any, by agent."""
    known = [row for row in rows if metric.value(row) is not None]
    newest = max((int(row["round"]) for row in known), default=0)
    return last_rows(row for row in known if int(row["round"]) == newest)


def _known(metric: MainMetric, row: Mapping[str, Any]) -> float:
    value = metric.value(row)
    assert value is not None
    return value


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
