import builtins
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.metric import metric_summary
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.__main__ import main
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table, headline

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

FRAME = 153_416


def synthetic(
    path: Path,
    *,
    agents: int = 10,
    rounds: tuple[int, ...] = (1, 2, 3),
    directed: bool = False,
    edges: bool = True,
    killed: bool = False,
) -> Run:
    """Write the record of an invented run and read it back."""
    graph = nx.gnp_random_graph(agents, min(1.0, 4 / agents), seed=1, directed=directed)
    links = [list(link) for link in (graph if directed else graph.to_directed()).edges]
    topology: dict[str, Any] = {"num_agents": agents, "directed": directed}
    if edges:
        topology["edges"] = links
    entries = [
        {"agent": i, "retention": 0.1 * (1 + i % 5), "classes": [0, i % 10]} for i in range(agents)
    ]
    entries[1] |= {"num-examples": 683}
    entries[2] |= {"num_examples": 336}
    record = RunRecord.create(
        name="invented", config={"topology": topology, "agents": entries}, path=path
    )
    rows: list[dict[str, Any]] = []
    for number in rounds:
        rows = [_row(agent, number, links) for agent in range(agents)]
        record.log_agents(rows)
    if not killed:
        used = [
            {"sender": a, "receiver": b, "frames": 1, "keys": 0, "bytes": FRAME, "header_bytes": 90}
            for a, b in links
        ]
        counts = {
            "links_total": 80_000_000,
            "uplink_total": 31_000_000,
            "fp32_total": 2_520_000_000,
            "paper_convention_bytes": 24_500_000,
            "busiest_agent": 4,
            "busiest_agent_total": 8_750_000,
            "relay_total": 111_000_000,
            "header_total": 4_560_000,
            "link_frames": 1_200,
            "link_keys": 30,
            "uplink_frames": 400,
            "uplink_keys": 12,
            "bits_per_weight": 0.0321,
        }
        record.finish(
            "finished",
            num_rounds=rounds[-1] if rounds else 0,
            accuracy=metric_summary(rows),
            bytes=counts,
            links=used,
        )
    return read_run(path)


def _row(agent: int, number: int, links: list[list[int]]) -> dict[str, Any]:
    out = sum(1 for sender, _ in links if sender == agent)
    return {
        "round": number,
        "agent": agent,
        "accuracy": 0.9 - 0.4 / (number + 1) - 0.003 * agent,
        "loss": 1.0,
        "num_examples": 250 + agent,
        "density": 0.3141,
        "sent_bytes": number * out * FRAME,
        "received_bytes": number * out * FRAME,
        "uplink_bytes": number * FRAME,
        "seconds": 0.5 * number,
    }


def pixels(png: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(png))[..., :3]


def cells(table: str, agent: int) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.split()[:1] == [str(agent)])
    return line.split()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (153_416, "153 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_234_567, "1.23 MB"),
        (99_960_000, "100 MB"),
        (2.5e9, "2.50 GB"),
        (3.2e12, "3.20 TB"),
        (1e18, "1000 PB"),
    ],
)
def test_human_bytes(count: float | None, text: str) -> None:
    assert human_bytes(count) == text


# --- the table ---


def test_the_table_holds_the_numbers_of_the_record(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run")
    table = agent_table(run)
    sent = human_bytes(run.final()[1]["sent_bytes"]).split()
    assert cells(table, 1) == ["1", "0.2", "0", "1", "683", "251", "0.7970", "0.3141", *sent, *sent]
    assert cells(table, 2)[:5] == ["2", "0.3", "0", "2", "336"]
    result = metric_summary(run.rounds)
    assert f"{result['mean']:.4f} ± {result['std']:.4f}" in table
    assert "worst: agent 9 with 0.7730" in table
    assert "finished, 10 agents, 3 rounds" in table
    for text in (
        "80.0 MB",
        "31.5 times less than fp32",
        "2.52 GB",
        "31.0 MB",
        "24.5 MB",
        "paper's convention",
        "8.75 MB",
        "111 MB",
    ):
        assert text in table
    (line,) = [line for line in table.splitlines() if line.startswith("bits per weight")]
    assert line.split() == "bits per weight, mean over all frames 0.0321".split() + (
        "1,600 frames, 42 of them whole; 4.56 MB of headers".split()
    )


def test_the_table_is_plain_sorted_and_narrow(tmp_path: Path) -> None:
    table = agent_table(synthetic(tmp_path / "run", agents=12))
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) <= 110
    numbers = [
        int(line.split()[0])
        for line in table.splitlines()
        if line.split()[:1] and line.split()[0].isdigit()
    ]
    assert numbers == list(range(12))


def test_what_a_record_does_not_say_is_a_dash(tmp_path: Path) -> None:
    record = RunRecord.create(
        name="x", config={"agents": [{"agent": 5, "classes": ["[red]"]}]}, path=tmp_path / "r"
    )
    record.log_agents([_row(0, 2, []) | {"accuracy": float("nan")}])
    table = agent_table(read_run(record.path))
    assert cells(table, 0) == ["0", "-", "-", "-", "250", "-", "0.3141", "0", "B", "0", "B"]
    assert cells(table, 5) == ["5", "-", "[red]", "-", "-", "-", "-", "-", "-"]
    assert "no agent was evaluated" in table
    assert "no summary (killed or still running)" in table


