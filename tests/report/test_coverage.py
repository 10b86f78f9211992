"""Of how many agents, and of which round, a mean is: nowhere is it taken for all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import Topology, simulate
from flower_mcepl.cli.run import _reached
from flower_mcepl.record.figures import bytes_by_round, bytes_to, full_curve
from flower_mcepl.record.metric import metric_summary
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.compare import compare
from flower_mcepl.report.overview import mean_label, plot_run
from flower_mcepl.report.plots.curves import curve_of, final_values
from flower_mcepl.report.plots.subjects import subjects_of
from flower_mcepl.report.table import agent_table, headline
from flower_mcepl.report.tables import cells, footnotes, titles, write_csv
from tests.oracles.baselines import fleet_of, server_of

Rounds = Mapping[int, Sequence[int]]  # agents that were evaluated, by round


def survivors(path: Path, rounds: Rounds, *, num_agents: int = 4, seed: int = 1) -> Run:
    """Record of a run: agent i has accuracy i / 10 + round / 100."""
    config = {"topology": {"num_agents": num_agents}, "run_config": {"seed": seed}}
    record = RunRecord.create(name="invented", config=config, path=path)
    rows = []
    for round, agents in rounds.items():
        for agent in agents:
            rows.append(row(agent, round))
        record.log_agents(rows[-len(agents) :])
    record.finish("finished", num_rounds=max(rounds), accuracy=metric_summary(rows), bytes={})
    return read_run(path)


def row(agent: int, round: int) -> dict[str, Any]:
    counters = dict.fromkeys(("sent_bytes", "received_bytes", "uplink_bytes", "seconds"), round)
    return {
        "round": round,
        "agent": agent,
        "accuracy": agent / 10 + round / 100,
        "loss": 0.5,
        "num_examples": 10,
        "density": 0.3,
        **counters,
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Agent 3, the best, left after round 3 of 30, agent 0 after round 20."""
    rounds = {3: [0, 1, 2, 3], 20: [0, 1, 2], 30: [1, 2]}
    return survivors(tmp_path / "run", rounds)


def test_an_agent_gone_since_round_3_is_not_in_the_mean_after_round_30(run: Run) -> None:
    assert run.accuracy() == {
        "mean": pytest.approx(0.45),
        "std": pytest.approx(0.05),
        "worst": pytest.approx(0.4),
        "worst_agent": 1,
        "best": pytest.approx(0.5),
        "best_agent": 2,
        "round": 30,
        "agents": 2,
    }
    assert final_values(run) == {1: pytest.approx(0.4), 2: pytest.approx(0.5)}


def test_headline_and_table_say_of_how_many(run: Run) -> None:
    assert headline(run) == (
        "invented: finished, 4 agents, 30 rounds; accuracy of 2 of 4 agents after round 30"
    )
    table = agent_table(run)
    assert "0.4500 ± 0.0500 (mean ± sd over 2 of 4 agents, round 30)" in table
    assert "and not in the mean: agent 0 (round 20), 3 (round 3)" in table
    assert _reached(run).startswith("accuracy 0.4500 of 2 of 4 agents, ")


def test_an_agent_that_was_never_evaluated_is_named(tmp_path: Path) -> None:
    run = survivors(tmp_path / "run", {5: [0, 1, 2]})
    assert "never evaluated: agent 3" in agent_table(run)
    assert headline(run).endswith("4 agents, 5 rounds; accuracy of 3 of 4 agents after round 5")


def test_where_all_are_there_nothing_is_said(tmp_path: Path) -> None:
    run = survivors(tmp_path / "run", {3: range(4), 5: range(4)})
    assert headline(run) == "invented: finished, 4 agents, 5 rounds"
    assert "mean ± sd over 4 agents, round 5" in agent_table(run)
    assert mean_label(run) == "mean, at the end 0.200"
    assert "agents" not in titles(compare([run]))
    assert curve_of(subjects_of([run])[0][0], alone=True).label.count("part of") == 0


def test_a_comparison_has_a_column_where_some_are_missing(run: Run, tmp_path: Path) -> None:
    comparison = compare([run])
    (line,) = cells(comparison)
    assert dict(zip(titles(comparison), line, strict=True))["agents"] == "2 of 4"
    assert any(note.startswith("agents: of how many agents") for note in footnotes(comparison))
    write_csv(comparison, tmp_path / "t.csv")
    names, values = ((tmp_path / "t.csv").read_text().splitlines())[:2]
    table = dict(zip(names.split(","), values.split(","), strict=True))
    assert (table["agents"], table["num_agents"]) == ("2", "4")


def test_a_pictures_line_says_of_how_many_agents_it_is(run: Run) -> None:
    assert mean_label(run) == (
        "mean of 2 of 4 agents after round 30: 0.450 (of 2 to 3 agents in 2 of 3 rounds)"
    )
    label = curve_of(subjects_of([run])[0][0], alone=True).label
    assert label.endswith("(in part of 2 of 4 agents)")


@pytest.mark.pictures
def test_the_overview_of_survivors_is_drawn(run: Run, tmp_path: Path) -> None:
    assert plot_run(run, tmp_path / "x.png").stat().st_size > 10_000


def test_best_and_target_leave_out_rounds_of_fewer_agents(tmp_path: Path) -> None:
    """In round 4 the best agent alone was evaluated: that is no mean of all."""
    run = survivors(tmp_path / "run", {3: range(4), 4: [3], 5: range(4)})
    assert [round for round, _ in full_curve(run)] == [3, 5]
    assert bytes_to(run, 0.3) is None
    assert compare([run]).rows[0].best() == (5, pytest.approx(0.2))


def test_who_is_not_evaluated_has_moved_bytes_all_the_same(run: Run) -> None:
    """Without the relay's lines: what each agent said last."""
    assert bytes_by_round(run) == {3: 4 * 3, 20: 3 * 20 + 3, 30: 2 * 30 + 20 + 3}


@pytest.mark.parametrize("algorithm", ["mcepl", "fedavg"])
def test_bytes_by_round_are_those_of_all_agents(algorithm: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"num_rounds": 4}
    agents = fleet_of(algorithm, 3, **keys)
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    others: dict[str, Any] = (
        {"server": server_of(algorithm, 3, **keys)}
        if algorithm == "fedavg"
        else {"topology": Topology.complete(3)}
    )
    simulate(agents, num_rounds=4, evaluate_every=1, record=record, **others)
    due = bytes_by_round(read_run(record.path))
    lines = (record.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    whole = {
        t: sum(
            row["received_bytes"] + (row["uplink_bytes"] if algorithm == "fedavg" else 0)
            for row in map(json.loads, lines)
            if row["round"] == t
        )
        for t in range(1, 5)
    }
    assert due == whole
    kept = [line for line in lines if json.loads(line)["agent"] != 1]  # it cannot evaluate
    (record.path / "rounds.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert bytes_by_round(read_run(record.path)) == due


def test_a_loss_without_an_accuracy_is_what_the_run_is_judged_by(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    record.log_agents([row(i, 2) | {"accuracy": None, "metrics": {}} for i in range(3)])
    assert "personalized loss 0.5000 ± 0.0000 (mean ± sd over 3 agents, round 2, lower is" in (
        agent_table(read_run(record.path))
    )
