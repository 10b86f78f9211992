"""Levels from measured steps: hysteresis, one level at a time, traces of speed."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import StateError
from flower_mcepl.agents.parts.pace import (
    LEVELS,
    REASONS,
    SETTLED,
    STRAINS,
    WINDOW,
    Pace,
    check_decision,
    decision_metrics,
    decision_of,
    first_pace,
    interpolated,
    next_pace,
)

COSTS = (0.3, 0.4, 0.5, 0.75, 1.0)
TOP = len(LEVELS) - 1
positive = st.floats(1e-3, 1e3)


def played(
    steps: list[float], *, budget: float, first: float = 1.0
) -> tuple[list[int], list[float]]:
    """Levels of rounds, and what each took, where a whole step takes ``steps``."""
    pace = first_pace(first, COSTS, budget=budget)
    levels, spent = [], []
    for full in steps:
        levels.append(pace.level)
        spent.append(full * COSTS[pace.level])
        pace = next_pace(pace, spent[-1], COSTS, budget=budget)
    return levels, spent


def noisy(steps: list[float], *, seed: int) -> list[float]:
    """Steps with 20 % of noise."""
    draw = random.Random(seed)
    return [full * draw.uniform(0.8, 1.2) for full in steps]


def test_the_first_level_is_the_largest_that_fits() -> None:
    budgets = [0.1, 0.3, 0.45, 0.5, 0.9, 1.0, 7.0]
    levels = [first_pace(1.0, COSTS, budget=b).level for b in budgets]
    assert levels == [0, 0, 1, 2, 3, 4, 4]


@given(
    start=st.integers(0, TOP),
    steps=st.lists(st.tuples(positive, st.sampled_from(["", "", *STRAINS])), max_size=60),
    budget=positive,
)
def test_one_level_at_a_time_within_the_levels(
    start: int, steps: list[tuple[float, str]], budget: float
) -> None:
    pace = Pace(start)
    for spent, strain in steps:
        after = next_pace(pace, spent, COSTS, budget=budget, strain=strain)
        assert abs(after.level - pace.level) <= 1
        assert 0 <= after.level <= TOP
        assert len(after.window) <= WINDOW
        assert after.since == (0 if after.level != pace.level else pace.since + 1)
        assert after.reason == "hold" or after.level != pace.level
        pace = after


@given(start=st.integers(1, TOP), spent=positive, over=st.floats(1.001, 100))
def test_a_late_step_lowers_the_level_at_once(start: int, spent: float, over: float) -> None:
    after = next_pace(Pace(start), spent * over, COSTS, budget=spent)
    assert (after.level, after.reason) == (start - 1, "late")


@given(start=st.integers(0, TOP), steps=st.lists(positive, min_size=1, max_size=50))
def test_a_level_is_raised_only_after_it_has_settled_and_with_room(
    start: int, steps: list[float]
) -> None:
    pace, budget = Pace(start), 10.0
    for spent in steps:
        after = next_pace(pace, spent, COSTS, budget=budget)
        if after.level > pace.level:
            assert pace.since + 1 >= SETTLED
            assert max(after.window) * COSTS[after.level] * 1.1 <= budget
        pace = after


@given(full=positive, share=st.floats(0.3001, 3.0), rounds=st.integers(1, 60))
def test_without_noise_the_level_never_changes(full: float, share: float, rounds: int) -> None:
    """The first one is the largest that fits."""
    budget = share * full
    levels, _ = played([full] * rounds, budget=budget, first=full)
    assert set(levels) == {levels[0]}


@given(seed=st.integers(0, 10**6), budget=st.floats(0.35, 1.4))
def test_noise_of_a_fifth_costs_few_moves_and_few_late_steps(seed: int, budget: float) -> None:
    """In 200 rounds: no level is taken up and down again and again."""
    levels, spent = played(noisy([1.0] * 200, seed=seed), budget=budget)
    moves = sum(a != b for a, b in pairwise(levels))
    late = sum(s > budget for s in spent)
    assert moves <= 16
    if budget >= 1.2 * COSTS[0]:  # else the lowest level is late itself
        assert late <= 10


@given(seed=st.integers(0, 10**6), budget=st.floats(1.1, 1.6), factor=st.floats(1.5, 3.0))
def test_a_slower_device_settles_within_ten_rounds(seed: int, budget: float, factor: float) -> None:
    """Three times slower from round 30 on; at most one level lower than it must be."""
    steps = noisy([1.0] * 30 + [factor] * 70, seed=seed)
    levels, spent = played(steps, budget=budget)
    due = max((i for i, c in enumerate(COSTS) if factor * c * 1.2 <= budget), default=0)
    most = max((i for i, c in enumerate(COSTS) if factor * c <= budget), default=0)
    assert all(due - 1 <= level <= most for level in levels[40:])
    if factor * COSTS[0] * 1.2 <= budget:
        assert sum(s > budget for s in spent) <= 8  # four of them on the way down


def test_a_device_that_is_fast_again_climbs_back() -> None:
    levels, _ = played([1.0] * 10 + [3.0] * 20 + [1.0] * 40, budget=1.15)
    assert levels[:11] == [4] * 11
    assert levels[11:15] == [3, 2, 1, 0]
    assert levels[-1] == 4
    up = levels.index(2, 20)
    assert 30 + WINDOW <= up <= 30 + WINDOW + SETTLED


@given(level=st.integers(0, TOP), strain=st.sampled_from(STRAINS))
def test_a_strain_lowers_the_level_step_by_step(level: int, strain: str) -> None:
    pace, seen = Pace(level), []
    for _ in range(SETTLED * (TOP + 1)):
        pace = next_pace(pace, 0.01, COSTS, budget=1.0, strain=strain)
        seen.append(pace.level)
    assert seen[: SETTLED - 1] == [level] * (SETTLED - 1)
    assert seen[-1] == 0
    assert seen == sorted(seen, reverse=True)


def test_costs_lie_between_what_was_measured() -> None:
    assert interpolated({0.25: 1.0, 0.5: 2.0, 1.0: 4.0}) == (0.25, 0.375, 0.5, 0.75, 1.0)
    assert interpolated({0.25: 2.5, 0.5: 2.0, 1.0: 4.0})[:3] == (0.5, 0.5, 0.5)
    assert interpolated({0.5: 1.0, 1.0: 2.0})[:3] == (0.5, 0.5, 0.5)


@given(measured=st.dictionaries(st.sampled_from(LEVELS[:-1]), positive), whole=positive)
def test_costs_rise_with_the_level(measured: dict[float, float], whole: float) -> None:
    costs = interpolated({**measured, 1.0: whole})
    assert list(costs) == sorted(costs)
    assert costs[-1] == 1
    assert costs[0] > 0


@given(
    level=st.integers(0, TOP),
    window=st.lists(positive, max_size=WINDOW),
    since=st.integers(0, 99),
    reason=st.sampled_from(REASONS),
)
def test_facts_give_the_pace_again(
    level: int, window: list[float], since: int, reason: str
) -> None:
    pace = Pace(level, tuple(window), since, reason)
    assert Pace.from_facts(json.loads(json.dumps(pace.facts()))) == pace


BAD = [
    None,
    {},
    {"level": 5, "window": [], "since": 0, "reason": "hold"},
    {"level": True, "window": [], "since": 0, "reason": "hold"},
    {"level": 1, "window": [-1.0], "since": 0, "reason": "hold"},
    {"level": 1, "window": [float("nan")], "since": 0, "reason": "hold"},
    {"level": 1, "window": [], "since": -1, "reason": "hold"},
    {"level": 1, "window": [], "since": 0, "reason": "because"},
]


@pytest.mark.parametrize("facts", BAD)
def test_other_facts_are_refused(facts: object) -> None:
    with pytest.raises(StateError, match="the saved pace of a device"):
        Pace.from_facts(facts)


@given(level=st.integers(0, TOP), reason=st.sampled_from(REASONS), spent=st.none() | positive)
def test_a_decision_travels_in_metrics(level: int, reason: str, spent: float | None) -> None:
    metrics = decision_metrics(Pace(level, reason=reason), spent)
    assert check_decision(metrics) is None
    assert decision_of(metrics) == {"share": LEVELS[level], "spent": spent, "reason": reason}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"train-filters": 0.3}, r"train-filters must be one of 0\.25"),
        ({"train-filters-reason": 0.5}, r"train-filters-reason must be a whole number in 0\.\.7"),
        ({"train-filters-reason": 8.0}, "train-filters-reason"),
        ({"train-filters-step": 0.0}, "train-filters-step must be > 0"),
        ({"train-filters-step": -1.0}, "train-filters-step must be > 0"),
    ],
)
def test_a_decision_that_cannot_be_is_no_decision(changes: dict[str, float], rule: str) -> None:
    metrics = decision_metrics(Pace(2), 1.0) | changes
    broken = check_decision(metrics)
    assert broken is not None
    assert rule.replace("\\", "") in broken[0]
    assert decision_of(metrics) is None


def test_metrics_without_a_decision_tell_none() -> None:
    assert check_decision({"train-loss": 1.0}) is None
    assert decision_of({"train-loss": 1.0}) is None
    assert check_decision({"train-filters-step": 1.0}) is not None
