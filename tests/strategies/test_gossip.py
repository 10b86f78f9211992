"""The relay as a Flower strategy: who gets what, what is told of it, and what happens
when things go wrong.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import (
    AgentData,
    ConfigError,
    MceplAgent,
    RosterError,
    Topology,
    TopologyError,
    encode_frame,
    read_run,
)
from flower_mcepl.clients import app as client_module
from flower_mcepl.clients import make_agent_app, make_client_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.record.reading import Run
from flower_mcepl.runs import book
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.strategies import reporting as module
from flower_mcepl.strategies.answers import plain_reason
from flower_mcepl.wire import Reference, read_header
from tests.fleet.agents import Reader, make_agent, same_tensors, split
from tests.fleet.flower import (
    RUN_CONFIG,
    RecordingGrid,
    agent_grid,
    app_grid,
    data_fn,
    down_frames,
    frame_bytes,
    gossip,
    held_rounds,
    model_fn,
    sent_round,
    state_bytes,
    state_facts,
    up_frames,
)
from tests.fleet.grid import InProcessGrid


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "flwr")
    return caplog


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the table, too."""
    monkeypatch.setattr(module, "agent_table", lambda run: "table")


def the_run(folder: Path) -> Run:
    (record,) = folder.iterdir()
    return read_run(record)


# --- who gets what ---

MODES = ("here", "down", "silent", "unavailable")


class Plan:
    """Sets, before each round, who is there; and says, slowly and obviously, what must
    follow from it.
    """

    def __init__(self, topology: Topology, modes: list[list[str]], staleness: int) -> None:
        self.topology, self.modes, self.staleness = topology, modes, staleness
        size = topology.num_agents
        self.last_sent = [0] * size
        self.has: dict[tuple[int, int], int] = {}
        # (round, agent) -> sender -> round that is held and newest round; frames must
        # lead from one to the other
        self.frames: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        self.num_neighbors: dict[tuple[int, int], int] = {}
        met: set[int] = set()
        for round, row in enumerate(modes, start=1):
            here = [agent for agent in range(size) if row[agent] == "here"]
            for agent in range(size):
                if row[agent] == "down":
                    continue
                neighbors = topology.in_neighbors(agent, round=round - 1) if agent in met else ()
                usable = [j for j in neighbors if round - 1 - self.last_sent[j] <= staleness]
                held = {j: self.has.get((j, agent), 0) for j in usable}
                new = {
                    j: (held[j], self.last_sent[j]) for j in usable if self.last_sent[j] > held[j]
                }
                self.frames[round, agent] = new
                if agent in here:
                    self.has.update({(j, agent): last for j, (_, last) in new.items()})
                    if agent in met:
                        self.num_neighbors[round, agent] = len(usable)
                        for j in range(size):  # what is too old to count is forgotten
                            if round - 1 - self.has.get((j, agent), 0) > staleness:
                                self.has.pop((j, agent), None)
            for agent in here:
                self.last_sent[agent] = round
            met |= {*here}

    def apply(self, grid: RecordingGrid, round: int) -> None:
        row = self.modes[round - 1]
        for name in MODES[1:]:
            setattr(grid, name, {1000 + agent for agent, mode in enumerate(row) if mode == name})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    size, rounds, seed = draw(st.integers(2, 5)), draw(st.integers(2, 6)), draw(st.integers(0, 99))
    pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(
        lambda pair: pair[0] != pair[1]
    )
    fixed = st.builds(
        lambda edges, directed: Topology.from_edges(edges, num_agents=size, directed=directed),
        st.lists(pairs, max_size=12),
        st.booleans(),
    )
    varying = st.builds(
        lambda k: Topology.random_neighbors(size, degree=k, seed=seed), st.integers(0, size - 1)
    )
    row = st.lists(st.sampled_from(("here", "here", *MODES)), min_size=size - 1, max_size=size - 1)
    modes = [["here", *draw(row)] for _ in range(rounds)]
    return Plan(draw(st.one_of(fixed, varying)), modes, draw(st.integers(0, 3)))


@given(plan=plans())
@settings(max_examples=10)
def test_every_node_gets_what_leads_to_its_in_neighbors_newest_masks_and_nothing_else(
    plan: Plan,
) -> None:
    size, rounds = plan.topology.num_agents, len(plan.modes)
    grid = agent_grid(size)
    counts: dict[tuple[int, int], int] = {}

    def look(round: int) -> None:
        for agent, mode in enumerate(plan.modes[round - 1]):
            # after the last round the closing exchange has fused once more
            if mode == "here" and round < rounds:
                counts[round, agent] = state_facts(grid, 1000 + agent)["num-neighbors"]
        if round < rounds:
            plan.apply(grid, round + 1)

    plan.apply(grid, 1)
    strategy = gossip(
        grid,
        plan.topology,
        rounds=rounds,
        min_agents=1,
        max_staleness=plan.staleness,
        after=look,
        incomplete=None,  # tests/strategies/test_endings.py says when
    )
    got = {}
    for message in grid.log:
        if message.metadata.message_type == "train":
            place = sent_round(message), message.metadata.dst_node_id - 1000
            assert place not in got  # one message per agent and round
            got[place] = down_frames(message)
    assert {place: sorted(chains) for place, chains in got.items()} == {
        place: sorted(expected) for place, expected in plan.frames.items()
    }
    for place, chains in got.items():
        for sender, chain in chains.items():
            at, newest = plan.frames[place][sender]
            for frame in chain:
                header = read_header(frame)
                assert header.sender == sender
                assert header.reference in (0, at) or header.reference is None
                at = header.round
            assert at == newest
    assert not any(
        {"refused", "lacking"} & reply.content["agent"].keys()
        for reply in grid.answers
        if not reply.has_error()
    )
    fused = {place: count for place, count in plan.num_neighbors.items() if place[0] < rounds}
    assert {place: counts[place] for place in fused} == fused
    carried = sum(
        len(frame)
        for message in grid.log
        for chain in down_frames(message).values()
        for frame in chain
    )
    assert strategy.exchange.ledger.totals()["links_total"] == carried


def test_the_arrays_are_handed_on_as_they_came() -> None:
    grid = agent_grid(3)
    gossip(grid, rounds=3)
    came = [
        (int(reply.content["agent"]["agent"]), array)
        for reply in grid.answers
        for array in reply.content.array_records.get("frame", ArrayRecord()).values()
    ]
    handed = [
        (int(place.partition("/")[0]), array)
        for message in grid.log
        for place, array in message.content["frames"].items()
    ]
    assert len(handed) == 3 * 3 * 2
    for sender, array in handed:
        assert any(array is other for agent, other in came if agent == sender)


