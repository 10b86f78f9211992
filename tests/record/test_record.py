import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.exchange.ledger import TRAFFIC_COLUMNS
from flower_mcepl.record.layout import AGENT_KEYS, RELAY_KEYS, STATUSES, TRAFFIC_KEYS
from flower_mcepl.record.metric import metric_summary
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord


def agent_row(agent: int, round: int, accuracy: float = 0.5, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(AGENT_KEYS, 0)
    return row | {"agent": agent, "round": round, "accuracy": accuracy, "loss": 1.25} | more


def relay_row(round: int) -> dict[str, Any]:
    return dict.fromkeys(RELAY_KEYS, 0) | {
        "round": round,
        "failed": {3: "out of memory"},
        "missing": [2],
    }


def traffic_row(round: int) -> dict[str, Any]:
    return {"round": round, "links": [[0, 1, 2, 1, 90, 20]], "uplinks": [[0, 1, 0, 30, 10]]}


LINK = {"sender": 0, "receiver": 1}


def three_rounds(path: Path) -> RunRecord:
    record = RunRecord.create(name="ring", config={"seed": 7}, path=path)
    for number in (1, 2, 3):
        record.log_agents(
            agent_row(agent, number, accuracy=number / 10 + agent / 100) for agent in (0, 1)
        )
        record.log_round(relay_row(number))
        record.log_traffic(traffic_row(number))
    return record


def test_a_finished_run_reads_back_as_written(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    assert not record.agents_dir.exists()
    record.agents_dir.mkdir()
    (record.agents_dir / "agent-0001.safetensors").write_bytes(b"")
    record.finish(
        "finished", num_rounds=3, links=[{"sender": 0, "receiver": 1, "frames": 3, "bytes": 9}]
    )

    run = read_run(tmp_path / "run")

    assert run.path == record.path == (tmp_path / "run").absolute()
    assert (run.name, run.config["seed"]) == ("ring", 7)
    assert run.config["versions"].keys() >= {"python", "platform", "torch", "numpy", "flower_mcepl"}
    assert run.config["started"].endswith("+00:00")
    assert len(run.rounds) == 6
    assert run.rounds[0] == agent_row(0, 1, accuracy=0.1)
    assert run.relay[2] == relay_row(3) | {"failed": {"3": "out of memory"}}
    assert run.summary is not None
    assert (run.summary["status"], run.summary["num_rounds"]) == ("finished", 3)
    assert run.summary["links"] == [{"sender": 0, "receiver": 1, "frames": 3, "bytes": 9}]
    assert run.summary["seconds"] >= 0
    assert run.agents == {1: record.path / "agents" / "agent-0001.safetensors"}
    assert not run.truncated
    assert not list(record.path.glob("*.tmp"))


def test_final_and_curve(tmp_path: Path) -> None:
    run = read_run(three_rounds(tmp_path / "run").path)
    assert {agent: row["round"] for agent, row in run.final().items()} == {0: 3, 1: 3}
    assert [point[0] for point in run.curve()] == [1, 2, 3]
    assert run.curve()[2][1:] == pytest.approx((0.305, 0.005, 0.30, 0.31))


def test_a_run_without_lines_reads(tmp_path: Path) -> None:
    run = read_run(RunRecord.create(name="x", config={}, path=tmp_path / "run").path)
    assert (run.rounds, run.relay, run.summary, run.agents, run.curve()) == ([], [], None, {}, [])


def test_a_record_that_says_nothing_has_empty_parts(tmp_path: Path) -> None:
    path = RunRecord.create(name="x", config={}, path=tmp_path / "run").path
    (path / "config.json").write_text('{"study": null, "agents": null}')
    run = read_run(path)
    assert (run.name, run.started, run.status, run.finished) == ("run", "", None, False)
    assert (run.settings, run.study, run.versions, run.topology, run.totals) == ({},) * 5
    assert (run.seed, run.server, run.num_rounds, run.evaluated_on) == (None, None, 0, "test")
    assert (run.handshakes, run.links, run.by_round()) == ({}, [], {})
    assert set(run.accuracy().values()) == {None}


def test_what_a_record_says_is_read_in_one_place(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    record.amend_config(
        run_config={"seed": 9, "evaluate-on": "validation", "algorithm": "fedavg"},
        study={"label": "ours"},
        server={"number": 2},
        topology={"num_agents": 2},
        agents=[{"agent": 1, "num-examples": 5, "parameters": {"lr": 0.1}}, {"agent": 0}, {}],
    )
    run = read_run(record.path)
    assert run.setting("algorithm") == "fedavg"
    assert (run.setting("lr"), run.setting("lr", 0.5)) == (None, 0.5)
    assert (run.seed, run.evaluated_on, run.server) == (9, "validation", 2)
    assert (run.study["label"], run.topology["num_agents"]) == ("ours", 2)
    assert run.handshakes == {
        0: {"agent": 0, "parameters": {}},
        1: {"agent": 1, "num_examples": 5, "parameters": {"lr": 0.1}},
    }
    assert list(run.by_round()) == [1, 2, 3]
    assert [row["agent"] for row in run.by_round()[2]] == [0, 1]
    assert run.accuracy() == metric_summary(run.rounds)


def test_the_seed_of_a_run_without_a_run_config_is_that_of_the_config(tmp_path: Path) -> None:
    assert read_run(three_rounds(tmp_path / "run").path).seed == 7


def test_a_run_without_a_summary_speaks_for_its_last_lines(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    record.log_round(relay_row(4) | {"link_bytes": 70, "uplink_bytes": 30})
    run = read_run(record.path)
    assert (run.status, run.num_rounds) == (None, 4)
    assert run.totals == {"links_total": 70, "uplink_total": 30}
    (record.path / "relay.jsonl").write_text("")
    record.log_agents([agent_row(agent, 5, sent_bytes=8, uplink_bytes=2) for agent in (0, 1)])
    assert read_run(record.path).totals == {"links_total": 16, "uplink_total": 4}


def test_a_run_with_a_summary_speaks_for_its_end(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    for status in STATUSES:
        record.finish(status, num_rounds=2, bytes={"links_total": 5}, links=[LINK])
        run = read_run(record.path)
        assert (run.status, run.finished, run.num_rounds) == (status, status == "finished", 2)
        assert (run.totals, run.links) == ({"links_total": 5}, [LINK])


@pytest.mark.parametrize(
    ("file", "value", "rule"),
    [
        ("config.json", {"run_config": [1]}, "run_config must be an object"),
        ("config.json", {"agents": {"agent": 0}}, "agents must be a list"),
        ("config.json", {"agents": [{"agent": True}]}, r"agents\[0\].agent must be a whole"),
        ("config.json", {"agents": [{"main-metric": 1}]}, r"agents\[0\].main-metric must be text"),
        ("config.json", {"topology": {"edges": [[0, 1], [2]]}}, r"topology.edges\[1\] must be a"),
        ("config.json", {"server": 4}, "server must be an object"),
        ("config.json", {"started": "once"}, "started must be a time in ISO 8601"),
        ("summary.json", {"bytes": "many"}, "bytes must be an object"),
        ("summary.json", {"links": [{"sender": 0}]}, r"links\[0\] must be an object with sender"),
        (
            "summary.json",
            {"num_rounds": -1},
            r"num_rounds must be a whole number in 0\.\.1000000000",
        ),
        ("rounds.jsonl, line 1", {"round": 1, "agent": 0, "loss": "low"}, "loss must be a number"),
        ("rounds.jsonl, line 1", {"round": 1}, "it must be an object with round, agent"),
        ("relay.jsonl, line 1", {"round": 1, "answered": None, "agents": 1.5}, "agents must be a"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(
    tmp_path: Path, file: str, value: Any, rule: str
) -> None:
    record = three_rounds(tmp_path / "run")
    (record.path / file.partition(",")[0]).write_text(json.dumps(value) + "\n")
    with pytest.raises(RecordError, match=rf"{file} is damaged: {rule}.*; got .*\.$"):
        read_run(record.path)


@pytest.mark.parametrize(
    "text",
    ['{"x": NaN}', '{"num_rounds": -Infinity}', '{"x": ' + 60 * "[" + 60 * "]" + "}",
     100_000 * "[", '{"agents": [{"num_examples": 1e999}]}', '{"seed": 1' + 400 * "0" + "}"],
)  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    record = three_rounds(tmp_path / "run")
    (record.path / "config.json").write_text(text)
    with pytest.raises(RecordError, match=r"config\.json is damaged: "):
        read_run(record.path)


def test_texts_of_a_record_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    record.amend_config(
        name="\x1b]52;c;Zm9v\x07ring", agents=[{"agent": 0, "cl\x9bass": ["a\u202eb\n", "é"]}]
    )
    before = (record.path / "config.json").read_bytes()
    run = read_run(record.path)
    assert run.name == r"\x1b]52;c;Zm9v\x07ring"
    assert run.handshakes[0] == {"parameters": {}, "agent": 0, r"cl\x9bass": [r"a\u202eb\n", "é"]}
    record.amend_config(seed=7)  # writes what stood there, not what was shown
    assert (record.path / "config.json").read_bytes() == before


# --- lost lines ---


@pytest.mark.parametrize(("file", "lines"), [("rounds.jsonl", 6), ("relay.jsonl", 3)])
def test_lost_lines_are_noticed(tmp_path: Path, file: str, lines: int) -> None:
    record = three_rounds(tmp_path / "run")
    record.finish("finished")
    assert read_run(record.path).damage == ""
    whole = (record.path / file).read_bytes().splitlines(keepends=True)
    for kept in range(lines):
        (record.path / file).write_bytes(b"".join(whole[:kept]))
        damage = f"{file} has lost {lines - kept} of its {lines} lines"
        assert read_run(record.path).damage == damage
    (record.path / file).unlink()
    assert read_run(record.path).damage == f"{file} has lost {lines} of its {lines} lines"


def test_an_incomplete_line_of_a_killed_run_is_damage(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    with open(record.path / "rounds.jsonl", "ab") as file:
        file.write(b'{"round": 4, "ag')
    assert read_run(record.path).damage == "its last line is incomplete"


def test_every_line_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    assert (record.path / "rounds.jsonl").read_bytes().count(b"\n") == 6
    assert (record.path / "relay.jsonl").read_bytes().count(b"\n") == 3
    assert (record.path / "traffic.jsonl").read_bytes().count(b"\n") == 3
    assert not (record.path / "agents").exists()


# --- killed and damaged ---


@pytest.mark.parametrize("file", ["rounds.jsonl", "relay.jsonl"])
def test_a_run_killed_at_any_byte_of_the_last_line_reads(tmp_path: Path, file: str) -> None:
    path = three_rounds(tmp_path / "run").path / file
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    lines = whole.count(b"\n")
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        run = read_run(tmp_path / "run")
        complete = cut == len(whole) - 1  # only the line's end is missing
        rows = run.rounds if file == "rounds.jsonl" else run.relay
        assert len(rows) == lines - 1 + complete
        assert run.truncated == (start < cut and not complete)
        assert run.summary is None


@pytest.mark.parametrize(
    "damage", [b'{"round": 1, "ag', b"", b"\xff\xfe", b"[1, 2]", b'{"round": 1}', b"\0" * 9]
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: bytes) -> None:
    path = three_rounds(tmp_path / "run").path / "rounds.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match=r"rounds\.jsonl, line 2 is damaged"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    record = three_rounds(tmp_path / "run")
    (record.path / file).write_text('{"seed": ')
    with pytest.raises(RecordError, match=file):
        read_run(record.path)


def test_a_folder_that_is_no_record_says_what_was_expected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RecordError, match=r"folder with config\.json and rounds\.jsonl"):
            read_run(path)


# --- folders ---


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    def create(_: int) -> Path:
        return RunRecord.create(tmp_path / "runs", name="my ring/α", config={}).path

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(create, range(12)))
    assert len(paths) == 12
    assert {path.parent for path in paths} == {tmp_path / "runs"}
    assert all("my-ring-α" in path.name for path in paths)
    assert read_run(paths.pop()).name == "my ring/α"


@pytest.mark.parametrize("end", ["a line", "a summary"])
def test_a_record_is_of_one_run(end: str, tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "x")
    record.refuse_used()
    if end == "a summary":
        record.finish("failed")
    else:
        record.log_traffic({"round": 1, "links": [], "uplinks": []})
    with pytest.raises(RecordError, match="of one run"):
        record.refuse_used()


def test_an_exact_path_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunRecord.create(name="x", config={}, path=tmp_path / "empty")
    with pytest.raises(RecordError, match="not empty"):
        RunRecord.create(name="x", config={}, path=tmp_path / "empty")


def test_a_place_that_cannot_be_written_is_a_record_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot write"):
        RunRecord.create(tmp_path / "file", name="x", config={})
    with pytest.raises(RecordError, match="cannot write"):
        RunRecord.create(name="x", config={}, path=tmp_path / "file")


def test_the_config_of_an_earlier_run_can_be_passed_as_it_is(tmp_path: Path) -> None:
    first = read_run(three_rounds(tmp_path / "first").path)
    second = RunRecord.create(
        name="again", config=first.config | {"started": "long ago"}, path=tmp_path / "2"
    )
    config = read_run(second.path).config
    assert (config["seed"], config["name"]) == (7, "again")
    assert config["started"] != "long ago"


def test_what_is_known_later_is_added_to_the_config(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    before = read_run(record.path).config
    record.amend_config(agents=[{"agent": 0}])
    record.amend_config(agents=[{"agent": 0}, {"agent": 1}])
    assert read_run(record.path).config == before | {"agents": [{"agent": 0}, {"agent": 1}]}


def test_a_config_that_cannot_be_written_whole_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment of the writing, a reader has the old one or the new one."""
    record = three_rounds(tmp_path / "run")
    before = read_run(record.path).config
    seen = []

    def full(descriptor: int) -> None:
        seen.append(read_run(record.path).config)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"cannot write the run record at .*config\.json"):
        record.amend_config(agents=[{"agent": 0}])
    assert seen == [before]
    assert read_run(record.path).config == before
    assert not [file for file in record.path.iterdir() if file.suffix == ".tmp"]


# --- values ---


def standard_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]
)
def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    record = RunRecord.create(name="x", config={"deep": [{"value": value}]}, path=tmp_path / "run")
    record.log_agents([agent_row(0, 1, accuracy=value)])
    record.finish("failed", accuracy={"mean": value})
    for file in ("config.json", "summary.json", "rounds.jsonl"):
        standard_json((record.path / file).read_text())
    run = read_run(record.path)
    assert run.config["deep"] == [{"value": None}]
    assert run.rounds[0]["accuracy"] is None
    assert run.curve() == []


def test_numpy_values_and_paths_are_written_as_json(tmp_path: Path) -> None:
    config = {
        "n": np.int64(3),
        "r": np.float32(0.5),
        "a": np.arange(2),
        "p": Path("data"),
        "t": (1, True),
    }
    run = read_run(RunRecord.create(name="x", config=config, path=tmp_path / "run").path)
    assert {key: run.config[key] for key in config} == {
        "n": 3,
        "r": 0.5,
        "a": [0, 1],
        "p": "data",
        "t": [1, True],
    }


def test_what_json_cannot_hold_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="object"):
        RunRecord.create(name="x", config={"model": object()}, path=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", AGENT_KEYS)
def test_a_line_without_a_required_key_is_refused_whole(tmp_path: Path, key: str) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    short = agent_row(1, 1)
    del short[key]
    with pytest.raises(RecordError, match=f"missing: {key}"):
        record.log_agents([agent_row(0, 1), short])
    assert read_run(record.path).rounds == []


def test_extra_keys_are_kept(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    record.log_agents([agent_row(0, 1, stale_frames=4)])
    assert read_run(record.path).rounds[0]["stale_frames"] == 4


def test_a_relay_line_needs_its_keys(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    with pytest.raises(RecordError, match="missing: answered"):
        record.log_round({"round": 1})


# --- traffic and frames ---


def test_traffic_is_written_line_by_line(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    for line in (record.path / "traffic.jsonl").read_text().splitlines():
        standard_json(line)
    lines = read_run(record.path).traffic
    assert lines == [traffic_row(number) for number in (1, 2, 3)]
    for kind, columns in TRAFFIC_COLUMNS.items():
        assert all(len(row) == len(columns) for line in lines for row in line[kind])


def test_the_traffic_of_a_run_that_sent_nothing_is_empty(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    assert (record.path / "traffic.jsonl").read_bytes() == b""


@pytest.mark.parametrize("key", TRAFFIC_KEYS)
def test_a_line_of_traffic_needs_its_keys(tmp_path: Path, key: str) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    short = traffic_row(1)
    del short[key]
    with pytest.raises(RecordError, match=rf"a line of traffic\.jsonl needs .*; missing: {key}"):
        record.log_traffic(short)


def test_frames_are_kept_under_round_and_agent(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run", with_frames=True)
    record.keep_frames(1, 3, [b"whole"])
    record.keep_frames(17, 12, [b"delta", b"whole, too"])
    record.keep_frames(18, 12, [])
    kept = {path.name: path.read_bytes() for path in (record.path / "frames").iterdir()}
    assert kept == {
        "00001-agent-0003.frame": b"whole",
        "00017-agent-0012.frame": b"delta",
        "00017-agent-0012-key.frame": b"whole, too",
    }


def test_frames_are_not_kept_unasked(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    record.keep_frames(1, 3, [b"whole"])
    assert not (record.path / "frames").exists()


def test_frames_that_cannot_be_written_are_a_record_error(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run", with_frames=True)
    (record.path / "frames").touch()
    with pytest.raises(RecordError, match="cannot write"):
        record.keep_frames(1, 3, [b"whole"])


def test_a_status_is_one_of_four_and_the_last_one_stays(tmp_path: Path) -> None:
    record = three_rounds(tmp_path / "run")
    with pytest.raises(ConfigError, match="finished, incomplete, interrupted, failed"):
        record.finish("done")
    record.finish("interrupted", seconds=12.5)
    record.finish("failed")
    summary = read_run(record.path).summary
    assert summary is not None
    assert summary["status"] == "failed"


def test_metric_summary() -> None:
    rows = [agent_row(0, 1, 0.9), agent_row(0, 5, 0.2), agent_row(1, 5, 0.6), agent_row(2, 4, 0.2)]
    rows.append(agent_row(3, 5, math.nan))
    assert metric_summary(rows) == {
        "mean": pytest.approx(0.4),
        "std": pytest.approx(np.std([0.2, 0.6])),
        "worst": 0.2,
        "worst_agent": 0,
        "best": 0.6,
        "best_agent": 1,
        "round": 5,
        "agents": 2,
    }


def test_metric_summary_of_nobody() -> None:
    assert set(metric_summary([]).values()) == {None}
