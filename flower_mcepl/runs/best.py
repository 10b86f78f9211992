"""Best state of an agent: the one whose evaluation by the main metric is the best."""

from collections.abc import Mapping
from typing import final

from flower_mcepl.agents import Agent, AgentState
from flower_mcepl.record.metric import LOSS, MainMetric
from flower_mcepl.record.selection import BEST_ROUND, BEST_VALUE

BEST = "best"  # key of the facts of a state that was kept: round, metric and value


@final
class BestState:
    """Best state so far, a `Keeper`; of equal ones the earliest.

    It is the state that was evaluated: after the neighbors of its round were heard,
    before the next round's training. `Agent.restore` takes it as any other.
    """

    def __init__(self) -> None:
        self.state: AgentState | None = None

    def consider(
        self, agent: Agent, evaluation: Mapping[str, float], *, round: int
    ) -> dict[str, float]:
        """Keep the state if it is better; return round and value of the one kept."""
        metric, value = _measured(agent, evaluation)
        if value is not None and self._is_better(metric, value):
            state = agent.state()
            kept = {"round": round, "metric": metric.name, "value": value}
            # copies, as the agent trains on
            arrays = {name: array.copy() for name, array in state.arrays.items()}
            self.state = AgentState({**state.facts, BEST: kept}, arrays)
        return self._told()

    def _is_better(self, metric: MainMetric, value: float) -> bool:
        if self.state is None:
            return True
        best = self.state.facts[BEST]
        if best["metric"] != metric.name:
            # a loss stands in for the main metric where an evaluation has none of it
            return metric.name != LOSS.name
        return metric.beats(value, best["value"])

    def _told(self) -> dict[str, float]:
        if self.state is None:
            return {}
        best = self.state.facts[BEST]
        return {BEST_ROUND: float(best["round"]), BEST_VALUE: float(best["value"])}


def _measured(agent: Agent, evaluation: Mapping[str, float]) -> tuple[MainMetric, float | None]:
    """Main metric of an agent's evaluation, as the run has it, and its value."""
    facts = {key.replace("-", "_"): value for key, value in agent.describe().items()}
    row = {**evaluation, "metrics": evaluation}
    metric = MainMetric.of([facts], [row])
    return metric, metric.value(row)