def test_one_message_per_agent_and_round_and_one_to_close() -> None:
    grid = agent_grid(3)
    gossip(grid, rounds=5)
    kinds = [(sent_round(m), m.metadata.message_type, m.metadata.dst_node_id) for m in grid.log]
    train = [(round, "train", 1000 + agent) for round in range(1, 6) for agent in range(3)]
    assert kinds == train + [(6, "evaluate", 1000 + agent) for agent in range(3)]
    # a late answer may come in later rounds
    assert {message.metadata.ttl for message in grid.log} == {3 * 30.0}


def test_evaluation_only_when_due() -> None:
    grid = agent_grid(3)
    strategy = gossip(grid, rounds=7, evaluate_every=3)
    due = {sent_round(message) for message in grid.log if message.content["order"]["evaluate"]}
    assert due == {4, 7, 8}  # the messages that follow rounds 3, 6 and 7
    assert [row["round"] for row in strategy.monitor.rows] == [3] * 3 + [6] * 3 + [7] * 3
    answers = [r for r in grid.answers if "accuracy" in r.content["metrics"]]
    assert len(answers) == 3 * 3


def test_train_config_reaches_the_agents_and_cannot_overwrite_the_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = agent_grid(2)
    strategy = GossipStrategy(Topology.ring(2), record=None)
    strategy.start(
        grid, num_rounds=1, train_config=ConfigRecord({"note": "hello", "server-round": 99})
    )
    assert [
        (m.content["order"]["server-round"], m.content["order"].get("note")) for m in grid.log[:2]
    ] == [(1, "hello")] * 2
    assert "settings from the run config" in caplog.text  # but no agent reads it


# --- what is told of it ---


