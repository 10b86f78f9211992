"""The center of server-based algorithms: what it opens, refuses, counts and sends; and
whole runs around it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flower_mcepl import (
    ConfigError,
    FingerprintError,
    RunRecord,
    Topology,
    TopologyError,
    read_run,
    simulate,
)
from flower_mcepl.agents import load_state
from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.parcels import Answer, Parcel, Posted
from flower_mcepl.exchange.turn import Reply, open_mail, play_round
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table
from flower_mcepl.runs.book import RunBook
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.wire import encode_frame, read_header
from tests.fleet.agents import noisy_net, same_tensors, split
from tests.oracles.baselines import agent_of, fleet_of, serve, server_of

SERVED = ["fedavg", "ditto", "fedpm", "fedspa"]
N = 3
SETTINGS = {"local_epochs": 2, "num_rounds": 8, "score_lr": 20.0}
NOISY = {"model_fn": noisy_net, "split": split, "batch_size": 8, "momentum": 0.5, **SETTINGS}
NOISY["score_optimizer"] = "sgd"  # that has a momentum

Spoil = Callable[[bytes], bytes]


def center_of(server: Any, **options: Any) -> Center[bytes]:
    return Center[bytes](server, open_frame=bytes, wrap_frame=bytes, **options)


@dataclass
class Run:
    """Agents around a center, round by round, with all that passes between them."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=lambda: SETTINGS)

    def __post_init__(self) -> None:
        self.server = server_of(self.algorithm, N, **self.settings)
        self.center = center_of(self.server)
        self.agents = fleet_of(self.algorithm, N, **self.settings)
        self.mails = [open_mail(agent, max_staleness=5) for agent in self.agents]
        self.lines: list[str] = []
        self.monitor = RunMonitor(self.center, num_rounds=99, log=self.lines.append)
        self.book = RunBook(self.center, self.monitor, run="0" * 16)
        self.parcels: dict[tuple[int, int], Parcel[bytes]] = {}
        self.replies: dict[tuple[int, int], Reply] = {}

    def play(
        self,
        *rounds: int,
        absent: Collection[int] = (),
        up: Mapping[int, Spoil] | None = None,
        down: Mapping[int, Spoil] | None = None,
        closing: bool = False,
    ) -> None:
        """``up`` and ``down`` spoil the frames from and to an agent on their way."""
        for round in rounds:
            present = [agent for agent in self.agents if agent.index not in absent]
            for agent in present:
                self.parcels[round, agent.index] = self.center.parcel(
                    agent.index, round=round, closing=closing
                )
            answers = {
                agent.index: self._answer(agent.index, round, up or {}, down or {})
                for agent in present
            }
            self.book.close_round(round, answers)

    def _answer(
        self, index: int, round: int, up: Mapping[int, Spoil], down: Mapping[int, Spoil]
    ) -> Answer[bytes]:
        parcel = self.parcels[round, index]
        if index in down:
            parcel = replace(parcel, frames={N: [down[index](frame) for frame in parcel.frames[N]]})
        reply = self.replies[round, index] = play_round(
            self.agents[index], self.mails[index], parcel
        )
        spoil = up.get(index, bytes)
        posts = [
            Posted(spoil(f.data), len(f.data), f.header_bytes, f.reference) for f in reply.frames
        ]
        facts = self.agents[index].describe()
        return Answer(facts, reply.metrics, posts, None, reply.held, reply.refused, reply.lacking)

    def restart(self, index: int) -> None:
        """The agent's device loses all that it kept."""
        self.agents[index] = agent_of(self.algorithm, index, **self.settings)
        self.mails[index] = open_mail(self.agents[index], max_staleness=5)

    def aggregate(self, round: int) -> None:
        """Let the center take in the round before, as the first parcel of ``round``
        does.
        """
        self.center.parcel(0, round=round)


def flipped(frame: bytes) -> bytes:
    return frame[:-9] + bytes([frame[-9] ^ 1]) + frame[-8:]


# --- the wire changes no bit ---


