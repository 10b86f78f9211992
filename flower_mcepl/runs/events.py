"""Events of a run without a barrier: who answered, who got its next parcel, and when.

The order of events is all that such a run has beyond its seeds: played again in the
same order, the same agents learn the same bits.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, final

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.values import to_json

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


class EventSource(Protocol):
    """Events of a simulation, one after the other; the last one was played."""

    def __iter__(self) -> Iterator[Event]:
        """Return itself."""
        ...

    def __next__(self) -> Event:
        """The next event."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that the events to come depend on, JSON-able."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the event that was played when `state` was taken."""
        ...


@final
class VirtualEvents:
    """Events of a fleet whose rounds take known times.

    Whoever answers gets its next parcel at once, up to ``num_rounds`` of its own, and
    none at or after ``time_budget``. Answers of one time are one event: all of them are
    taken in before any parcel goes out, so that a fleet of equal speeds plays rounds.
    """

    def __init__(
        self, num_agents: int, *, num_rounds: int, seconds: Seconds, time_budget: float = math.inf
    ) -> None:
        self._num_rounds, self._seconds, self._time_budget = num_rounds, seconds, time_budget
        self._rounds = [0] * num_agents
        self._answers: list[tuple[float, int]] = []  # a heap of those to come
        self._last: Event | None = None  # whose parcels are yet to be timed

    def __iter__(self) -> Iterator[Event]:
        """Return itself."""
        return self

    def __next__(self) -> Event:
        """The next event; the rounds that the last one began have been played."""
        if not any(self._rounds) and self._last is None:
            self._last = Event(0.0, (), tuple(range(len(self._rounds))))
            return self._last
        self._time_answers()
        if not self._answers:
            raise StopIteration
        clock, answered = self._answers[0][0], []
        while self._answers and self._answers[0][0] == clock:
            answered.append(heapq.heappop(self._answers)[1])
        self._last = Event(clock, tuple(answered), tuple(filter(self._goes_on(clock), answered)))
        return self._last

    def _goes_on(self, clock: float) -> Callable[[int], bool]:
        return lambda agent: self._rounds[agent] < self._num_rounds and clock < self._time_budget

    def _time_answers(self) -> None:
        event, self._last = self._last, None
        for agent in () if event is None else event.given:
            assert event is not None
            self._rounds[agent] += 1
            took = self._seconds(agent, self._rounds[agent], event.clock)
            heapq.heappush(self._answers, (event.clock + took, agent))

    def state(self) -> dict[str, Any]:
        """Rounds of the agents, and when the answers under way will come."""
        self._time_answers()
        return {"rounds": [*self._rounds], "answers": sorted(self._answers)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the event that was played when `state` was taken."""
        self._rounds = [*state["rounds"]]
        self._answers = [(clock, agent) for clock, agent in state["answers"]]  # sorted: a heap
        self._last = None


@final
class ReplayedEvents:
    """Events of an earlier run, as they were."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events, self._played = events, 0

    def __iter__(self) -> Iterator[Event]:
        """Return itself."""
        return self

    def __next__(self) -> Event:
        """The next event."""
        if self._played == len(self._events):
            raise StopIteration
        self._played += 1
        return self._events[self._played - 1]

    def state(self) -> dict[str, Any]:
        """Number of the events that were played."""
        return {"played": self._played}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the event that was played when `state` was taken."""
        self._played = int(state["played"])


def digest_of(events: Iterable[Event]) -> str:
    """16 hex digits that stand for the events of a run."""
    rows = to_json([event.to_row() for event in events])
    return blake2b(rows.encode(), digest_size=8).hexdigest()


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