def test_the_result_holds_metrics_and_no_arrays() -> None:
    strategy = GossipStrategy(Topology.ring(3), evaluate_every=2, record=None)
    result = strategy.start(agent_grid(3), num_rounds=3)
    assert len(result.arrays) == 0
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(result.evaluate_metrics_clientapp) == [2, 3]
    metrics = result.evaluate_metrics_clientapp[3]
    accuracies = [row["accuracy"] for row in strategy.monitor.rows if row["round"] == 3]
    assert metrics["accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["accuracy-std"] == pytest.approx(np.std(accuracies))
    assert (metrics["accuracy-worst"], metrics["accuracy-best"]) == (
        min(accuracies),
        max(accuracies),
    )
    assert metrics["num-agents"] == 3


def test_log_lines(log: pytest.LogCaptureFixture) -> None:
    grid = agent_grid(4)
    away = {2: lambda: grid.silent.add(1002), 3: lambda: grid.down.add(1003)}
    gossip(grid, rounds=4, before=away, min_agents=2, incomplete=True)
    lines = [
        line for line in log.messages if line.startswith(("round", "closing")) and " | " in line
    ]
    assert [line.split(" | ")[0] for line in lines] == [
        "round 1/4",
        "round 2/4",
        "round 3/4",
        "round 4/4",
        "closing",
    ]
    assert "4/4 answered | train loss" in lines[0]
    assert "3/4 answered | 1 failed | " in lines[1]
    assert "2/4 answered | 1 failed | no answer from 3 | train loss" in lines[2]
    assert "accuracy of 2 of 4 agents after round 2: 0." in lines[2]
    assert "(worst 0." in lines[2]
    assert lines[0].endswith("0 B over the links")  # nothing has gone down yet
    assert all(
        re.search(r"\d k?B over the links \(\d[\d.]* bit per weight\)$", line) for line in lines[1:]
    )
    assert all(" left | " in line for line in lines[:4])


@pytest.mark.usefixtures("no_report")
def test_the_byte_counts_are_what_the_grid_carried(tmp_path: Path) -> None:
    grid = agent_grid(4)
    gossip(grid, Topology.path(4), rounds=3, evaluate_every=1, record=tmp_path)
    run = the_run(tmp_path)
    for row in run.rounds:
        # the frames of a round travel in the next
        until = [m for m in grid.log if sent_round(m) <= row["round"] + 1]
        mine = [m for m in until if m.metadata.dst_node_id == 1000 + row["agent"]]
        assert row["received_bytes"] == sum(
            len(f) for m in mine for chain in down_frames(m).values() for f in chain
        )
        out = [frame for m in until for frame in down_frames(m).get(row["agent"], [])]
        assert row["sent_bytes"] == sum(map(len, out))
    up = [frame for reply in grid.answers for frame in up_frames(reply)]
    down = [
        frame for message in grid.log for chain in down_frames(message).values() for frame in chain
    ]
    assert run.summary is not None
    assert run.summary["bytes"]["uplink_total"] == sum(map(len, up))
    assert run.summary["bytes"]["relay_total"] == sum(map(len, [*up, *down]))
    headers = [read_header(frame) for frame in (*up, *down)]
    assert run.summary["bytes"]["header_total"] == sum(header.header_bytes for header in headers)
    assert (run.summary["bytes"]["uplink_frames"], run.summary["bytes"]["link_frames"]) == (
        len(up),
        len(down),
    )
    keys = [not header.reference for header in headers]
    assert run.summary["bytes"]["uplink_keys"] == sum(keys[: len(up)])
    assert run.summary["bytes"]["link_keys"] == sum(keys[len(up) :])
    bits = [8 * len(frame) / make_agent(0).model.num_weights for frame in (*up, *down)]
    assert run.summary["bytes"]["bits_per_weight"] == pytest.approx(np.mean(bits))
    assert run.summary["bytes"]["link_bits_per_weight"] == pytest.approx(np.mean(bits[len(up) :]))
    assert (
        run.summary["bytes"]["deliveries"]
        == 3 * 6
        == sum(link["frames"] for link in run.summary["links"])
    )
    assert run.summary["bytes"]["links_total"] == run.relay[-1]["link_bytes"]


@pytest.mark.usefixtures("no_report")
def test_the_traffic_of_the_rounds_sums_to_the_summary(tmp_path: Path) -> None:
    grid = agent_grid(4)
    steps = {3: lambda: grid.silent.add(1002), 5: grid.silent.clear}
    gossip(grid, rounds=7, key_interval=2, record=tmp_path, before=steps)
    run = the_run(tmp_path)
    assert run.summary is not None
    traffic = run.traffic
    assert (
        [line["round"] for line in traffic]
        == [line["round"] for line in run.relay]
        == list(range(1, 9))
    )
    # a line holds what went down with the round's messages and came up with their
    # answers
    for line in traffic:
        down = [m for m in grid.log if sent_round(m) == line["round"]]
        chains = {
            (j, m.metadata.dst_node_id - 1000): c for m in down for j, c in down_frames(m).items()
        }
        assert {(row[0], row[1]): (row[2], row[4]) for row in line["links"]} == {
            link: (len(chain), sum(map(len, chain))) for link, chain in chains.items()
        }
        answers = [
            r
            for r in grid.answers
            if r.metadata.reply_to_message_id in {m.metadata.message_id for m in down}
        ]
        up = {int(r.content["agent"]["agent"]): up_frames(r) for r in answers}
        assert {row[0]: (row[1], row[3]) for row in line["uplinks"]} == {
            agent: (len(frames), sum(map(len, frames))) for agent, frames in up.items() if frames
        }
    columns = ("frames", "keys", "bytes", "header_bytes")
    totals = run.summary["bytes"]
    for kind, names in (
        ("links", ("link_frames", "link_keys", "links_total")),
        ("uplinks", ("uplink_frames", "uplink_keys", "uplink_total")),
    ):
        sums = [sum(row[at - 4] for line in traffic for row in line[kind]) for at in range(4)]
        assert sums[:3] == [totals[name] for name in names]
    by_link: dict[tuple[int, int], list[int]] = {}
    for line in traffic:
        for sender, receiver, *counts in line["links"]:
            before = by_link.get((sender, receiver), [0] * 4)
            by_link[sender, receiver] = [a + b for a, b in zip(before, counts, strict=True)]
    assert {
        (r["sender"], r["receiver"]): [r[c] for c in columns] for r in run.summary["links"]
    } == by_link


@pytest.mark.usefixtures("no_report")
def test_frames_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    run_config = {
        **RUN_CONFIG,
        "num-agents": 3,
        "key-interval": 2,
        "keep-frames": True,
        "record-dir": str(tmp_path),
    }
    strategy = GossipStrategy.from_run_config(run_config)
    grid = app_grid(3, **run_config)
    strategy.start(grid, num_rounds=4)
    run = the_run(tmp_path)
    files = sorted(path.name for path in (run.path / "frames").iterdir())
    plain = [f"{round:05d}-agent-{agent:04d}" for round in range(1, 5) for agent in range(3)]
    # round 1 stands alone anyway
    whole = [name + "-key" for name in plain if name.startswith("00003")]
    assert files == sorted(f"{name}.frame" for name in [*plain, *whole])
    readers = [Reader(make_agent(agent)) for agent in range(3)]
    for name in plain:
        round, agent = int(name[:5]), int(name[-4:])
        data = (run.path / "frames" / f"{name}.frame").read_bytes()
        (answer,) = [
            r
            for r in grid.answers
            if up_frames(r)
            and (read_header(up_frames(r)[0]).sender, read_header(up_frames(r)[0]).round)
            == (agent, round)
        ]
        assert up_frames(answer)[0] == data
        frame = readers[agent].read(data)
        assert (frame.header.sender, frame.header.round) == (agent, round)
        assert frame.header.content == run.relay[round - 1]["frames"][str(agent)]
        if f"{name}-key" in whole:
            key = readers[agent].read((run.path / "frames" / f"{name}-key.frame").read_bytes())
            assert same_tensors(frame.tensors, key.tensors)
            assert not key.header.reference


def test_frames_are_not_kept_otherwise(tmp_path: Path) -> None:
    strategy = gossip(agent_grid(2), rounds=2, record=tmp_path)
    assert strategy.record is not None
    assert not (strategy.record.path / "frames").exists()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_key_interval_is_honored(interval: int) -> None:
    grid = agent_grid(3)
    gossip(grid, rounds=7, key_interval=interval)
    keys = {
        (header.round, header.sender)
        for reply in grid.answers
        for header in map(read_header, up_frames(reply))
        if not header.reference
    }
    assert keys == {(round, agent) for round in range(1, 8, interval) for agent in range(3)}
    asked = {sent_round(message) for message in grid.log if message.content["order"]["whole"]}
    assert asked == {*range(1 + interval, 8, interval)}
    assert all(len(chain) == 1 for message in grid.log for chain in down_frames(message).values())


def test_the_handshake_is_asked_for_until_the_node_is_known() -> None:
    grid = agent_grid(3)
    # the same id with an empty context
    strategy = gossip(grid, rounds=4, before={3: lambda: grid.add_node(1002, 2)})
    asked = [
        (sent_round(m), m.metadata.dst_node_id - 1000)
        for m in grid.log
        if m.content["order"]["introduce"]
    ]
    assert asked == [(1, 0), (1, 1), (1, 2)]
    told = [
        (int(reply.metadata.group_id or 0), int(reply.content["agent"]["agent"]))
        for reply in grid.answers
        if "fingerprint" in reply.content["agent"]
    ]
    # who starts afresh introduces itself anyway
    assert [agent for _, agent in told] == [0, 1, 2, 2]
    assert strategy.roster.facts(2)["num-weights"] == make_agent(2).model.num_weights


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("way", ["down", "silent"])  # it is seen to leave, or only does not answer
def test_a_node_that_is_back_with_another_node_config_introduces_itself_anew(
    way: str, tmp_path: Path
) -> None:
    grid = app_grid(3, **{"retention-conv": 0.3})
    away: set[int] = getattr(grid, way)

    def come_back() -> None:
        away.clear()
        client_module._agents.clear()  # its process is a new one
        grid.contexts[1001].node_config |= {"retention-conv": 0.5, "tell-classes": False}

    strategy = gossip(
        grid, rounds=6, record=tmp_path, before={3: lambda: away.add(1001), 4: come_back}
    )
    agents = the_run(tmp_path).config["agents"]
    assert [agent["retention"].partition(",")[0] for agent in agents] == [
        "conv 0.3",
        "conv 0.5",
        "conv 0.3",
    ]
    assert agents[1]["kept_weights"] > agents[0]["kept_weights"]
    assert ["classes" in agent for agent in agents] == [True, False, True]
    assert strategy.roster.facts(1)["kept-weights"] == agents[1]["kept_weights"]
    assert [sent_round(m) for m in grid.log if m.content["order"]["introduce"]] == [1, 1, 1, 4]


@pytest.mark.usefixtures("no_report")
def test_an_unknown_node_without_a_handshake_is_refused(
    log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    grid = agent_grid(3)
    pull = grid.pull_messages

    def shorten(ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(ids))
        for reply in replies:
            if reply.metadata.src_node_id == 1002 and grid.log[-1].metadata.group_id == "1":
                record = reply.content.config_records["agent"]
                for key in make_agent(2).describe().keys() - {"agent"}:
                    del record[key]
        return replies

    grid.pull_messages = shorten  # type: ignore[method-assign]
    gossip(grid, rounds=3, min_agents=2, record=tmp_path)
    relay = the_run(tmp_path).relay
    assert [list(line["failed"]) for line in relay] == [["node 1002"], [], [], []]
    assert (
        "node 1002 does not answer as an agent (fingerprint must be text of at most 10000 "
        "characters; got None); its records are" in relay[0]["failed"]["node 1002"]
    )
    assert [line["answered"] for line in relay] == [2, 3, 3, 3]  # asked again, it introduces itself
    asked = [
        (sent_round(m), m.metadata.dst_node_id) for m in grid.log if m.content["order"]["introduce"]
    ]
    assert asked[3:] == [(2, 1002)]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    "spec", ["ring", "erdos-renyi:degree=2", "random-neighbors:degree=2", "star"]
)
def test_the_config_is_enough_to_repeat_the_run(spec: str, tmp_path: Path) -> None:
    run_config = {
        **RUN_CONFIG,
        "num-agents": 4,
        "topology": spec,
        "evaluate-every": 2,
        "retention-conv": "0.2, 0.5",
    }

    def run(config: dict[str, Any], folder: Path, topology: Topology | None = None) -> Run:
        strategy = GossipStrategy.from_run_config({**config, "record-dir": str(folder)})
        if topology is not None:
            assert topology == strategy.topology
        strategy.start(app_grid(4, **config), num_rounds=3)
        return the_run(folder)

    first = run(run_config, tmp_path / "first")
    written = dict(first.config["run_config"])
    second = run(written, tmp_path / "second", Topology.from_config(first.config["topology"]))
    assert [line["frames"] for line in first.relay] == [line["frames"] for line in second.relay]
    assert all(len(line["frames"]) == 4 for line in first.relay[:3])
    assert (first.config["num_rounds"], first.config["evaluate_every"]) == (3, 2)
    assert [a["retention"] for a in first.config["agents"]] == [
        "conv 0.2, linear 0.9",
        "conv 0.5, linear 0.9",
    ] * 2
    assert {"flwr", "torch", "flower_mcepl"} <= first.config["versions"].keys()


@pytest.mark.pictures
def test_the_report_at_the_end(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    gossip(agent_grid(2), rounds=1, record=tmp_path)
    run = the_run(tmp_path)
    assert run.summary is not None
    assert run.summary["status"] == "finished"
    assert f"Run record: {run.path}" in log.messages
    assert (picture := [line for line in log.messages if line.startswith("Picture: ")])
    assert Path(picture[0].removeprefix("Picture: ")).is_file()


def test_a_run_whose_agents_leave_before_the_closing_is_incomplete(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(2)
    grid_leaves = grid.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        ids = grid_leaves(messages)
        grid.down = {1000, 1001}  # as soon as they have trained
        return ids

    grid.push_messages = push  # type: ignore[method-assign]
    gossip(grid, rounds=1, record=tmp_path, incomplete=True)
    assert the_run(tmp_path).status == "incomplete"
    assert "closing | 0/2 answered | no answer from 0, 1 | 0 B over the links" in log.messages


def test_no_record_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gossip(agent_grid(2), record=None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (OSError("disk"), "failed")]
)
def test_a_run_that_breaks_off_leaves_a_readable_record(
    error: Any, status: str, tmp_path: Path
) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        gossip(agent_grid(3), rounds=9, record=tmp_path, before={4: stop})
    run = the_run(tmp_path)
    assert run.summary is not None
    assert run.summary["status"] == status
    assert [line["round"] for line in run.relay] == [1, 2, 3]
    assert [row["round"] for row in run.rounds] == [2, 2, 2]
    assert len(run.config["agents"]) == 3


# --- trouble ---


@pytest.mark.parametrize("way", ["down", "silent", "unavailable"])
def test_an_absent_agents_mask_stays_in_use_then_leaves_then_comes_back(
    way: str, tmp_path: Path
) -> None:
    grid = agent_grid(3)
    seen = {}
    away = getattr(grid, way)

    def look(round: int) -> None:
        seen[round] = state_facts(grid, 1000)["num-neighbors"]

    steps = {3: lambda: away.add(1002), 8: away.clear}
    strategy = gossip(grid, rounds=11, max_staleness=2, before=steps, after=look)
    # Agent 2's last mask is of round 2. Messages of rounds 3, 4 and 5 fuse rounds 2, 3
    # and 4: at most 2 rounds old.
    assert seen == {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1, 9: 2, 10: 2, 11: 2}
    assert {row["agent"] for row in strategy.monitor.rows if row["round"] == 10} == {0, 1, 2}
    assert state_facts(grid, 1002)["num-neighbors"] == 2


def test_an_agent_may_join_late(log: pytest.LogCaptureFixture) -> None:
    grid = agent_grid(3)
    grid.down = {1002}
    seen = {}

    def look(round: int) -> None:
        seen[round] = [
            state_facts(grid, node)["num-neighbors"]
            for node in (1000, 1002)[: 1 if 1002 in grid.down else 2]
        ]

    gossip(grid, rounds=6, min_agents=2, max_staleness=2, before={5: grid.down.clear}, after=look)
    # Until round 2 the common first mask stands for agent 2. In its own first round it
    # keeps that mask alone.
    assert seen == {1: [1], 2: [2], 3: [2], 4: [1], 5: [1, 1], 6: [2, 2]}
    assert [
        line for line in log.messages if line.startswith("round 2/6") and "no answer from 2" in line
    ]


def test_a_frame_that_is_too_old_is_not_even_sent() -> None:
    grid = agent_grid(3)
    grid.down = {1002}
    steps = {3: lambda: grid.down.add(1001), 5: lambda: grid.down.discard(1002)}
    gossip(grid, rounds=7, min_agents=1, max_staleness=2, before=steps)
    got = {
        sent_round(m): sorted(down_frames(m)) for m in grid.log if m.metadata.dst_node_id == 1002
    }
    assert got == {5: [], 6: [0], 7: [0], 8: [0]}  # agent 1's last frame is of round 2
    assert state_facts(grid, 1002)["num-neighbors"] == 1


def test_a_restarted_node_takes_over_its_agent_and_gets_the_frames_again() -> None:
    grid = agent_grid(3)

    def lose_1() -> None:
        grid.down.add(1001)

    def restart_2() -> None:
        grid.down.add(1002)
        grid.add_node(2002, 2)

    strategy = gossip(grid, rounds=6, before={3: lose_1, 4: restart_2}, takeover=True)
    assert strategy.roster.node_of == {0: 1000, 1: 1001, 2: 2002}
    got = {
        sent_round(m): sorted(down_frames(m)) for m in grid.log if m.metadata.dst_node_id == 2002
    }
    # Unknown in round 4, it gets nothing; then both, agent 1's old frame too, which the
    # former node had got already.
    assert got[4] == []
    assert got[5] == [0, 1]
    assert state_facts(grid, 2002)["num-neighbors"] == 2


def test_a_restart_after_silence_loses_no_frame() -> None:
    """The old node was handed agent 1's last frame and never answered; the new one must
    get it.
    """
    grid = agent_grid(3)

    def restart_2() -> None:
        grid.down.add(1002)
        grid.add_node(2002, 2)

    steps = {3: lambda: (grid.silent.add(1002), grid.down.add(1001)), 4: restart_2}
    gossip(grid, rounds=6, before=steps, min_agents=1, takeover=True)
    got = {
        sent_round(m): sorted(down_frames(m)) for m in grid.log if m.metadata.dst_node_id == 2002
    }
    assert got[5] == [0, 1]


@pytest.mark.usefixtures("no_report")
def test_a_node_that_lost_its_state_gets_the_frames_again(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(3)

    def lose_1() -> None:
        grid.down.add(1001)

    def wipe_2() -> None:
        grid.add_node(1002, 2)  # the same id with an empty context

    strategy = gossip(grid, rounds=6, before={4: lose_1, 5: wipe_2}, record=tmp_path)
    got = {sent_round(m): down_frames(m) for m in grid.log if m.metadata.dst_node_id == 1002}
    assert [sorted(got[round]) for round in (4, 5, 6)] == [[0, 1], [0], [0, 1]]
    assert state_facts(grid, 1002)["num-neighbors"] == 2
    assert all(not answer.content["agent"].get("refused") for answer in grid.answers)
    lacking = {
        line["round"]: line["lacking"] for line in the_run(tmp_path).relay if line["lacking"]
    }
    assert lacking == {5: {"2": [0]}}  # what it got in round 5 was meant for one who remembers
    assert (
        "round 5: agent 2 lacks what the frames of these agents build on, and gets it next: 0"
        in log.messages
    )
    for j, newest in ((0, 5), (1, 3)):  # from the last key on
        headers = [read_header(frame) for frame in got[6][j]]
        assert [header.reference for header in headers] == [
            0,
            *(header.round for header in headers[:-1]),
        ]
        assert headers[-1].round == newest
    assert held_rounds(grid, 1002) == {0: 6, 1: 3}
    assert strategy.exchange.ledger.links[1, 2].frames == 3 + 3


@pytest.mark.parametrize("way", ["down", "silent", "unavailable"])
def test_a_round_that_nobody_answers_ends_the_run(way: str, tmp_path: Path) -> None:
    grid = agent_grid(2)
    with pytest.raises(
        RosterError, match=r"round 3 needs 1 agents, but 0 took part; missing: 0, 1\..*min-agents"
    ) as caught:
        gossip(
            grid,
            rounds=9,
            record=tmp_path,
            min_agents=1,
            before={3: lambda: getattr(grid, way).update({1000, 1001})},
        )
    assert ("agent 0, agent 1: error 5: Node" in str(caught.value)) == (way == "unavailable")
    run = the_run(tmp_path)
    assert [line["round"] for line in run.relay] == [1, 2]
    assert run.status == "failed"
    assert run.summary is not None
    assert run.summary["error"]["type"] == "RosterError"
    assert run.summary["error"]["reason"].startswith("round 3 needs 1 agents")


def test_when_all_are_offline_the_relay_waits() -> None:
    grid = agent_grid(2)
    calls = 0
    ids = grid.get_node_ids

    def node_ids() -> Iterable[int]:
        nonlocal calls
        calls += 1
        return [] if 3 <= calls <= 4 else ids()

    grid.get_node_ids = node_ids  # type: ignore[method-assign]
    strategy = gossip(grid, rounds=3, wait_timeout=30.0)
    assert len(strategy.monitor.rows) == 2 + 2
    assert len(grid.log) == 2 * 4


class Stumbling:
    """A split whose batches of one round fail: some code of the user's."""

    def __init__(self, inner: Any, *, round: int, error: BaseException | None = None) -> None:
        self.inner, self.round, self.error = inner, round, error
        self.num_examples = inner.num_examples

    def training_batches(self, *, round: int, **options: Any) -> Iterator[Any]:
        for inputs, labels in self.inner.training_batches(round=round, **options):
            if round == self.round and self.error is not None:
                raise self.error
            yield inputs * (float("nan") if round == self.round else 1.0), labels


def stumbling_agent(
    index: int, *, who: int, round: int, error: BaseException | None = None
) -> MceplAgent:
    agent = make_agent(index)
    if index == who:
        agent.data = AgentData(
            Stumbling(agent.data.train, round=round, error=error), agent.data.test
        )
    return agent


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            KeyError("label"),
            "agent 1: KeyError: 'label'. Its traceback is in the log of node 1001.",
        ),
        (
            None,
            "agent 1: the training loss of round 3 is nan. Lower score-lr (now 1), and check the "
            "inputs",
        ),
    ],
)
def test_a_client_that_raises_in_the_middle(
    error: Exception | None, reason: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(3, lambda index: stumbling_agent(index, who=1, round=3, error=error))
    kept = {}

    def look(round: int) -> None:
        if round in (2, 3):
            kept[round] = state_bytes(grid.contexts[1001])

    gossip(grid, rounds=6, record=tmp_path, after=look)
    assert kept[2] == kept[3]  # the state of round 2 stayed
    run = the_run(tmp_path)
    assert run.summary is not None
    assert run.summary["status"] == "finished"
    assert [line["answered"] for line in run.relay] == [3, 3, 2, 3, 3, 3, 3]
    assert run.relay[2]["failed"]["agent 1"].startswith(f"error 2: {reason}")
    assert run.relay[2]["missing"] == []
    (warning,) = [
        record.getMessage() for record in log.records if record.levelno == logging.WARNING
    ]
    assert warning.startswith(f"round 3: agent 1 failed. error 2: {reason}")
    assert any("2/3 answered | 1 failed | train loss" in line for line in log.messages)
    assert state_facts(grid, 1001)["num-neighbors"] == 2


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("<class 'KeyError'>:<''label''>", "KeyError: 'label'"),
        (
            "<class "
            "'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run()\n"
            "Traceback "
            "...\nflwr.clientapp.client_app.ClientAppException: \nException ClientAppException "
            "occurred. Message: agent 1'>",
            "agent 1",
        ),
        (
            "<class "
            "'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run()\n"
            '  File "app.py", line 3, in log_mod\n    print(reply["x"])\n'
            "KeyError: 'x'\n\nThe above exception was the direct cause of ...\n"
            "flwr.clientapp.client_app.ClientAppException: \nException ClientAppException "
            "occurred. Message: 'x''>",
            "KeyError: 'x'",
        ),
        (
            "<class "
            "'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run()\n"
            "flower_mcepl.errors.AnswerError: agent 1: no\n\nThe above exception was ...\n"
            "\nException ClientAppException occurred. Message: agent 1: no'>",
            "agent 1: no",
        ),
        ("<class 'flower_mcepl.errors.AnswerError'>:<'agent 1: no'>", "agent 1: no"),
        ("<class 'AssertionError'>:<''>", "AssertionError"),
        ("Node Unavailable", "Node Unavailable"),
        ("", "no reason given"),
        (None, "no reason given"),
    ],
)
def test_flowers_wrapping_is_cut_off_a_reason(raw: str | None, plain: str) -> None:
    assert plain_reason(raw) == plain


