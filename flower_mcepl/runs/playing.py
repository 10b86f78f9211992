"""The two ways to play a simulation: rounds of all agents, and each agent's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.record.reading import read_run
from flower_mcepl.runs.barrier import VirtualRounds
from flower_mcepl.runs.book import RunBook
from flower_mcepl.runs.events import Event, EventSource, ReplayedEvents, VirtualEvents
from flower_mcepl.runs.fleet import Fleet
from flower_mcepl.runs.own_rounds import OwnRounds
from flower_mcepl.runs.own_state import answers_of, answers_state
from flower_mcepl.runs.timing import Timing
from flower_mcepl.runs.virtual_time import VirtualTimes

_ANSWERS, _EVENTS, _CLOCK = "answers", "events", "clock"  # keys of a checkpoint


def play_rounds(
    book: RunBook[bytes],
    exchange: Exchange[bytes],
    fleet: Fleet,
    timing: Timing,
    times: VirtualTimes | None,
) -> None:
    """Play the rounds that all agents go through together, and the closing exchange."""
    clock = VirtualRounds(
        len(fleet.agents),
        times or (lambda agent, round, begin: 0.0),
        timeout=timing.round_timeout,
        timeout_factor=timing.timeout_factor,
    )
    if book.resumed is not None and times is not None:
        clock.clock = _clock_of(book)
    player = _Rounds(book, exchange, fleet, clock, times)
    for round in book.rounds():
        player.play(round)
        if book.due(round):
            fleet.store(book, round)  # first, so that no exchange's side lacks the other
            book.keep(round)
    player.play(book.monitor.num_rounds + 1, closing=True)


class _Rounds:
    """Rounds of a simulation on a virtual clock, which may leave agents behind."""

    def __init__(
        self,
        book: RunBook[bytes],
        exchange: Exchange[bytes],
        fleet: Fleet,
        clock: VirtualRounds,
        times: VirtualTimes | None,
    ) -> None:
        self._book, self._exchange, self._fleet = book, exchange, fleet
        self._clock, self._times = clock, times
        self._answers: dict[int, Answer[bytes]] = {}  # of agents that are under way
        self._states: dict[str, str] = clock.states() if times is not None else {}

    def play(self, round: int, *, closing: bool = False) -> None:
        """Play a round, up to its end, with the answers that have come by then."""
        free = self._clock.free()
        if self._times is not None:
            self._times.now = self._clock.clock
        parcels = [self._exchange.parcel(i, round=round, closing=closing) for i in free]
        self._answers |= self._fleet.play(free, parcels)
        evaluating = any(parcel.evaluate for parcel in parcels)
        self._clock.begin(free, round, evaluating=evaluating, closing=closing)
        patient = closing or round == self._book.monitor.num_rounds
        came = self._clock.end(round, evaluating=evaluating, patient=patient)
        answers = {
            agent: replace(self._answers.pop(agent), late_of=None if c.round == round else c.round)
            for agent, c in came.items()
        }
        has_clock = self._times is not None
        self._book.close_round(
            round,
            answers,
            missing=[agent for agent in range(len(self._fleet.agents)) if agent not in came],
            states=self._changes(),
            clock=self._clock.clock if has_clock else None,
            clocks={agent: c.began for agent, c in came.items()} if has_clock else None,
        )

    def _changes(self) -> dict[str, str]:
        """States of agents that have changed since the last round."""
        now = self._clock.states() if self._times is not None else {}
        changes = {name: state for name, state in now.items() if self._states[name] != state}
        self._states = now
        return changes


def play_own_rounds(
    book: RunBook[bytes],
    exchange: Exchange[bytes],
    fleet: Fleet,
    timing: Timing,
    times: VirtualTimes,
    events: Sequence[Event] | None,
) -> None:
    """Play each agent's own rounds in the order of events, and the closing exchange.

    Without ``events`` they follow from the speeds.
    """
    own = OwnRounds(book, exchange, num_agents=len(fleet.agents))
    book.monitor.time_budget = timing.time_budget
    source: EventSource = (
        ReplayedEvents(events)
        if events is not None
        else VirtualEvents(
            len(fleet.agents),
            num_rounds=book.monitor.num_rounds,
            seconds=times,
            time_budget=timing.time_budget or math.inf,
        )
    )
    answers: dict[int, Answer[bytes]] = {}  # under way: an agent plays when it gets its parcel
    clock = 0.0
    if book.resumed is not None:
        facts = book.resumed.facts
        own.restore(book.resumed)
        source.restore(facts[_EVENTS])
        answers = answers_of(Bundle(facts[_ANSWERS], book.resumed.group(_ANSWERS)))
        clock = facts[_CLOCK]

    def keep(round: int) -> None:
        fleet.store(book, round)  # first, as by rounds
        own.keep(round, _under_way(answers, source, clock))

    for event in source:
        times.now = clock = event.clock
        own.take({agent: answers.pop(agent) for agent in event.answered}, clock=clock)
        parcels = own.give(event.given, clock=clock)
        own.note(event)
        answers |= fleet.play(event.given, parcels)
        if (round := own.due()) is not None:
            keep(round)
    if (round := own.last_due()) is not None:
        keep(round)
    own.end()
    everyone = range(len(fleet.agents))
    parcels = [own.closing_parcel(agent) for agent in everyone]
    own.close(fleet.play(everyone, parcels), clock=clock)


def _under_way(answers: Mapping[int, Answer[bytes]], source: EventSource, clock: float) -> Bundle:
    state = answers_state(answers)
    facts = {_ANSWERS: state.facts, _EVENTS: source.state(), _CLOCK: clock}
    return Bundle.joined(facts, {_ANSWERS: state.arrays})


def _clock_of(book: RunBook[bytes]) -> float:
    """Virtual time at the checkpoint that a run goes on from."""
    assert book.record is not None
    lines = read_run(book.record.path).relay
    return float(lines[-1].get("clock") or 0.0) if lines else 0.0
