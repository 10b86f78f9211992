"""Speeds of a fleet, read from a line or a file, and what a round takes by them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError
from flower_mcepl.runs.speeds import Change, Speeds
from flower_mcepl.runs.virtual_time import VirtualTimes
from tests.fleet.agents import make_fleet

positive = st.floats(1e-6, 1e6)
changes = st.builds(Change, st.integers(0, 9), st.floats(0, 1e6), positive)
speeds = st.builds(
    Speeds,
    step_seconds=st.lists(positive, min_size=1, max_size=4).map(tuple),
    changes=st.lists(changes, max_size=4).map(tuple),
    noise=st.floats(0, 1, exclude_max=True),
    latency=st.floats(0, 1e3),
)


@given(pace=speeds)
def test_a_spec_is_read_as_it_is_written(pace: Speeds) -> None:
    assert Speeds.parse(pace.to_text()) == pace


def test_the_parts_of_a_spec() -> None:
    pace = Speeds.parse(" 1,1, 5 ;3@100=2; 3 @ 250 = 1;noise=0.2;latency=.5;")
    assert pace == Speeds(
        step_seconds=(1.0, 1.0, 5.0),
        changes=(Change(3, 100.0, 2.0), Change(3, 250.0, 1.0)),
        noise=0.2,
        latency=0.5,
    )


def test_a_file_has_a_part_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "fleet.txt"
    file.write_text("# a fleet\n1, 1, 5  # in turn\n\n3@100=2; noise=0.2\nlatency=0.5\n")
    assert Speeds.parse(f"file:{file}") == Speeds.parse("1, 1, 5; 3@100=2; noise=0.2; latency=0.5")
    with pytest.raises(ConfigError, match=r"cannot read the speeds in .*Check the path"):
        Speeds.parse(f"file:{tmp_path / 'none.txt'}")


@given(pace=speeds, agent=st.integers(0, 9), at=st.floats(0, 1e6), round=st.integers(1, 99))
def test_a_step_takes_its_own_seconds_times_the_last_change_and_noise(
    pace: Speeds, agent: int, at: float, round: int
) -> None:
    seconds = pace.step(agent, round, at=at, seed=3)
    assert seconds == pace.step(agent, round, at=at, seed=3)
    own = pace.step_seconds[agent % len(pace.step_seconds)]
    # of equal times the part that stands last
    past = sorted(
        (change.time, place, change.factor)
        for place, change in enumerate(pace.changes)
        if change.agent == agent and change.time <= at
    )
    expected = own * (past[-1][2] if past else 1.0)
    assert expected * (1 - pace.noise) <= seconds <= expected * (1 + pace.noise)
    if not pace.noise:
        assert seconds == expected


def test_noise_is_another_in_every_round_and_run_and_for_every_agent() -> None:
    pace = Speeds(noise=0.5)
    drawn = {
        pace.step(agent, round, at=0.0, seed=seed)
        for agent in range(3)
        for round in range(1, 4)
        for seed in range(3)
    }
    assert len(drawn) == 27


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"got '' in ''\. Write them as \"1, 1, 5; 3@100=2"),
        ("fast", "got 'fast' in 'fast'"),
        ("1, 0", r"finite numbers > 0; got \(1\.0, 0\.0\)"),
        ("1, inf", "finite numbers > 0"),
        ("1; 3@-1=2", r"a time >= 0 and a factor > 0; got '3@-1=2'"),
        ("1; 3@1=0", r"a factor > 0; got '3@1=0'"),
        ("1; 3=2", "got '3=2' in '1; 3=2'"),
        ("1; x@1=2", "got 'x@1=2'"),
        ("1; noise=1", r"noise of speeds must be in \[0, 1\); got 1\.0"),
        ("1; noise=.1; noise=.2", "each of the last two once; got 'noise=.2'"),
        ("1; latency=-1", "latency of speeds must be >= 0 seconds; got -1"),
        ("1; latency=soon", "got 'soon'"),
    ],
)
def test_specs_that_are_none(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speeds.parse(spec)


def test_a_round_takes_its_local_steps_and_two_messages() -> None:
    fleet = make_fleet(3, local_steps=4)
    times = VirtualTimes(fleet, Speeds.parse("2, 3; 1@10=5; latency=0.25"), None)
    assert [times(agent, 1, 0.0) for agent in range(3)] == [8.5, 12.5, 8.5]
    assert times(1, 2, 10.0) == 60.5
    epochs = VirtualTimes(make_fleet(1, local_epochs=2), Speeds(), None)
    assert epochs(0, 1, 0.0) == 6.0  # two passes over 24 examples in batches of 8


def test_a_change_is_of_an_agent_of_the_fleet() -> None:
    with pytest.raises(ConfigError, match=r"one of the agents 0\.\.2; got '3@1=2'"):
        VirtualTimes(make_fleet(3), Speeds.parse("1; 3@1=2"), None)
