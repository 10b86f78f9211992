"""Main metric: its direction decides what is worst, best and reached."""

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import (
    AgentData,
    ConfigError,
    RunRecord,
    Topology,
    read_run,
    shared_module,
    simulate,
)
from flower_mcepl.agents import make_agent
from flower_mcepl.record import MainMetric, metric_summary
from flower_mcepl.record.figures import one_metric, worst_tenth
from flower_mcepl.record.metric import ACCURACY, LOSS
from flower_mcepl.report.compare import compare
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.plots.gallery import draw_gallery
from flower_mcepl.report.table import agent_table
from flower_mcepl.report.tables import footnotes, titles
from tests.agents.test_tasks import KINDS

RMSE = MainMetric("rmse", higher_is_better=False, unit="")


def rows(values: dict[int, float], *, round: int = 3) -> list[dict[str, Any]]:
    return [
        {"round": round, "agent": agent, "accuracy": None, "loss": 9.0, "metrics": {"rmse": value}}
        for agent, value in values.items()
    ]


@given(st.dictionaries(st.integers(0, 30), st.floats(0, 100), min_size=1))
def test_the_worst_of_a_falling_metric_is_the_largest(values: dict[int, float]) -> None:
    s = metric_summary(rows(values), RMSE)
    assert s["mean"] == statistics.fmean(values.values())
    assert s["worst"] == max(values.values())
    assert s["best"] == min(values.values())
    assert s["worst_agent"] == min(a for a, value in values.items() if value == s["worst"])
    assert s["agents"] == len(values)
    assert metric_summary(rows(values)) == dict.fromkeys(s)
    tenth = sorted(values.values(), reverse=True)[: -(-len(values) // 10)]
    assert worst_tenth(values.values(), RMSE) == statistics.fmean(tenth)


def test_a_target_is_reached_from_the_metrics_side() -> None:
    assert ACCURACY.reaches(0.9, 0.8)
    assert not ACCURACY.reaches(0.7, 0.8)
    assert RMSE.reaches(0.7, 0.8)
    assert not RMSE.reaches(0.9, 0.8)


def test_the_metric_of_a_run_is_what_its_agents_tell() -> None:
    told = [{"agent": 0}, {"main_metric": "rmse", "higher_is_better": False}]
    assert MainMetric.of(told, []) == RMSE
    assert MainMetric.of([{"agent": 0}], []) == ACCURACY
    assert MainMetric.of([], rows({0: 1.0})) == LOSS
    assert MainMetric.of([], [*rows({0: 1.0}), {"accuracy": 0.5}]) == ACCURACY


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """The record of a run that learned numbers."""
    build, inputs, targets = KINDS["regression"]
    agents = [
        make_agent(
            "mcepl",
            i,
            shared_module(build, seed=1),
            AgentData.of((inputs, targets), (inputs[i:], targets[i:]), agent=i),
            {"task": "regression", "score-lr": 0.03, "finetune-lr": 0.03},
            seed=1,
        )
        for i in range(3)
    ]
    folder = tmp_path_factory.mktemp("regression")
    record = RunRecord.create(name="numbers", config={"seed": 1}, path=folder / "run")
    lines: list[str] = []
    result = simulate(
        agents, Topology.ring(3), num_rounds=4, evaluate_every=2, record=record, log=lines.append
    )
    assert result.result == result.summary["result"]["mean"]
    assert result.result != result.personalized_accuracy
    assert any("rmse after round 4" in line for line in lines)
    assert not any("accuracy" in line for line in lines)
    return record


def test_a_record_keeps_all_metrics_and_says_which_is_the_main_one(regression: RunRecord) -> None:
    run = read_run(regression.path)
    assert run.metric == RMSE
    assert all(row["metrics"].keys() == {"rmse", "mae", "r2"} for row in run.rounds)
    assert all(row["accuracy"] is None for row in run.rounds)
    assert run.summary is not None
    assert run.summary["metric"] == {"name": "rmse", "higher_is_better": False, "unit": ""}
    last = [row["metrics"]["rmse"] for row in run.rounds if row["round"] == 4]
    assert run.result()["mean"] == statistics.fmean(last)
    assert run.result()["worst"] == max(last)
    assert run.accuracy()["mean"] is None
    assert [round for round, *_ in run.curve()] == [2, 4]


def test_tables_and_pictures_speak_of_it(regression: RunRecord) -> None:
    run = read_run(regression.path)
    table = agent_table(run)
    assert "personalized rmse" in table
    assert "lower is better" in table
    assert "mae" in table
    assert "accuracy" not in table
    assert "examples" in table
    comparison = compare([run], target=0.1)
    assert "rmse" in titles(comparison)
    assert "the best mean rmse (lower is better)" in " ".join(footnotes(comparison))
    best = comparison.rows[0].best()
    assert best is not None
    assert best[1] == min(mean for _, mean, *_ in run.curve())
    gallery = draw_gallery([run])
    assert {"rmse-rounds.png", "rmse-bytes.png"} <= {picture.file for picture in gallery.pictures}
    assert plot_run(run).is_file()


def test_runs_of_two_metrics_are_not_put_side_by_side(regression: RunRecord, tmp_path) -> None:  # type: ignore[no-untyped-def]
    other = RunRecord.create(name="other", config={"seed": 2}, path=tmp_path / "other")
    other.finish("finished")
    with pytest.raises(ConfigError, match=r"must have one main metric; got rmse .* and accuracy"):
        one_metric([read_run(regression.path), read_run(other.path)])
