"""Events of a fleet without a barrier, against a list that is sorted anew each time."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError
from flower_mcepl.runs.events import Event, VirtualEvents, check_events

# few different ones, so that many answers come at the same time
durations = st.dictionaries(
    st.tuples(st.integers(0, 4), st.integers(1, 5)), st.sampled_from([0.5, 1.0, 2.0, 3.5])
)


def naive_events(
    num_agents: int, num_rounds: int, seconds: Callable[[int, int], float], budget: float
) -> list[Event]:
    """All answers to come, in a list: look for the next time, and who answers then."""
    events = [Event(0.0, (), tuple(range(num_agents)))]
    played = dict.fromkeys(range(num_agents), 1)
    coming = [(seconds(agent, 1), agent) for agent in range(num_agents)]
    while coming:
        coming = sorted(coming)
        now = coming[0][0]
        answered = [agent for time, agent in coming if time == now]
        coming = [(time, agent) for time, agent in coming if time != now]
        given = []
        for agent in answered:
            if played[agent] < num_rounds and now < budget:
                played[agent] += 1
                given.append(agent)
                coming.append((now + seconds(agent, played[agent]), agent))
        events.append(Event(now, tuple(answered), tuple(given)))
    return events


@given(
    num_agents=st.integers(1, 5),
    num_rounds=st.integers(1, 5),
    took=durations,
    budget=st.sampled_from([math.inf, 0.5, 2.0, 4.0]),
)
def test_events_are_those_of_a_naive_list(
    num_agents: int, num_rounds: int, took: dict[tuple[int, int], float], budget: float
) -> None:
    def seconds(agent: int, round: int, begin: float = 0.0) -> float:
        return took.get((agent, round), 1.0)

    events = list(
        VirtualEvents(num_agents, num_rounds=num_rounds, seconds=seconds, time_budget=budget)
    )
    assert events == naive_events(num_agents, num_rounds, seconds, budget)
    check_events(events, num_agents=num_agents, num_rounds=num_rounds)
    rounds = [sum(agent in event.given for event in events) for agent in range(num_agents)]
    assert all(1 <= count <= num_rounds for count in rounds)
    if math.isinf(budget):
        assert rounds == [num_rounds] * num_agents
    assert [Event.from_row(event.to_row()) for event in events] == events


@given(num_agents=st.integers(1, 6), num_rounds=st.integers(1, 6), step=st.floats(1e-3, 1e3))
def test_equal_speeds_play_rounds(num_agents: int, num_rounds: int, step: float) -> None:
    everyone = tuple(range(num_agents))
    events = list(
        VirtualEvents(num_agents, num_rounds=num_rounds, seconds=lambda agent, round, at: step)
    )
    assert [event.answered for event in events] == [(), *[everyone] * num_rounds]
    assert [event.given for event in events] == [*[everyone] * num_rounds, ()]


def test_a_round_counts_by_its_beginning() -> None:
    begins: list[tuple[int, float]] = []

    def seconds(agent: int, round: int, begin: float) -> float:
        begins.append((round, begin))
        return 2.0

    for _ in VirtualEvents(1, num_rounds=3, seconds=seconds):
        pass
    assert begins == [(1, 0.0), (2, 2.0), (3, 4.0)]


def events() -> list[Event]:
    """Two agents, one of them twice as slow, two rounds each."""
    return list(VirtualEvents(2, num_rounds=2, seconds=lambda agent, round, at: float(1 + agent)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[:-1], "still owe an answer: 1"),
        (lambda e: [*e[:2], replace(e[2], clock=0.5), *e[3:]], "event 3 is of the time 0.5, after"),
        (lambda e: [replace(e[0], given=(0, 7)), *e[1:]], "event 1 is of agent 7"),
        (lambda e: [replace(e[0], given=(0, 0)), *e[1:]], r"event 1 has parcels for \[0, 0\]"),
        (lambda e: [*e[:2], Event(2.0, (1,), (1,)), *e[3:]], "still owe an answer: 0"),
        (lambda e: [*e[:1], replace(e[1], answered=(1, 1)), *e[2:]], r"answers of \[1, 1\]"),
        (lambda e: [*e[:1], replace(e[1], given=(0, 1)), *e[2:]], r"parcels for \[0, 1\]"),
        (lambda e: [*e, Event(9.0, (), (0,)), Event(10.0, (0,))], "gives agent 0 its round 3"),
    ],
)
def test_events_that_are_none_of_a_run(
    change: Callable[[list[Event]], list[Event]], message: str
) -> None:
    check_events(events(), num_agents=2, num_rounds=2)
    with pytest.raises(ConfigError, match=message):
        check_events(change(events()), num_agents=2, num_rounds=2)


def test_the_events_of_two_speeds() -> None:
    assert events() == [
        Event(0.0, (), (0, 1)),
        Event(1.0, (0,), (0,)),
        Event(2.0, (0, 1), (1,)),
        Event(4.0, (1,), ()),
    ]
    clocks = [event.clock for event in events()]
    assert all(a <= b for a, b in itertools.pairwise(clocks))
