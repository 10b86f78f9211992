"""Run records as TensorBoard scalars, read back with TensorBoard's own reader."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flower_mcepl import ConfigError, Topology, simulate
from flower_mcepl.cli import app
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.tensorboard import ScalarWriter
from tests.fleet.agents import make_fleet

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = RunRecord.create(tmp_path_factory.mktemp("runs"), name="ring", config={})
    simulate(make_fleet(3), Topology.ring(3), num_rounds=4, evaluate_every=2, record=record)
    return record.path


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_every_number_is_that_of_the_record(record: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["tensorboard", str(record), "--out", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    written, run = scalars(tmp_path / record.name), read_run(record)
    assert set(written) == {
        *(f"accuracy/{name}" for name in ("mean", "std", "worst", "best")),
        *("loss/mean", "agents/0", "agents/1", "agents/2", "bytes/links", "bytes/uplinks"),
    }
    for round, mean, std, worst, best in run.curve():
        for name, value in (("mean", mean), ("std", std), ("worst", worst), ("best", best)):
            assert written[f"accuracy/{name}"][round] == pytest.approx(value, abs=1e-6)
    for row in run.rounds:
        assert written[f"agents/{row['agent']}"][row["round"]] == pytest.approx(row["accuracy"])
    assert written["bytes/links"] == {row["round"]: row["link_bytes"] for row in run.relay}


def test_a_run_that_goes_on_is_followed_without_saying_anything_twice(
    record: Path, tmp_path: Path
) -> None:
    growing = tmp_path / "growing"
    growing.mkdir()
    (growing / "config.json").write_text((record / "config.json").read_text())
    lines = {
        name: (record / name).read_text().splitlines(keepends=True)
        for name in ("rounds.jsonl", "relay.jsonl")
    }
    # round 2, and one agent of round 4
    (growing / "rounds.jsonl").write_text("".join(lines["rounds.jsonl"][:4]))
    (growing / "relay.jsonl").write_text("".join(lines["relay.jsonl"][:3]))
    writer = ScalarWriter(growing, tmp_path / "events")
    assert writer.update().summary is None
    writer.update()
    assert list(scalars(tmp_path / "events")["accuracy/mean"]) == [2]  # round 4 is not complete
    for name, all_lines in lines.items():
        (growing / name).write_text("".join(all_lines))
    (growing / "summary.json").write_text(json.dumps({"status": "finished"}))
    assert writer.update().summary is not None
    writer.close()
    CliRunner().invoke(
        app, ["tensorboard", str(record), "--out", str(tmp_path)], catch_exceptions=False
    )
    assert scalars(tmp_path / "events") == scalars(tmp_path / record.name)


def test_rounds_that_come_again_after_a_kill_are_written_once(record: Path, tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    shutil.copytree(record, growing, ignore=shutil.ignore_patterns("summary.json", "agents"))
    whole = (record / "relay.jsonl").read_text().splitlines(keepends=True)
    writer = ScalarWriter(growing, tmp_path / "events")
    for lines in (4, 2, len(whole)):  # it is resumed from its checkpoint of round 2
        (growing / "relay.jsonl").write_text("".join(whole[:lines]))
        writer.update()
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("bytes/links")] == [1, 2, 3, 4, 5]


def agent_line(agent: int, round: int, accuracy: float) -> dict[str, Any]:
    counts = {"sent_bytes": 0, "received_bytes": 0, "uplink_bytes": 0, "seconds": 99.0}
    scores = {"accuracy": accuracy, "loss": 1.0, "num_examples": 4, "density": 0.5}
    return {"round": round, "agent": agent, **scores, **counts}


def relay_line(round: int) -> dict[str, Any]:
    counts = {"failed": {}, "missing": [], "link_bytes": 0, "uplink_bytes": 0}
    return {"round": round, "answered": 2, "agents": 2, **counts, "seconds": 10.0 * round}


def test_an_evaluation_that_comes_late_is_in_the_means(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "late")
    writer = ScalarWriter(record.path, tmp_path / "events")
    record.log_round(relay_line(1))
    record.log_agents([agent_line(0, 1, 0.5)])
    record.log_round(relay_line(2))
    writer.update()
    assert scalars(tmp_path / "events")["accuracy/mean"] == {1: 0.5}
    record.log_agents([agent_line(0, 2, 0.5), agent_line(1, 1, 1.0)])
    record.log_round(relay_line(3))
    writer.update()
    writer.close()
    written = scalars(tmp_path / "events")
    assert written["accuracy/mean"] == {1: 0.75, 2: 0.5}
    assert written["agents/1"] == {1: 1.0}


def test_slow_agents_of_a_run_without_a_barrier_are_waited_for(tmp_path: Path) -> None:
    """Its rounds end by themselves, some of them long after others have begun."""
    record = RunRecord.create(name="x", config={}, path=tmp_path / "async")
    writer = ScalarWriter(record.path, tmp_path / "events")
    record.log_agents([agent_line(0, round, 0.5) for round in (1, 2, 3)])
    record.log_round(relay_line(1))
    writer.update()
    assert "accuracy/mean" not in scalars(tmp_path / "events")
    record.log_agents([agent_line(1, 1, 1.0)])
    record.log_round(relay_line(2))
    writer.update()
    writer.close()
    assert scalars(tmp_path / "events")["accuracy/mean"] == {1: 0.75}


def test_an_evaluation_stands_at_its_time_since_the_start(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "timed")
    record.log_round(relay_line(1))
    record.log_agents([agent_line(0, 1, 0.5)])  # whose own seconds are of its computing
    record.log_round(relay_line(2))
    writer = ScalarWriter(record.path, tmp_path / "events")
    writer.update()
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    begin = datetime.fromisoformat(read_run(record.path).started).timestamp()
    for tag in ("accuracy/mean", "loss/mean", "agents/0"):
        assert [event.wall_time - begin for event in events.Scalars(tag)] == [20.0], tag
    assert [event.wall_time - begin for event in events.Scalars("bytes/links")] == [10.0, 20.0]


def test_writing_again_replaces_what_was_written(record: Path, tmp_path: Path) -> None:
    for _ in range(2):
        writer = ScalarWriter(record, tmp_path)
        writer.update()
        writer.close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_records_of_one_name_get_folders_of_their_own(record: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / record.name).parent.mkdir()
        (tmp_path / parent / record.name).symlink_to(record)
    command = ["tensorboard", *(str(tmp_path / parent / record.name) for parent in ("a", "b"))]
    CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == [
        f"{p}-{record.name}" for p in ("a", "b")
    ]


def test_without_tensorboard_it_says_what_to_install(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install "flower-mcepl\[tensorboard\]"'):
        ScalarWriter(record, tmp_path)


def test_records_of_one_name_have_folders_of_their_own(record: Path, tmp_path: Path) -> None:
    places = ["e1/runs/ring", "e2/runs/ring", "e2/runs/path", "x/e1/runs/ring"]
    folders = [Path(shutil.copytree(record, tmp_path / place)) for place in places]
    for number, folder in enumerate(folders):
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "accuracy": number / 10}) for row in rows]
        (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    command = ["tensorboard", *map(str, folders), "--out", str(out)]
    CliRunner().invoke(app, command, catch_exceptions=False)
    written = sorted(path for path in out.iterdir())
    assert len(written) == len(places)
    values = [value for path in written for value in scalars(path)["accuracy/mean"].values()]
    assert sorted({round(value, 3) for value in values}) == [0.0, 0.1, 0.2, 0.3]
    assert (out / "path").is_dir()
    assert len(values) == 2 * len(places)


@pytest.mark.parametrize(
    "places", [("ring", "ring"), ("e/runs/ring", "x-e/runs/ring", "x/e-runs/ring")]
)
def test_records_that_no_name_tells_apart_are_refused(
    places: tuple[str, ...], record: Path, tmp_path: Path
) -> None:
    folders = [str(tmp_path / place) for place in places]
    for folder in {*folders}:
        shutil.copytree(record, folder)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"ring would be that of .*ring and .*ring\. Name each"):
        CliRunner().invoke(
            app, ["tensorboard", *folders, "--out", str(out)], catch_exceptions=False
        )
    assert not out.exists()
