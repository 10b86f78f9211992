"""Timing of a simulation: its schedule, and the clock that it goes by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent
from flower_mcepl.agents.parts.pacing import Decisions, StepSeconds, set_pace
from flower_mcepl.config.checks import check
from flower_mcepl.config.schedules import ASYNC, ROUNDS
from flower_mcepl.runs.events import Event, check_events, digest_of, recorded_events
from flower_mcepl.runs.speeds import Speeds
from flower_mcepl.runs.virtual_time import VirtualTimes

Events = str | Path | Sequence[Event]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When what happens in a simulation; see `simulate` for each field.

    Raises
    ------
    ConfigError
        If they do not fit together.
    """

    schedule: str = ROUNDS
    time_budget: float = 0.0
    speeds: str | Speeds = ""
    events: Events | None = None
    timeout_factor: float = 0.0
    round_timeout: float = math.inf

    def __post_init__(self) -> None:
        check(
            self.events is None or self.schedule == ASYNC,
            f'events are played by schedule "{ASYNC}"',
            self.schedule,
            "Pass that schedule, or leave events out.",
        )
        check(
            self.events is None or not (self.speeds or self.time_budget),
            "events say when things happened; speeds and time_budget beside them",
            (self.speeds, self.time_budget),
            "Leave them out.",
        )
        check(self.timeout_factor >= 0, "timeout_factor must be >= 0 (0: off)", self.timeout_factor)
        check(self.round_timeout > 0, "round_timeout must be > 0 seconds", self.round_timeout)
        check(
            not self.has_deadlines or (bool(self.speeds) and self.schedule == ROUNDS),
            "timeout_factor and round_timeout end rounds of all agents on the clock of speeds",
            (self.timeout_factor, self.round_timeout),
            f'Pass speeds, with schedule "{ROUNDS}", or leave them out.',
        )

    @property
    def has_deadlines(self) -> bool:
        """Whether a round can end without its last agents."""
        return self.timeout_factor != 0 or not math.isinf(self.round_timeout)

    @property
    def has_clock(self) -> bool:
        """Whether the run has a virtual clock."""
        return bool(self.speeds) or self.schedule == ASYNC

    def pace(self) -> Speeds:
        """Speeds of the fleet; without a spec all are equal, a second a step."""
        if isinstance(self.speeds, Speeds):
            return self.speeds
        return Speeds.parse(self.speeds) if self.speeds else Speeds()

    def config(self, events: Sequence[Event] | None) -> dict[str, Any]:
        """What the record says beside the schedule; ``events`` are played again."""
        replayed = "" if events is None else digest_of(events)
        own = {"replayed": replayed, "time_budget": self.time_budget}
        return {
            "speeds": self.pace().to_text() if self.speeds else "",
            **(own if self.schedule == ASYNC else {}),
            **({"timeout_factor": self.timeout_factor} if self.timeout_factor else {}),
            **({} if math.isinf(self.round_timeout) else {"round_timeout": self.round_timeout}),
        }

    def times(
        self,
        agents: Sequence[Agent],
        *,
        decisions: Decisions | None,
        step_seconds: StepSeconds | None,
    ) -> VirtualTimes | None:
        """Clock of the agents' rounds; who chooses its filters goes by it, too."""
        times = None
        if self.has_clock:
            replayed = decisions is not None
            times = VirtualTimes(agents, self.pace(), step_seconds, replayed=replayed)
        clock = step_seconds if times is None else times.step_seconds
        set_pace(agents, decisions=decisions, step_seconds=clock)
        return times

    def checked_events(self, *, num_agents: int, num_rounds: int) -> list[Event] | None:
        """Events to play again; None where the run makes its own."""
        if self.events is None:
            return None
        events = recorded_events(self.events)
        check_events(events, num_agents=num_agents, num_rounds=num_rounds)
        return events
