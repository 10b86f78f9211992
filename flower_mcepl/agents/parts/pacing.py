"""Pacing: an agent's share of filters before each round, measured or replayed."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, final

from flower_mcepl.agents.agent import Agent
from flower_mcepl.agents.parts.mask_states import SHARE
from flower_mcepl.agents.parts.meters import Meter, find_meter
from flower_mcepl.agents.parts.pace import (
    HOLD,
    LEVELS,
    REPLAY,
    Pace,
    decision_metrics,
    first_pace,
    interpolated,
    next_pace,
)
from flower_mcepl.agents.parts.step_times import PacedConfig
from flower_mcepl.agents.parts.strain import find_strain
from flower_mcepl.config.checks import check
from flower_mcepl.errors import ConfigError, StateError

PACE = "pace"  # fact of a state
MEASURED = (0.25, 0.5, 1.0)  # shares of which a step is measured at the start

StepSeconds = Callable[[int, int, float], float]
"""Seconds of a local step of ``(agent, round, share)`` in place of measured ones.

Round 0 is the measurement at the start.
"""
Decisions = Mapping[int, Mapping[int, float]]
"""Share of the filters by agent, by round, as in a run record."""


@final
class Pacer:
    """Chooses the share of filters of one agent, round by round.

    Parameters
    ----------
    agent : int
        The agent's number.
    budget : float
        What a local step may take, in the meter's unit.
    meter : Meter
        What a step takes is the difference of its readings before and after.

    Attributes
    ----------
    step_seconds : StepSeconds or None
        A clock in place of the machine's, as in a simulated fleet; it knows no strains.
    decisions : mapping or None
        Share by round that a record holds; nothing is measured or decided then.
    pace : Pace or None
        Of the round that is going on, or the last; None before the first.
    """

    def __init__(self, agent: int, *, budget: float, meter: Meter) -> None:
        self.agent, self.budget, self.meter = agent, budget, meter
        self.step_seconds: StepSeconds | None = None
        self.decisions: Mapping[int, float] | None = None
        self.pace: Pace | None = None
        self._costs: tuple[float, ...] = ()
        self._spent: float | None = None  # of the last round, not yet decided on
        self._steps: list[float] = []  # of this round

    @classmethod
    def of(cls, agent: int, config: PacedConfig) -> "Pacer":
        """Pacer of an agent with these settings."""
        meter = find_meter(config.step_budget_unit)
        return cls(agent, budget=config.step_budget, meter=meter)

    def begin(self, round: int, measure: Callable[[float], float]) -> float:
        """Share for the steps of ``round``.

        ``measure`` gives what a step takes at a share; it is called at the start.
        """
        self._steps = []
        if self.decisions is not None:
            self.pace = self._replayed(self.decisions, round)
        elif self.pace is None:
            _, self.pace = self.measured(measure)
        elif self._spent is None:
            self.pace = replace(self.pace, reason=HOLD)
        else:
            strain = "" if self.step_seconds is not None else find_strain()
            self.pace = next_pace(
                self.pace, self._spent, self._costs, budget=self.budget, strain=strain
            )
        return self.pace.share

    def note(self, spent: float) -> None:
        """Take note of what a step of this round took."""
        if spent > 0:  # a counter of energy moves in jumps
            self._steps.append(spent)

    def end(self, round: int) -> dict[str, float]:
        """Metrics of the round: its share, why, and what a step took."""
        assert self.pace is not None
        if self.decisions is not None:
            self._spent = None
        elif self.step_seconds is not None:
            self._spent = self._told(round, self.pace.share)
        else:
            self._spent = statistics.median(self._steps) if self._steps else None
        return decision_metrics(self.pace, self._spent)

    def measured(self, measure: Callable[[float], float]) -> tuple[dict[float, float], Pace]:
        """What steps take at some shares, and the pace that a run begins at."""
        told = self.step_seconds
        shares = MEASURED if told is None else LEVELS
        seconds = {s: measure(s) if told is None else self._told(0, s) for s in shares}
        self._costs = interpolated(seconds)
        return seconds, first_pace(seconds[1.0], self._costs, budget=self.budget)

    def predicted(self, pace: Pace) -> float:
        """What a step takes at a pace, by all that it goes by."""
        return max(pace.window) * self._costs[pace.level]

    def facts(self) -> dict[str, Any]:
        """Entries of an agent's state; none before the first round."""
        if self.pace is None:
            return {}
        pace = {**self.pace.facts(), "costs": list(self._costs), "spent": self._spent}
        return {PACE: pace, SHARE: self.pace.share}

    def restore(self, facts: Mapping[str, Any]) -> float | None:
        """Go on from where `facts` was taken; returns the share, None if there is none.

        Raises
        ------
        StateError
            If they are damaged.
        """
        kept = facts.get(PACE)
        if kept is None:
            self.pace, self._costs, self._spent = None, (), None
            return None
        self.pace = Pace.from_facts(kept)
        costs, spent = kept.get("costs"), kept.get("spent")
        if costs and (len(costs) != len(LEVELS) or not all(_is_time(cost) for cost in costs)):
            raise StateError(f"the saved costs of levels must be {len(LEVELS)} numbers > 0.")
        if spent is not None and not _is_time(spent):
            raise StateError(f"the saved time of a step must be a number > 0; got {spent!r}.")
        self._costs, self._spent = tuple(costs or ()), spent
        return self.pace.share

    def _told(self, round: int, share: float) -> float:
        assert self.step_seconds is not None
        seconds = float(self.step_seconds(self.agent, round, share))
        check(_is_time(seconds), "step_seconds must return a finite number > 0", seconds)
        return seconds

    def _replayed(self, decisions: Mapping[int, float], round: int) -> Pace:
        share = decisions.get(round)
        if share not in LEVELS:
            raise ConfigError(
                f"the decisions to replay must hold one of the shares "
                f"{', '.join(map(str, LEVELS))} for agent {self.agent} in round {round}; got "
                f"{share!r}. Take them from the record of a run as long as this one."
            )
        return Pace(LEVELS.index(share), reason=REPLAY)


def set_pace(
    agents: Iterable[Agent],
    *,
    decisions: Decisions | None = None,
    step_seconds: StepSeconds | None = None,
) -> None:
    """Let agents replay decisions, or go by another clock than the machine's.

    Raises
    ------
    ConfigError
        If none of them chooses its share of filters, or one has no decisions.
    """
    if decisions is None and step_seconds is None:
        return
    pacers = [p for agent in agents if isinstance(p := getattr(agent, "pacer", None), Pacer)]
    if not pacers:
        raise ConfigError(
            'decisions and step_seconds are for agents with filters = "auto"; none of these has '
            "it. Leave them out."
        )
    for pacer in pacers:
        pacer.step_seconds = step_seconds
        pacer.decisions = None if decisions is None else decisions.get(pacer.agent, {})


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")