# --- bad input: frames ---

RUN = "00c0ffee00c0ffee"


@pytest.fixture(autouse=True)
def known_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id of the run is what `rewritten` frames have."""
    monkeypatch.setattr(book, "new_run_id", lambda: RUN)


def rewritten(frame: bytes, **changes: Any) -> bytes:
    """A sound frame in place of another one, whole, with something changed."""
    header, agent = read_header(frame), make_agent(0)
    options = {
        "sender": header.sender,
        "round": header.round,
        "fingerprint": agent.fingerprint,
        "prior": agent.prior,
        "run": RUN,
    }
    tensors = changes.pop("tensors", agent.outgoing())
    return encode_frame(tensors, **{**options, **changes})


def other_shape(frame: bytes) -> bytes:
    return rewritten(frame, tensors={"0.weight": torch.zeros(2, 2, dtype=torch.bool)}, prior=None)


def floats(frame: bytes) -> bytes:
    return rewritten(
        frame, tensors={name: torch.zeros(shape) for name, shape in make_agent(0).layers.items()}
    )


def replace_frame(message: Message, harm: Callable[[bytes], bytes]) -> None:
    """Change the frame of agent 0 in a message."""
    frames = message.content["frames"]
    frames["0/0"] = Array(np.frombuffer(harm(frame_bytes(frames["0/0"])), np.uint8))


def flipped(frame: bytes, at: int) -> bytes:
    damaged = bytearray(frame)
    damaged[at] ^= 0x10
    return bytes(damaged)


HARMS = [
    (lambda frame: frame[:-9], "TruncatedFrameError"),
    (lambda frame: frame[:7], "TruncatedFrameError"),
    (lambda frame: b"", "TruncatedFrameError"),
    (lambda frame: flipped(frame, len(frame) // 2), "CorruptFrameError"),
    (lambda frame: flipped(frame, len(frame) - 1), "CorruptFrameError"),
    (lambda frame: b"\x93NUMPY" + frame, "ForeignFrameError"),
    (lambda frame: rewritten(frame, sender=9), "ForeignFrameError"),
    (lambda frame: rewritten(frame, fingerprint="0" * 32), "ForeignFrameError"),
    (lambda frame: rewritten(frame, prior=None), "ForeignFrameError"),
    (lambda frame: rewritten(frame, run=RUN[::-1]), "ForeignFrameError"),
    (lambda frame: rewritten(frame, run=""), "ForeignFrameError"),
    (other_shape, "ForeignFrameError"),
    (floats, "ForeignFrameError"),
    (lambda frame: rewritten(frame, round=1), "ReplayedFrameError"),
    (lambda frame: rewritten(frame, round=99), "FutureFrameError"),
    (lambda frame: flipped(frame, 4), "FutureFrameError"),  # the version
]


@pytest.mark.usefixtures("no_report")
def test_a_bad_frame_is_refused_and_the_last_good_one_stays(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """From round 4 on every other frame of agent 0 to agent 1 is bad."""
    grid, rounds = agent_grid(3), 2 * len(HARMS) + 4
    harms = dict(zip(range(4, rounds, 2), HARMS, strict=False))
    assert len(harms) == len(HARMS)
    held = {}

    def tamper(message: Message) -> Message:
        if message.metadata.dst_node_id == 1001 and sent_round(message) in harms:
            replace_frame(message, harms[sent_round(message)][0])
        return message

    def look(round: int) -> None:
        held[round] = held_rounds(grid, 1001)
        if round > 1:
            assert state_facts(grid, 1001)["num-neighbors"] == 2

    grid.tamper = tamper
    gossip(grid, rounds=rounds, record=tmp_path, after=look)
    run = the_run(tmp_path)
    assert [line["answered"] for line in run.relay] == [3] * (rounds + 1)
    refused = {line["round"]: line["refused"] for line in run.relay if line["refused"]}
    assert list(refused) == list(harms)
    orders = [message for message in grid.log if message.metadata.dst_node_id == 1001]
    chains = {sent_round(order): down_frames(order).get(0, []) for order in orders}
    for round, (_, error) in harms.items():
        before, now, after = (held[r] for r in (round - 1, round, round + 1))
        assert before == {0: round - 2, 2: round - 2}
        assert now == {0: round - 2, 2: round - 1}
        assert after == {0: round, 2: round}
        ((reason,),) = refused[round].values()
        assert list(refused[round]) == ["1"]
        assert reason.startswith(f"{error}, frame of agent 0: "), (round, reason)
        assert f"round {round}: agent 1 refused a frame. {reason}" in log.messages
        # What it still holds of agent 0 is sound: the two deltas since then are enough.
        chain = chains[round + 1]
        assert [read_header(frame).reference for frame in chain] == [round - 2, round - 1]


def test_a_frame_that_is_held_already_changes_nothing() -> None:
    grid = agent_grid(3)
    held = {}

    def tamper(message: Message) -> Message:
        if message.metadata.dst_node_id == 1001 and sent_round(message) == 4:
            replace_frame(message, lambda frame: rewritten(frame, round=2))
        return message

    grid.tamper = tamper
    gossip(grid, rounds=6, after=lambda round: held.update({round: held_rounds(grid, 1001)}))
    assert [held[round] for round in (3, 4, 5)] == [{0: 2, 2: 2}, {0: 2, 2: 3}, {0: 4, 2: 4}]
    assert not any("refused" in answer.content["agent"] for answer in grid.answers)


def misfit(frame: bytes) -> bytes:
    """A sound delta against another mask of that round."""
    agent, header = make_agent(0), read_header(frame)
    assert header.reference
    elsewhere = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in agent.layers.items()}
    slightly = {name: mask.clone() for name, mask in elsewhere.items()}
    slightly["3.weight"].view(-1)[5] = True
    return rewritten(frame, tensors=slightly, reference=Reference(header.reference, elsewhere))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    "harm", [misfit, lambda frame: rewritten(frame, tensors=None)], ids=["misfit", "not held"]
)
def test_a_delta_that_does_not_fit_is_mended_in_the_next_round(
    harm: Callable[[bytes], bytes], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(3)
    held = {}
    later: list[bytes] = []

    def tamper(message: Message) -> Message:
        if message.metadata.dst_node_id == 1001 and sent_round(message) == 4:
            replace_frame(message, misfit if harm is misfit else lambda frame: later[0])
        return message

    def look(round: int) -> None:
        held[round] = held_rounds(grid, 1001)
        assert round == 1 or state_facts(grid, 1001)["num-neighbors"] == 2

    if harm is not misfit:  # a delta on the round 1 that it no longer holds
        agent = make_agent(0)
        masks = agent.outgoing()
        flipped_one = {**masks, "3.weight": masks["3.weight"].roll(1)}
        later.append(
            encode_frame(
                flipped_one,
                sender=0,
                round=3,
                fingerprint=agent.fingerprint,
                reference=Reference(1, masks),
                prior=agent.prior,
                run=RUN,
            )
        )
    grid.tamper = tamper
    gossip(grid, rounds=6, record=tmp_path, after=look)
    run = the_run(tmp_path)
    assert {line["round"]: line["lacking"] for line in run.relay if line["lacking"]} == {
        4: {"1": [0]}
    }
    assert not any(line["refused"] for line in run.relay)
    assert [
        line
        for line in log.messages
        if line.startswith("round 4: agent 1 lacks") and line.endswith("next: 0")
    ]
    assert [held[round] for round in (3, 4, 5)] == [{0: 2, 2: 2}, {0: 2, 2: 3}, {0: 4, 2: 4}]
    (chain,) = [
        down_frames(m)[0] for m in grid.log if m.metadata.dst_node_id == 1001 and sent_round(m) == 5
    ]
    assert [read_header(frame).reference for frame in chain] == [0, 1, 2, 3]  # from the last key on


# --- bad input: settings ---

GOOD = {"num-agents": 4, "topology": "ring"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"retention-conv": 0.0},
            r"retention-conv .*must be in \(0, 1\]; got 0\.0\. Use for example 0\.3",
        ),
        ({"retention-linear": 1.5}, r"retention-linear .*must be in \(0, 1\]; got 1\.5"),
        ({"retention-conv": "0.1, 0"}, r"retention-conv .*got 0\.0"),
        (
            {"retention-conv": "0.1; 0.3"},
            "retention-conv must be a number or numbers separated by commas",
        ),
        (
            {"retention-cov": 0.3},
            r"unknown run-config key 'retention-cov'\. Did you mean 'retention-conv'\?",
        ),
        ({"something": 1}, "unknown run-config key 'something'. Known keys: .*batch-size, "),
        ({"num-rounds": "many"}, r"run-config key num-rounds must be int; got 'many' \(str\)"),
        ({"num-rounds": 1.5}, "run-config key num-rounds must be int; got 1.5"),
        ({"num-agents": True}, "run-config key num-agents must be int; got True"),
        ({"seed": "0"}, "run-config key seed must be int"),
        ({"num-agents": 0}, "num-agents must be >= 1; got 0"),
        ({"num-rounds": 0}, "num-rounds must be >= 1; got 0"),
        ({"evaluate-every": 0}, "evaluate-every is a number of rounds and must be >= 1; got 0"),
        ({"max-staleness": -1}, "max-staleness is a number of rounds and must be >= 0; got -1"),
        ({"key-interval": -1}, "key-interval is .*must be >= 0; got -1"),
        ({"keep-frames": 1}, "run-config key keep-frames must be bool; got 1"),
        ({"min-agents": 5}, r"min-agents must be in 0\.\.4 \(num-agents\); got 5"),
        ({"round-timeout": 0.0}, "round-timeout must be > 0 seconds; got 0"),
        ({"score-lr": -1.0}, "score-lr must be a finite number >= 0; got -1"),
        (
            {"score-init": "zero"},
            "independent, magnitude; got 'zero'",
        ),
        ({"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N or mps; got 'gpu'"),
        ({"threads": -1}, "threads must be >= 0"),
        ({"topology": "rong"}, r"unknown topology 'rong'.*Did you mean 'ring'\?"),
        (
            {"topology": "random-regular:degree=9"},
            r"degree among 4 agents must be in 0\.\.3; got 9",
        ),
    ],
)
def test_a_bad_run_config_is_refused_before_anything_runs(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, TopologyError), match=message):
        GossipStrategy.from_run_config({**GOOD, **config})


def test_the_apps_own_keys_are_known() -> None:
    strategy = GossipStrategy.from_run_config(
        {**GOOD, "classes-per-agent": 3}, app_keys=["classes-per-agent"]
    )
    assert (strategy.attendance.at_first, strategy.attendance.later) == (4, 3)


def test_a_graph_with_an_unknown_agent(tmp_path: Path) -> None:
    file = tmp_path / "edges.txt"
    file.write_text("0 1\n1 9\n")
    with pytest.raises(
        TopologyError, match=r"edge \(1, 9\) names agent 9, but the graph has agents 0\.\.3\. Raise"
    ):
        GossipStrategy.from_run_config({**GOOD, "topology": f"file:{file}"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "ring"}, "topology must be a Topology, such as .*; got str"),
        ({"min_agents": 4}, r"min_agents must be in 0\.\.3; got 4"),
        ({"evaluate_every": 0}, "evaluate-every is a number of rounds and must be >= 1; got 0"),
        ({"max_staleness": -1}, "max-staleness is a number of rounds and must be >= 0; got -1"),
        (
            {"key_interval": -1},
            "key-interval is a number of rounds, or 0 for as few as pay; it must be >= 0; got -1",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GossipStrategy(**{"topology": Topology.ring(3), **options})


def test_no_rounds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_rounds must be >= 1; got 0"):
        gossip(agent_grid(2), rounds=0, record=tmp_path)
    assert not [*tmp_path.iterdir()]


# --- bad input: data, found by the clients in round 1 ---


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            lambda: (split(0, size=0), split(0)),
            "agent 2's training split is empty. Every agent needs at least one",
        ),
        (lambda: (split(0), split(0, size=0)), "agent 2's test split is empty"),
        (lambda: None, r"must return the pair \(train, test\), .*; for agent 2 it gave NoneType"),
        (
            lambda: (split(0),) * 4,
            r"must return the pair \(train, test\), .*; for agent 2 it gave a tuple of 4",
        ),
        (lambda: ("train", "test"), "agent 2's training split must be a pair of tensors"),
        (lambda: (split(0), 3), "agent 2's test split must be a pair of tensors"),
        (lambda: 1 / 0, "agent 2: ZeroDivisionError: division by zero"),
    ],
)
def test_bad_data_in_round_1(data: Callable[[], Any], reason: str) -> None:
    app = make_client_app(
        model_fn, lambda context: data() if agent_index(context) == 2 else data_fn(context)
    )
    grid = RecordingGrid(app, 3, RUN_CONFIG)
    with pytest.raises(
        RosterError,
        match=f"needs 3 agents, but 2 took part; missing: 2. node 1002: error 2: .*{reason}",
    ):
        gossip(grid)
    strategy = gossip(grid, min_agents=2)  # told to, the run goes on without that agent
    assert {row["agent"] for row in strategy.monitor.rows} == {0, 1}


def test_nan_inputs_in_round_1() -> None:
    grid = agent_grid(3, lambda index: stumbling_agent(index, who=2, round=1))
    with pytest.raises(
        RosterError,
        match=r"node 1002: error 2: agent 2: the training loss of round 1 is nan\. Lower",
    ):
        gossip(grid)


def huge(array: Array) -> bytes:
    """An npy header that asks for ten terabytes."""
    return (
        array.data[:10]
        + array.data[10:].split(b"\n")[0].replace(b"'shape': (", b"'shape': (99999999999")[:117]
        + b"\n"
    )


def spoil_facts(**facts: Any) -> Callable[[Any], None]:
    def spoil(content: Any) -> None:
        for key, value in facts.items():
            if value is None:
                del content["agent"][key]
            else:
                content["agent"][key] = value

    return spoil


def spoil_frame(make: Callable[[Array], bytes]) -> Callable[[Any], None]:
    def spoil(content: Any) -> None:
        array = content["frame"]["frame"]
        array.data = make(array)

    return spoil


def spoil_metric(key: str) -> Callable[[Any], None]:
    def spoil(content: Any) -> None:
        del content["metrics"][key]

    return spoil


SPOILS = [
    spoil_frame(lambda array: b""),
    spoil_frame(lambda array: b"no array"),
    spoil_frame(lambda array: b"PK\x03\x04" + array.data),
    spoil_frame(lambda array: array.data[:-1]),
    spoil_frame(huge),
    spoil_facts(agent=None),
    spoil_facts(agent="2"),
    spoil_facts(fingerprint=3),
    spoil_facts(fresh=None),
    spoil_facts(refused=3),
    spoil_facts(lacking=["0"]),
    spoil_facts(content=7),
    spoil_facts(content="c" * 100),
    spoil_facts(**{"builds-on": None}),
    spoil_facts(**{"builds-on": [1, 1, 1]}),
    spoil_facts(**{"builds-on": ["1"]}),
    spoil_facts(**{"builds-on": 1}),
    spoil_facts(**{"header-bytes": None}),
    spoil_facts(**{"header-bytes": [1.5]}),
    spoil_facts(**{"header-bytes": [-1]}),
    spoil_facts(**{"header-bytes": [10**9]}),
    spoil_facts(**{"held-rounds": None}),
    spoil_facts(**{"held-rounds": [1]}),
    spoil_facts(**{"held-agents": [True, False]}),
    spoil_facts(parameters="{"),
    spoil_facts(**{"num-weights": "many"}),
    spoil_facts(retention="x" * 20_000),
    spoil_metric("density"),
    lambda content: content.pop("metrics"),
    lambda content: content.pop("agent"),
]


@pytest.mark.usefixtures("no_report")
def test_a_damaged_answer_fails_one_agent_in_one_round(tmp_path: Path) -> None:
    """From round 3 on one answer a round is damaged, of agents 1 and 2 in turn."""
    grid, rounds = agent_grid(3), len(SPOILS) + 4
    spoils = {round: (1 + round % 2, spoil) for round, spoil in enumerate(SPOILS, start=3)}
    pull = grid.pull_messages

    def damage(ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(ids))
        agent, spoil = spoils.get(int(grid.log[-1].metadata.group_id), (None, None))
        for reply in replies:
            if agent is not None and reply.metadata.src_node_id == 1000 + agent:
                spoil(reply.content)
        return replies

    grid.pull_messages = damage  # type: ignore[method-assign]
    strategy = gossip(grid, rounds=rounds, evaluate_every=1, record=tmp_path)
    assert strategy.record is not None
    failed = {line["round"]: line["failed"] for line in read_run(strategy.record.path).relay}
    assert {round: [*agents] for round, agents in failed.items()} == {
        round: [f"agent {spoils[round][0]}"] if round in spoils else []
        for round in range(1, rounds + 2)
    }
    for round, (agent, _) in spoils.items():
        assert f"agent {agent} does not answer as an agent" in failed[round][f"agent {agent}"]
    for agent in (0, 1, 2):
        lost = {round - 1 for round, (spoiled, _) in spoils.items() if spoiled == agent}
        evaluated = [row["round"] for row in strategy.monitor.rows if row["agent"] == agent]
        assert evaluated == [round for round in range(1, rounds + 1) if round not in lost]


def test_rounds_and_timeout_come_from_the_run_config_unless_start_says_otherwise(
    tmp_path: Path,
) -> None:
    run_config = {
        "num-agents": 2,
        "num-rounds": 2,
        "round-timeout": 7.0,
        "record-dir": str(tmp_path),
    }
    for told, rounds, ttl in (({}, 2, 7.0), ({"num_rounds": 1, "timeout": 9.0}, 1, 9.0)):
        grid = InProcessGrid(
            make_agent_app(lambda context: make_agent(agent_index(context))), 2, run_config
        )
        GossipStrategy.from_run_config(run_config).start(grid=grid, **told)
        assert max(message.content["order"]["server-round"] for message in grid.log) == rounds + 1
        assert {message.metadata.ttl for message in grid.log} == {3 * ttl}
