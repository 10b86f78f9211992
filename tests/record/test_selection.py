"""What is chosen by the main metric: the best round, and when it was long ago."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.record.metric import ACCURACY, MainMetric, metric_summary
from flower_mcepl.record.selection import best_columns, best_states, find_stall

RMSE = MainMetric("rmse", higher_is_better=False, unit="")
# few values, so that there are ties; none, and what is no number
values = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, None, math.nan, math.inf])
histories = st.lists(st.dictionaries(st.integers(0, 3), values, max_size=4), max_size=8)


def rows_of(history: list[dict[int, Any]], name: str) -> list[dict[str, Any]]:
    return [
        {
            "round": 10 * place,
            "agent": agent,
            "loss": None,
            **({name: value} if name == "accuracy" else {"metrics": {name: value}}),
        }
        for place, answers in enumerate(history, start=1)
        for agent, value in answers.items()
    ]


def slow_means(history: list[dict[int, Any]]) -> list[tuple[int, float]]:
    """Round and mean over those who answered, where anybody did with a number."""
    means = []
    for place, answers in enumerate(history, start=1):
        known = [v for v in answers.values() if v is not None and math.isfinite(v)]
        if known:
            means.append((10 * place, sum(known) / len(known)))
    return means


def slow_stop(history: list[dict[int, Any]], metric: MainMetric, patience: int) -> bool:
    """Whether none of the last means is better than all before them."""
    means = [mean if metric.higher_is_better else -mean for _, mean in slow_means(history)]
    before, last = means[:-patience], means[-patience:]
    return bool(before) and all(mean <= max(before) for mean in last)


@given(history=histories, patience=st.integers(1, 4), metric=st.sampled_from([ACCURACY, RMSE]))
def test_a_run_stalls_when_the_last_means_are_no_better_than_all_before(
    history: list[dict[int, Any]], patience: int, metric: MainMetric
) -> None:
    stall = find_stall(rows_of(history, metric.name), metric)
    assert (stall is not None and stall.evaluations >= patience) == slow_stop(
        history, metric, patience
    )


@given(history=histories, metric=st.sampled_from([ACCURACY, RMSE]))
def test_of_equal_means_the_earliest_is_the_best(
    history: list[dict[int, Any]], metric: MainMetric
) -> None:
    stall, means = find_stall(rows_of(history, metric.name), metric), slow_means(history)
    if not means:
        assert stall is None
        return
    assert stall is not None
    best = (max if metric.higher_is_better else min)(mean for _, mean in means)
    assert stall.best == best
    assert stall.best_round == next(round for round, mean in means if mean == best)


@given(history=histories, metric=st.sampled_from([ACCURACY, RMSE]), data=st.data())
def test_the_order_of_the_lines_does_not_count(
    history: list[dict[int, Any]], metric: MainMetric, data: st.DataObject
) -> None:
    """Late answers stand behind those of later rounds."""
    rows = rows_of(history, metric.name)
    assert find_stall(data.draw(st.permutations(rows)), metric) == find_stall(rows, metric)


@given(history=histories, metric=st.sampled_from([ACCURACY, RMSE]))
def test_the_means_are_those_of_the_record(
    history: list[dict[int, Any]], metric: MainMetric
) -> None:
    """To the bit: what the summary says of a stop stands in the run's curve, too."""
    rows = rows_of(history, metric.name)
    stall = find_stall(rows, metric)
    if stall is not None:
        of_round = [row for row in rows if row["round"] == stall.best_round]
        assert metric_summary(of_round, metric)["mean"] == stall.best


def test_the_best_states_are_those_that_the_agents_told_last() -> None:
    told = {"keep-best-round": 4.0, "keep-best-value": 0.5}
    rows = [
        {"round": 4, "agent": 1, **best_columns(told)},
        {"round": 6, "agent": 0, **best_columns({**told, "keep-best-round": 6.0})},
        {"round": 6, "agent": 1, **best_columns(told)},
        {"round": 6, "agent": 2, **best_columns({"accuracy": 0.5})},
    ]
    assert best_states(rows) == [
        {"agent": 0, "round": 6, "value": 0.5},
        {"agent": 1, "round": 4, "value": 0.5},
    ]
