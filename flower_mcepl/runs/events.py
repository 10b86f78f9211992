"""Events of a run without a barrier: who answered, who got its next parcel, and when.

The order of events is all that such a run has beyond its seeds: played again in the
same order, the same agents learn the same bits.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.reading import read_run

Seconds = Callable[[int, int, float], float]
"""Virtual seconds of ``(agent, round, begin)``, from its parcel to its answer.

It is asked for after the round was played, so that it may depend on it.
"""


@dataclass(frozen=True)
class Event:
    """Answers that came at one time, and the agents that got a parcel then."""

    clock: float  # seconds since the run's begin: virtual, or of the machine under Flower
    answered: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()  # agents whose parcel or answer was lost

    def to_row(self) -> dict[str, Any]:
        """Line of ``events.jsonl``."""
        failed = {"failed": [*self.failed]} if self.failed else {}
        row = {"clock": self.clock, "answered": [*self.answered], "given": [*self.given]}
        return {**row, **failed}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Event":
        """Event from a checked line of ``events.jsonl``."""
        agents = (tuple(row.get(key) or ()) for key in ("answered", "given", "failed"))
        return cls(float(row["clock"]), *agents)


def virtual_events(
    num_agents: int, *, num_rounds: int, seconds: Seconds, time_budget: float = math.inf
) -> Iterator[Event]:
    """Events of a fleet whose rounds take known times.

    Whoever answers gets its next parcel at once, up to ``num_rounds`` of its own, and
    none at or after ``time_budget``. Answers of one time are one event: all of them are
    taken in before any parcel goes out, so that a fleet of equal speeds plays rounds.
    """
    rounds = [0] * num_agents
    answers: list[tuple[float, int]] = []
    event = Event(0.0, (), tuple(range(num_agents)))
    while True:
        yield event
        for agent in event.given:
            rounds[agent] += 1
            took = seconds(agent, rounds[agent], event.clock)
            heapq.heappush(answers, (event.clock + took, agent))
        if not answers:
            return
        clock, answered = answers[0][0], []
        while answers and answers[0][0] == clock:
            answered.append(heapq.heappop(answers)[1])
        due = [agent for agent in answered if rounds[agent] < num_rounds and clock < time_budget]
        event = Event(clock, tuple(answered), tuple(due))


def recorded_events(source: "str | Path | Sequence[Event]") -> list[Event]:
    """Events of a run record, or those given."""
    if isinstance(source, str | Path):
        events = [Event.from_row(row) for row in read_run(source).events]
    else:
        events = list(source)
    if not events:
        raise ConfigError(
            f"events come from a run record of schedule async; {source} holds none. Name the "
            "record of such a run."
        )
    return events


def check_events(events: Iterable[Event], *, num_agents: int, num_rounds: int) -> None:
    """Raise ConfigError unless these are the events of a whole run of such a fleet."""
    rounds, waiting, clock = [0] * num_agents, set[int](), 0.0
    for number, event in enumerate(events, start=1):
        problem = _problem(event, rounds, waiting, clock, num_rounds)
        if problem:
            raise ConfigError(
                f"events of {num_agents} agents and {num_rounds} rounds are played as they are; "
                f"event {number} {problem}. Take them from the record of a run with as many "
                "agents and rounds."
            )
        clock = event.clock
    if waiting:
        raise ConfigError(
            "events are those of a whole run, in which every parcel is answered; these agents "
            f"still owe an answer: {', '.join(map(str, sorted(waiting)))}. The run broke off, or "
            "lost messages: only one that finished can be played again."
        )


def _problem(
    event: Event, rounds: list[int], waiting: set[int], clock: float, num_rounds: int
) -> str:
    """What is wrong with an event; takes note of it."""
    if event.failed:
        return f"says that messages of agents {list(event.failed)} were lost"
    if event.clock < clock:
        return f"is of the time {event.clock:g}, after one of {clock:g}"
    for agent in (*event.answered, *event.given):
        if not 0 <= agent < len(rounds):
            return f"is of agent {agent}"
    if len({*event.answered}) < len(event.answered) or not {*event.answered} <= waiting:
        return f"has answers of {list(event.answered)}, not all of which were waited for"
    waiting -= {*event.answered}
    if len({*event.given}) < len(event.given) or {*event.given} & waiting:
        return f"has parcels for {list(event.given)}, not all of whom had answered"
    waiting |= {*event.given}
    for agent in event.given:
        rounds[agent] += 1
        if rounds[agent] > num_rounds:
            return f"gives agent {agent} its round {rounds[agent]}"
    return ""