def test_an_agent_that_fell_silent_is_named(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    record.log_agents([_row(0, 1, []), _row(1, 1, [])])
    record.log_agents([_row(0, 2, [])])
    assert (
        "last evaluated in an earlier round, and not in the mean: agent 1 (round 1)"
        in agent_table(read_run(record.path))
    )


def test_an_agent_without_a_value_is_not_said_to_be_of_an_earlier_round(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    record.log_agents([_row(0, 2, []), {**_row(1, 2, []), "accuracy": None}])
    table = agent_table(read_run(record.path))
    assert "without a value of accuracy when last evaluated: agent 1" in table
    assert "earlier round" not in table


@pytest.mark.parametrize(
    ("status", "last", "rounds"),
    [
        ("interrupted", 3, "3 of 6 rounds"),
        ("failed", 3, "3 of 6 rounds"),
        (None, 3, "3 of 6 rounds"),
        (None, 7, "6 rounds"),  # killed in its closing exchange
        ("finished", 7, "6 rounds"),
        ("interrupted", 1, "1 of 6 rounds"),
    ],
)
def test_rounds_are_those_that_were_played(
    tmp_path: Path, status: str | None, last: int, rounds: str
) -> None:
    record = RunRecord.create(name="x", config={"num_rounds": 6}, path=tmp_path / "r")
    counts = {"failed": {}, "missing": [], "link_bytes": 0, "uplink_bytes": 0, "seconds": 0.0}
    for round in range(1, last + 1):
        record.log_round({"round": round, "answered": 2, "agents": 2, **counts})
    record.log_agents([_row(0, 1, []), _row(1, 1, [])])
    if status is not None:
        record.finish(status, num_rounds=6)
    assert headline(read_run(record.path)).endswith(f", 2 agents, {rounds}")


def test_what_goes_to_a_server_is_sent(tmp_path: Path) -> None:
    config = {"server": {"number": 2}}
    record = RunRecord.create(name="x", config=config, path=tmp_path / "r")
    record.log_agents([_row(0, 1, []), _row(1, 1, [])])
    shown = cells(agent_table(read_run(record.path)), 0)
    assert " ".join(shown[-4:]) == f"{human_bytes(FRAME)} 0 B"


def test_bytes_of_a_killed_run_come_from_its_last_lines(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", killed=True)
    links = sum(row["sent_bytes"] for row in run.final().values())
    table = agent_table(run)
    assert human_bytes(links) in table
    assert human_bytes(10 * 3 * FRAME) in table
    assert "fp32" not in table
    assert "bits per weight" not in table


def test_a_record_of_an_earlier_release_is_shown_without_what_it_does_not_say(
    tmp_path: Path,
) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    record.finish(
        "finished", bytes={"links_total": 1000, "uplink_total": 500, "bits_per_weight": None}
    )
    table = agent_table(read_run(record.path))
    assert "1.00 kB" in table
    assert "relay" not in table
    assert "bits per weight" not in table


def test_a_run_that_sends_floats_is_not_called_cheaper(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "r")
    record.finish("finished", bytes={"links_total": 1010, "fp32_total": 1000})
    assert "1.01 times fp32" in agent_table(read_run(record.path))


# --- the picture ---

# each panel shows a part of the record of its own: one case may be of several parts
CASES: dict[str, dict[str, Any]] = {
    "ten": {},
    "hundred": {"agents": 100, "rounds": (5, 10)},
    "directed, killed": {"directed": True, "killed": True},
    "one evaluated round, no fixed graph": {"rounds": (7,), "edges": False},
    "killed before the first line": {"killed": True, "rounds": ()},
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_has_content_in_each_panel(tmp_path: Path, case: str) -> None:
    png = plot_run(synthetic(tmp_path / "run", **CASES[case]))
    assert png == tmp_path / "run" / "overview.png"
    image = pixels(png)
    height, width, _ = image.shape
    assert 500 <= height <= 1200
    assert 1500 <= width <= 3000
    for panel in np.array_split(image[height // 8 :], 3, axis=1):
        assert 0.0005 < (panel.min(axis=-1) < 0.9).mean() < 0.5


@pytest.mark.slow
def test_the_same_record_gives_the_same_picture(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", agents=12)
    first, second = plot_run(run, tmp_path / "1.png"), plot_run(run, tmp_path / "2.png")
    assert first.read_bytes() == second.read_bytes()


def test_a_record_that_says_nothing_can_be_drawn(tmp_path: Path) -> None:
    run = read_run(RunRecord.create(name="x", config={}, path=tmp_path / "r").path)
    assert plot_run(run).stat().st_size > 0


# --- the door ---


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic(tmp_path / "run")
    assert main([str(run.path), "--out", str(tmp_path / "ring.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(agent_table(run))
    assert str(tmp_path / "ring.png") in printed
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "error: a run record is a folder with config.json" in capsys.readouterr().err


@pytest.mark.parametrize("show", [agent_table, plot_run])
def test_a_missing_extra_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Any
) -> None:
    run = synthetic(tmp_path / "run")
    real = builtins.__import__

    def without_extra(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in {"rich", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_extra)
    with pytest.raises(ConfigError, match=r"reports need .* with its extra 'report'"):
        show(run)