@pytest.mark.parametrize("algorithm", SERVED)
def test_over_the_wire_or_not_the_bits_are_the_same(algorithm: str) -> None:
    server, agents = server_of(algorithm, N, **NOISY), fleet_of(algorithm, N, **NOISY)
    simulate(agents, server=server, num_rounds=5, evaluate_every=2)
    truth_server, truth = server_of(algorithm, N, **NOISY), fleet_of(algorithm, N, **NOISY)
    serve(truth_server, truth, 1, 2, 3, 4, 5)
    for mine, true in zip([server, *agents], [truth_server, *truth], strict=True):
        assert same_tensors(mine.state().tensors, true.state().tensors)
        assert mine.state().facts == true.state().facts


@pytest.mark.parametrize("algorithm", SERVED)
def test_the_same_seeds_give_the_same_rows_and_frames(algorithm: str) -> None:
    def run(seed: int) -> tuple[Any, ...]:
        frames: list[bytes] = []

        def keep(round: int, agent: int, reply: Reply) -> None:
            frames.extend(frame.data for frame in reply.frames)

        agents = fleet_of(algorithm, N, seed=seed, **NOISY)
        result = simulate(
            agents,
            server=server_of(algorithm, N, seed=seed, **NOISY),
            num_rounds=3,
            evaluate_every=1,
            on_reply=keep,
        )
        return [{k: v for k, v in row.items() if k != "seconds"} for row in result.rows], frames

    first = run(5)
    torch.manual_seed(3)
    assert run(5) == first
    other = run(6)
    assert other[0] != first[0]
    assert not set(other[1]) & set(first[1])


# --- parcels ---


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_parcel_holds_the_servers_frame_of_the_round_before(algorithm: str) -> None:
    run = Run(algorithm)
    run.center.evaluate_every = 2
    run.play(1, 2, 3)
    run.play(4, closing=True)
    for (round, agent), parcel in run.parcels.items():
        assert parcel.round == round
        assert parcel.whole is False
        if round == 1:
            assert (parcel.neighbors, parcel.frames, parcel.evaluate, parcel.acknowledged) == (
                None,
                {},
                False,
                None,
            )
            continue
        assert parcel.neighbors == (N,)
        (frame,) = parcel.frames[N]
        header = read_header(frame, run.server.layers_down)
        assert (header.sender, header.round) == (N, round - 1)
        assert (parcel.evaluate, parcel.train) == (round in (3, 4), round < 4)
        assert parcel.acknowledged == round - 1
        assert run.replies[round, agent].held == {N: round - 1}
        assert (run.replies[round, agent].refused, run.replies[round, agent].lacking) == ([], [])
    assert run.monitor.evaluations().keys() == {2, 3}
    assert all("refused" not in line for line in run.lines)


@pytest.mark.parametrize("algorithm", SERVED)
def test_what_all_get_is_encoded_once(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2, 3)
    for round in (2, 3):
        frames = {id(run.parcels[round, agent].frames[N][0]) for agent in range(N)}
        assert len(frames) == (N if algorithm == "fedspa" else 1)


def test_places_travel_as_changes_once_they_are_known() -> None:
    run = Run("fedspa")
    run.play(1, 2, 3)
    for agent in range(N):
        down = [
            read_header(run.parcels[t, agent].frames[N][0], run.server.layers_down) for t in (2, 3)
        ]
        up = [
            read_header(run.replies[t, agent].frames[0].data, run.server.layers) for t in (1, 2, 3)
        ]
        assert [header.reference for header in down] == [None, 2 - 1]
        assert [header.reference for header in up] == [None, 1, 2]


def test_a_frame_for_all_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets it may hold any older model or none."""
    run = Run("fedspa")
    monkeypatch.setattr(run.server, "shared", True, raising=False)
    run.play(1, 2, 3, 4)
    frames = [frame for parcel in run.parcels.values() for frame in parcel.frames.get(N, [])]
    assert len(frames) == 3 * N
    assert {read_header(frame, run.server.layers_down).reference for frame in frames} == {None}


def test_masks_travel_as_changes_once_they_are_known() -> None:
    run = Run("fedpm")
    run.play(1, 2)
    # whatever is shorter
    assert [run.replies[t, 0].frames[0].reference for t in (1, 2)] in ([None, 1], [None, None])
    assert all(len(run.replies[t, 0].frames) == 1 for t in (1, 2))


@pytest.mark.parametrize("algorithm", SERVED)
def test_who_holds_the_newest_model_gets_nothing(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2)
    run.play(3, up=dict.fromkeys(range(N), flipped))  # nothing of round 3 can be read
    run.play(4)
    assert {agent for agent in range(N) if run.parcels[4, agent].frames} == set()
    assert {run.parcels[4, agent].neighbors for agent in range(N)} == {(N,)}
    run.play(5)
    for agent in range(N):
        assert read_header(run.parcels[5, agent].frames[N][0], run.server.layers_down).round == 4
        assert run.replies[5, agent].held == {N: 4}


# --- bytes ---


@pytest.mark.parametrize("algorithm", SERVED)
def test_the_ledger_counts_every_frame_once_up_or_once_down(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2, 3)
    run.play(4, closing=True)
    ledger = run.center.ledger
    for agent in range(N):
        up = [
            frame.data
            for (_, who), reply in run.replies.items()
            if who == agent
            for frame in reply.frames
        ]
        down = [
            f
            for (_, who), parcel in run.parcels.items()
            if who == agent
            for fs in parcel.frames.values()
            for f in fs
        ]
        assert (len(up), len(down)) == (3, 3)
        assert ledger.uplinks[agent].bytes == sum(map(len, up))
        assert ledger.links[N, agent].bytes == ledger.received(agent) == sum(map(len, down))
        assert ledger.sent(agent) == 0
    assert set(ledger.links) == {(N, agent) for agent in range(N)}
    totals = ledger.totals()
    assert (
        totals["links_total"] == ledger.sent(N) == sum(ledger.received(agent) for agent in range(N))
    )
    assert totals["relay_total"] == totals["links_total"] + totals["uplink_total"]
    assert totals["deliveries"] == totals["link_frames"] == totals["uplink_frames"] == 3 * N
    assert totals["fp32_total"] == 9 * 4 * run.agents[0].describe()["num-weights"]
    if algorithm == "fedavg":
        assert totals["links_total"] == totals["uplink_total"]
        assert totals["links_total"] - totals["header_total"] / 2 == totals["fp32_total"]


# --- agents that are missing, late, or new ---


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_missing_agent_is_left_out_and_comes_back(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2)
    run.play(3, 4, absent=[1])
    truth_server, truth = server_of(algorithm, N, **SETTINGS), fleet_of(algorithm, N, **SETTINGS)
    serve(truth_server, truth, 1, 2)
    # Its parcel of round 3 was lost, too: it still lives under the model of round 1.
    serve(truth_server, truth, 3, 4, absent=[1])
    run.aggregate(5)
    assert same_tensors(run.server.state().tensors, truth_server.state().tensors)
    run.play(5)
    truth[1].fuse({N: truth_server.payload_for(1, round=4)}, round=4)
    serve(truth_server, truth, 5)
    run.aggregate(6)
    assert same_tensors(run.server.state().tensors, truth_server.state().tensors)


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_bad_frame_is_refused_and_the_round_goes_on(algorithm: str, tmp_path: Path) -> None:
    run = Run(algorithm)
    run.monitor.record = RunRecord.create(name="bad", config={}, path=tmp_path / "run")
    run.play(1)
    run.play(2, up={1: flipped})
    run.play(3)
    line = next(line for line in run.lines if "refused" in line)
    assert line.startswith(
        "round 2: the server refused a frame. CorruptFrameError, frame of agent 1: "
    )
    assert [row["refused"] for row in read_run(tmp_path / "run").relay][::2] == [{}, {}]
    assert list(read_run(tmp_path / "run").relay[1]["refused"]) == [str(N)]
    truth_server, truth = server_of(algorithm, N, **SETTINGS), fleet_of(algorithm, N, **SETTINGS)
    serve(truth_server, truth, 1)
    truth[1].train(round=2)
    serve(truth_server, truth, 2, absent=[1])
    truth[1].fuse({N: truth_server.payload_for(1, round=2)}, round=2)
    serve(truth_server, truth, 3)
    run.aggregate(4)
    assert same_tensors(run.server.state().tensors, truth_server.state().tensors)


def payload_of(agent: Any) -> dict[str, Any]:
    agent.train(round=1)
    return dict(agent.outgoing())


def swapped_kind(payload: dict[str, Any], algorithm: str) -> dict[str, Any]:
    tensor = payload["0.weight"].to_dense()
    return {**payload, "0.weight": tensor.float() if algorithm == "fedpm" else tensor > 0}


def with_nan(payload: dict[str, Any], algorithm: str) -> dict[str, Any]:
    return {**payload, "0.bias": torch.full((6,), float("nan"))}


def other_layers(payload: dict[str, Any], algorithm: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in payload.items() if name != "0.weight"}


@pytest.mark.parametrize(
    ("algorithm", "change", "round", "message"),
    [
        *(
            (a, swapped_kind, 2, "ForeignFrameError.*layer '0.weight' must hold (a mask|floats)")
            for a in SERVED
        ),
        (
            "fedavg",
            with_nan,
            2,
            "CorruptFrameError.*values must be finite; .*sender 1 .*some in layer '0.bias'",
        ),
        ("fedspa", with_nan, 2, "CorruptFrameError.*values must be finite"),
        ("fedavg", other_layers, 2, "ForeignFrameError.*must have the receiver's layers"),
        (
            "fedavg",
            dict,
            1,
            "ReplayedFrameError.*of the present round, 2; agent 1 sent one of round 1",
        ),
        ("fedavg", dict, 7, "FutureFrameError"),
    ],
)
def test_a_frame_of_which_nothing_can_be_made_is_refused(
    algorithm: str, change: Callable[..., dict[str, Any]], round: int, message: str
) -> None:
    server = server_of(algorithm, N, **SETTINGS)
    center, agent = center_of(server), agent_of(algorithm, 1, **SETTINGS)
    payload = payload_of(agent)
    changed = dict(payload) if change is dict else change(payload, algorithm)
    frame = encode_frame(changed, sender=1, round=round, fingerprint=server.fingerprint)
    before = server.state().tensors
    answer = Answer(agent.describe(), {}, [Posted(frame, len(frame), 0, None)])
    (reason,) = center.take(1, answer, round=2)
    assert reason.startswith(message.partition(".*")[0] + ", frame of agent 1: ")
    assert re.match(message, reason)
    center.parcel(0, round=3)
    assert same_tensors(before, server.state().tensors)
    assert center.ledger.uplinks[1].bytes == len(frame)  # it did travel


def test_a_damaged_envelope_is_refused() -> None:
    def refuse(frame: bytes) -> bytes:
        raise CorruptFrameError("its envelope is damaged.")

    center = Center[bytes](server_of("fedavg", N), open_frame=refuse, wrap_frame=bytes)
    assert center.take(0, Answer({}, {}, [Posted(b"?", 1, 0, None)]), round=1) == [
        "CorruptFrameError, frame of agent 0: its envelope is damaged."
    ]
    assert center.take(0, Answer({}, {}), round=1) == []


@pytest.mark.parametrize("algorithm", SERVED)
def test_who_began_from_an_old_model_does_not_count(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2)
    run.play(3, down={1: flipped})  # agent 1 goes on from the model of round 1
    assert run.replies[3, 1].held == {N: 1}
    assert "CorruptFrameError" in run.replies[3, 1].refused[0]
    truth_server, truth = server_of(algorithm, N, **SETTINGS), fleet_of(algorithm, N, **SETTINGS)
    serve(truth_server, truth, 1, 2)
    serve(truth_server, truth, 3, absent=[1])
    run.aggregate(4)
    theirs, mine = truth_server.state().tensors, run.server.state().tensors
    models = {name for name in mine if not name.startswith("mask-1/")}
    assert same_tensors({n: mine[n] for n in models}, {n: theirs[n] for n in models})
    run.play(4)
    assert run.replies[4, 1].held == {N: 3}


@pytest.mark.parametrize("algorithm", SERVED)
def test_an_agent_that_lost_its_memory_gets_a_whole_frame(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2, 3)
    run.restart(1)
    run.play(4, 5, 6)
    # FedSpa's frames tell changes of places: it must ask once more. The others' frames
    # are always whole.
    assert run.replies[4, 1].lacking == ([N] if algorithm == "fedspa" else [])
    assert run.replies[4, 1].held == ({} if algorithm == "fedspa" else {N: 3})
    assert run.replies[4, 1].frames[0].reference is None
    assert read_header(run.parcels[5, 1].frames[N][0], run.server.layers_down).reference is None
    assert [run.replies[t, 1].held for t in (5, 6)] == [{N: 4}, {N: 5}]
    assert [run.replies[t, 1].refused for t in (4, 5, 6)] == [[], [], []]
    if algorithm == "fedspa":
        # they moved in round 6 ...
        assert same_tensors(run.agents[1].masks, run.server._masks[1]) is False
        run.aggregate(7)
        # ... and the server knows where to
        assert same_tensors(run.agents[1].masks, run.server._masks[1])


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_newcomer_begins_from_the_servers_model_where_that_can_be(algorithm: str) -> None:
    run = Run(algorithm)
    run.play(1, 2, absent=[2])
    run.play(3)
    parcel = run.parcels[3, 2]
    assert parcel.neighbors == (N,)
    assert parcel.acknowledged is None
    if algorithm == "fedspa":  # nobody knows its mask yet
        assert (parcel.frames, run.replies[3, 2].held) == ({}, {})
    else:
        assert run.replies[3, 2].held == {N: 2}
    run.play(4)
    assert run.replies[4, 2].held == {N: 3}


# --- whole runs ---


@pytest.mark.parametrize("algorithm", SERVED)
def test_a_run_leaves_a_record_that_shows(algorithm: str, tmp_path: Path) -> None:
    server, agents = server_of(algorithm, N, **SETTINGS), fleet_of(algorithm, N, **SETTINGS)
    record, lines = RunRecord.create(name="served", config={}, path=tmp_path / "run"), []
    result = simulate(
        agents, server=server, num_rounds=3, evaluate_every=2, record=record, log=lines.append
    )
    read = read_run(tmp_path / "run")
    assert read.rounds == result.rows
    assert len(read.rounds) == 2 * N
    assert read.config["topology"]["num_agents"] == N
    assert Topology.from_config(read.config["topology"]).links() == ()
    assert read.config["server"] == {"number": N, **server.parameters()}
    assert [agent["agent"] for agent in read.config["agents"]] == [0, 1, 2]
    assert {(link["sender"], link["receiver"]) for link in read.summary["links"]} == {
        (N, k) for k in range(N)
    }
    assert list(read.agents) == [0, 1, 2]
    assert "3/3 answered" in lines[0]
    later = server_of(algorithm, N, **SETTINGS)
    later.restore(load_state(record.agents_dir / "server.safetensors"))
    assert same_tensors(later.state().tensors, server.state().tensors)
    assert "3 agents, 3 rounds" in agent_table(read)
    if algorithm == "fedspa":  # the picture shows no algorithm, but what all records say
        assert plot_run(read).stat().st_size > 10_000


def test_a_run_has_a_graph_or_a_server() -> None:
    server, agents, ring = server_of("fedavg", N), fleet_of("fedavg", N), Topology.ring(N)
    with pytest.raises(ConfigError, match="over a graph or through a server; got neither"):
        simulate(agents, num_rounds=1)
    with pytest.raises(ConfigError, match="over a graph or through a server; got both"):
        simulate(agents, ring, server=server, num_rounds=1)
    with pytest.raises(
        ConfigError, match=r"agents of algorithm fedavg hear a server, .*Pass server=make_server"
    ):
        simulate(agents, ring, num_rounds=1)


def test_agents_and_server_must_fit() -> None:
    with pytest.raises(
        TopologyError, match=r"the graph has agents 0\.\.1, in this order; got agents \[0, 1, 2\]"
    ):
        simulate(fleet_of("fedavg", N), server=server_of("fedavg", 2), num_rounds=1)
    with pytest.raises(
        FingerprintError, match="agent 0 and the server have different algorithms: dsgd and fedavg"
    ):
        simulate(fleet_of("dsgd", N), server=server_of("fedavg", N), num_rounds=1)
    with pytest.raises(
        FingerprintError, match=r"agent 0 and the server have different frozen weights"
    ):
        simulate(fleet_of("fedavg", N), server=server_of("fedavg", N, seed=1), num_rounds=1)


@pytest.mark.parametrize("bad", [{"evaluate_every": 0}, {"max_staleness": -1}])
def test_numbers_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="is a number of rounds and must be >="):
        simulate(fleet_of("fedavg", N), server=server_of("fedavg", N), num_rounds=1, **bad)


def test_agents_without_a_word_from_anyone_are_evaluated_at_the_end() -> None:
    center = center_of(server_of("fedspa", N))
    parcel = center.parcel(0, round=4, closing=True)
    assert (parcel.neighbors, parcel.frames, parcel.evaluate, parcel.train) == (
        (N,),
        {},
        True,
        False,
    )
