"""Rounds that do not wait for the dead: deadlines, late answers, and the state of every
agent.
"""

import itertools
import logging
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private, needed by Message()
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError, RosterError, RunRecord, Topology, read_run, simulate
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.parcels import Answer, Posted
from flower_mcepl.runs.patience import FLOOR, WINDOW, Patience
from flower_mcepl.strategies import waiting
from flower_mcepl.strategies.dispatch import Dispatch
from tests.fleet.agents import make_fleet
from tests.fleet.flower import RecordingGrid, agent_grid, down_frames, gossip, sent_round
from tests.oracles.baselines import fleet_of, server_of


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


class DelayedGrid(RecordingGrid):
    """Answers arrive after as many seconds as a node takes in a round; None: never."""

    clock: Clock
    takes: Callable[[int, int], float | None] = staticmethod(lambda node, round: 1.0)

    def answered(self, message_id: str, node: int, reply: Message) -> None:
        if "order" not in self.log[-1].content:
            return super().answered(message_id, node, reply)  # who it is, a node says at once
        round = sent_round(self.log[-1])
        seconds = self.takes(node, round)
        if seconds is not None:
            self._kept_back[message_id] = (self.clock.now + seconds, reply)  # type: ignore[assignment]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id, (due, reply) in list(self._kept_back.items()):  # type: ignore[misc]
            if due <= self.clock.now:
                self._replies[message_id] = reply
                del self._kept_back[message_id]
        return super().pull_messages(message_ids)


def delayed_grid(size: int, clock: Clock, takes: Callable[[int, int], float | None]) -> DelayedGrid:
    grid = DelayedGrid(agent_grid(size).app, size)
    grid.clock, grid.takes = clock, takes  # type: ignore[method-assign]
    return grid


# --- for how long ---


def test_patience_is_learned_from_rounds_of_the_same_kind() -> None:
    patience = Patience(600.0, 5.0)
    for seconds in (20.0, 30.0):
        patience.learn({1: seconds, 2: seconds}, evaluating=False)
        assert patience.deadline(evaluating=False) == 600.0  # too little is known
    patience.learn({1: 40.0, 2: 30.0}, evaluating=False)
    assert patience.usual(evaluating=False) == 30.0
    assert patience.deadline(evaluating=False) == 150.0
    assert patience.deadline(evaluating=True) == 600.0
    for _ in range(3):
        patience.learn({1: 0.5}, evaluating=True)
    assert patience.deadline(evaluating=True) == FLOOR
    for _ in range(30):  # what is long ago is forgotten
        patience.learn({1: 200.0, 2: 200.0}, evaluating=False)
    assert patience.deadline(evaluating=False) == 600.0  # never longer than the timeout


def test_patience_without_a_factor_is_the_timeout() -> None:
    patience = Patience(600.0, 0.0)
    for _ in range(9):
        patience.learn({1: 1.0}, evaluating=False)
    assert patience.deadline(evaluating=False) == 600.0


TIMES = st.lists(
    st.dictionaries(st.integers(0, 6), st.floats(0.0, 1e4), min_size=1), min_size=1, max_size=25
)


def typical(rounds: list[dict[int, float]], among: set[int]) -> float | None:
    """Upper median of the nodes' medians over the last rounds, by sorting."""
    middles = []
    for node in among:
        times = sorted(round[node] for round in rounds[-WINDOW:] if node in round)
        if times:
            middles.append((times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2)
    return sorted(middles)[len(middles) // 2] if middles and len(rounds) >= 3 else None


@given(rounds=TIMES, among=st.sets(st.integers(0, 6)), factor=st.floats(0.5, 9.0))
def test_a_deadline_is_that_of_a_typical_node(
    rounds: list[dict[int, float]], among: set[int], factor: float
) -> None:
    patience = Patience(5e3, factor)
    for round in rounds:
        patience.learn(round, evaluating=False)
    usual = typical(rounds, among)
    assert patience.usual(evaluating=False, among=among) == usual
    deadline = 5e3 if usual is None else min(5e3, max(FLOOR, factor * usual))
    assert patience.deadline(evaluating=False, among=among) == deadline
    late = {n for n in among if (own := typical([*rounds, {}, {}][:20], {n})) and own > deadline}
    assert len(rounds) > 18 or patience.slow(among, evaluating=False) == late
    assert deadline <= patience.own_deadline(among, evaluating=False) <= 5e3


@given(
    honest=st.lists(st.floats(10.0, 20.0), min_size=1, max_size=9),
    slow=st.lists(st.floats(0.0, 1e9), max_size=8),
)
def test_fewer_than_half_of_the_nodes_do_not_stretch_a_deadline(
    honest: list[float], slow: list[float]
) -> None:
    patience, times = Patience(1e6, 5.0), [*honest, *slow[: len(honest) - 1]]
    for _ in range(9):
        patience.learn(dict(enumerate(times)), evaluating=False)
    assert patience.deadline(evaluating=False) <= 5.0 * 20.0


def test_a_bad_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="timeout-factor must be >= 0"):
        gossip(agent_grid(2), timeout_factor=-1.0)


# --- rounds that go on ---


def test_a_dead_agent_holds_up_one_round_and_no_later_one(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(4, clock, lambda node, round: None if node == 1002 and round >= 6 else 2.0)
    ends = []
    strategy = gossip(grid, rounds=12, evaluate_every=99, timeout=600.0, record=tmp_path,
                      after=lambda round: ends.append(clock.now),
                      incomplete=True)  # fmt: skip
    spent = [end - begin for begin, end in itertools.pairwise(ends)]
    assert all(2.0 <= seconds < 2.5 for seconds in spent[:4])
    assert FLOOR <= spent[4] < FLOOR + 4.0  # round 6: a deadline that was learned, not ten minutes
    assert all(2.0 <= seconds < 2.5 for seconds in spent[5:-1])
    # round 12 waits once more, as no later one could take its answer
    assert FLOOR <= spent[-1] < FLOOR + 10.0
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert [line["missing"] for line in run.relay[:12]] == [[]] * 5 + [[2]] * 7
    assert run.relay[5]["states"] == {"agent 2": "late"}
    assert [line["states"] for line in run.relay[6:12]] == [{}] * 6  # told once
    # a node that owes an answer gets no other message
    assert [sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1002] == [1, 2, 3, 4, 5, 6]


def test_a_late_answer_counts_as_the_one_of_its_round(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    grid = delayed_grid(4, clock, lambda node, round: 62.0 if (node, round) == (1002, 8) else 2.0)
    strategy = gossip(
        grid, rounds=12, evaluate_every=2, timeout=600.0, timeout_factor=1.0, record=tmp_path
    )
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    late = {line["round"]: line["late"] for line in run.relay if line["late"]}
    assert late == {9: {"2": 8}}
    assert run.relay[7]["missing"] == [2]
    assert run.relay[7]["states"] == {"agent 2": "late"}
    assert run.relay[8]["states"] == {"agent 2": "running"}
    assert run.relay[8]["answered"] == 4

    # Its neighbors got its frame of round 8 with their parcels of round 10, and in
    # round 9 none.
    def frames_of_2(round: int) -> list[int]:
        return [len(down_frames(m).get(2, [])) for m in grid.log
                if sent_round(m) == round and m.metadata.dst_node_id in (1001, 1003)]  # fmt: skip

    assert frames_of_2(9) == [0, 0]
    assert frames_of_2(10) == [1, 1]
    assert [sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1002] == [
        *range(1, 9),
        *range(10, 14),
    ]
    assert "round 8: agent 2 is late" in caplog.messages
    assert "round 9: agent 2 is running again (was late)" in caplog.messages
    assert any("4/4 answered (1 late)" in line for line in caplog.messages)
    # its message of round 9, in which it would have evaluated, was not sent; all other
    # rows are there once
    assert sorted((row["round"], row["agent"]) for row in run.rounds) == sorted(
        (round, agent)
        for round in (2, 4, 6, 8, 10, 12)
        for agent in range(4)
        if (round, agent) != (8, 2)
    )


def test_a_late_evaluation_is_told_of_its_round(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 601.0 if (node, round) == (1001, 5) else 2.0)
    strategy = gossip(grid, rounds=7, evaluate_every=2, timeout=600.0, record=tmp_path)
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert run.relay[5]["late"] == {"1": 5}
    assert [row["round"] for row in run.rounds if row["agent"] == 1] == [2, 4, 6, 7]


def test_a_stall_of_all_is_not_the_death_of_some(clock: Clock) -> None:
    """Nobody answers before the deadline; the first who does ends the round, not the
    deadline.
    """
    grid = delayed_grid(4, clock, lambda node, round: 100.0 if round == 6 else 2.0)
    strategy = gossip(grid, rounds=8, evaluate_every=99, timeout=600.0)
    assert len(strategy.monitor.train_loss) == 8
    assert {sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1003} == set(range(1, 10))


def test_the_last_round_waits_for_late_answers(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 80.0 if (node, round) == (1000, 6) else 2.0)
    strategy = gossip(
        grid, rounds=7, evaluate_every=99, timeout=600.0, timeout_factor=1.0, record=tmp_path
    )
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert run.relay[6]["late"] == {"0": 6}
    # and the closing exchange has all
    assert [line["answered"] for line in run.relay] == [4] * 5 + [3, 4, 4]


def test_nobody_answers_any_more(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(3, clock, lambda node, round: None if round >= 3 else 1.0)
    with pytest.raises(RosterError, match="round 5 needs 2 agents, but 0 took part"):
        gossip(grid, rounds=9, timeout=50.0, record=tmp_path)
    assert clock.now < 4 * 50.0


def test_a_message_that_nobody_answers_in_its_time_is_given_up(
    clock: Clock, tmp_path: Path
) -> None:
    grid = delayed_grid(3, clock, lambda node, round: None if (node, round) == (1001, 2) else 40.0)
    strategy = gossip(grid, rounds=9, evaluate_every=99, timeout=50.0, record=tmp_path)
    assert strategy.record is not None
    relay = read_run(strategy.record.path).relay
    sent = [sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1001]
    assert sent[:3] == [1, 2, 6]  # 150 s later
    assert relay[1]["states"] == {"agent 1": "late"}
    assert relay[4]["failed"] == {"agent 1": "no answer to the message of round 2 within its time"}
    assert relay[5]["states"] == {"agent 1": "running"}


def test_a_node_that_leaves_and_returns_owes_nothing(clock: Clock, tmp_path: Path) -> None:
    """It was killed at work; its late answer never comes, and it is asked again as soon
    as it is back.
    """
    grid = delayed_grid(4, clock, lambda node, round: None if (node, round) == (1001, 5) else 2.0)
    steps = {6: lambda: grid.down.add(1001), 8: grid.down.clear}
    strategy = gossip(
        grid, rounds=10, evaluate_every=99, timeout=600.0, record=tmp_path, before=steps
    )
    assert strategy.record is not None
    relay = read_run(strategy.record.path).relay
    assert [sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1001] == [
        1,
        2,
        3,
        4,
        5,
        8,
        9,
        10,
        11,
    ]
    states = {
        line["round"]: line["states"]["agent 1"] for line in relay if "agent 1" in line["states"]
    }
    assert states == {1: "running", 5: "late", 6: "gone", 8: "running"}


def test_an_answer_of_long_ago_does_not_hide_that_the_present_one_is_owed(
    clock: Clock, tmp_path: Path
) -> None:
    """Agent 1 leaves in round 5 and is back in round 8, in which its answer of round 5
    comes, and no other.
    """
    takes = {(1001, 5): 70.0, (1001, 8): 100.0}
    grid = delayed_grid(4, clock, lambda node, round: takes.get((node, round), 2.0))
    steps = {6: lambda: grid.down.add(1001), 8: grid.down.clear}
    strategy = gossip(
        grid, rounds=10, evaluate_every=99, timeout=600.0, record=tmp_path, before=steps
    )
    assert strategy.record is not None
    back = read_run(strategy.record.path).relay[7]
    assert (back["late"], back["missing"], back["states"]) == ({"1": 5}, [1], {"agent 1": "late"})
    later = read_run(strategy.record.path).relay[8:]
    assert [
        line["round"] for line in later if line["late"] == {"1": 8} and line["missing"] == []
    ] == [10]


def test_a_node_that_was_never_heard_of_may_be_late(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(3, clock, lambda node, round: 70.0 if (node, round) == (1002, 1) else 20.0)
    strategy = gossip(
        grid, rounds=6, evaluate_every=99, timeout=60.0, min_agents=2, record=tmp_path
    )
    assert strategy.record is not None
    relay = read_run(strategy.record.path).relay
    assert relay[0]["states"] == {
        "agent 0": "running",
        "agent 1": "running",
        "agent 2": "gone",
        "node 1002": "late",
    }
    assert relay[1]["late"] == {"2": 1}
    assert relay[1]["states"] == {"agent 2": "running"}
    assert [line["missing"] for line in relay[1:]] == [[]] * 6


def test_failures_are_told_when_they_change(tmp_path: Path) -> None:
    grid = agent_grid(3)
    steps = {2: lambda: grid.unavailable.add(1002), 4: grid.unavailable.clear}
    strategy = gossip(grid, rounds=5, record=tmp_path, before=steps)
    assert strategy.record is not None
    states = [line["states"] for line in read_run(strategy.record.path).relay]
    assert states[1:] == [
        {"agent 2": "failed: error 5: Node Unavailable"},
        {},
        {"agent 2": "running"},
        {},
        {},
    ]


# --- slow agents ---


def spent_in_rounds(
    clock: Clock, path: Path, takes: Callable[[int, int], float | None], size: int, rounds: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds of each round but the first, and the lines of the rounds."""
    grid = delayed_grid(size, clock, takes)
    ends: list[float] = []
    strategy = gossip(
        grid,
        Topology.ring(size),
        rounds=rounds,
        evaluate_every=99,
        timeout=3600.0,
        record=path,
        after=lambda round: ends.append(clock.now),
    )
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert run.status == "finished"  # the slow ones closed, too
    return [end - begin for begin, end in itertools.pairwise(ends)], run.relay


class ScriptedFleet:
    """Grid of nodes that only take their time, as many seconds as they are told to."""

    def __init__(self, clock: Clock, takes: Callable[[int], float]) -> None:
        self.clock, self.takes = clock, takes
        self._due: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            key = message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            keys.append(key)
            seconds = self.takes(message.metadata.dst_node_id)
            reply = Message(RecordDict(), reply_to=message)
            self._due[key] = (self.clock.now + seconds, reply)
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        keys = [key for key in message_ids if self._due[key][0] <= self.clock.now]
        return [self._due.pop(key)[1] for key in keys]


def test_one_slow_node_of_many_stretches_no_round(clock: Clock) -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    grid = ScriptedFleet(clock, lambda node: 200.0 if node == 7 else 20.0)
    dispatch = Dispatch(timeout=3600.0, timeout_factor=5.0)
    spent, answered, late = [], [], []
    for round in range(1, 31):
        began = clock.now
        nodes = set(range(20)) - dispatch.busy()
        messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]
        replies = dispatch.play(cast(Grid, grid), messages, round=round, evaluating=False,
                                first=round == 1, last=round == 30)  # fmt: skip
        origins = [dispatch.origin(reply, round) for reply in replies]
        late += [(node, at) for at, node in origins if at != round]
        answered.append(len(origins))
        spent.append(clock.now - began)
    # rounds 1 to 4 teach what is usual: there the slow one is waited for
    assert all(199.0 < seconds < 204.0 for seconds in spent[:4])
    assert all(20.0 <= seconds < 22.0 for seconds in spent[4:-1])
    # its answers count when they come; the last round waits for the one that is owed
    assert len(late) >= 2
    assert {node for node, _ in late} == {7}
    assert min(answered) == 19
    assert spent[-1] < 204.0
    assert not dispatch.busy()


@pytest.mark.parametrize(("size", "slow", "waited"), [(2, 1, True), (3, 1, False), (4, 2, True)])
def test_half_of_a_fleet_is_waited_for(
    clock: Clock, tmp_path: Path, size: int, slow: int, waited: bool
) -> None:
    """Of two agents none is typical, and of four with two slow ones neither kind is."""
    spent, relay = spent_in_rounds(
        clock, tmp_path, lambda node, round: 200.0 if node < 1000 + slow else 20.0, size, 10
    )
    limit = 200.0 if waited else 20.0
    assert all(limit <= seconds < limit + 4.0 for seconds in spent[3:-1])
    assert any(line["late"] for line in relay) is not waited


def test_a_queue_that_moves_slowly_is_no_dead_agent(clock: Clock, tmp_path: Path) -> None:
    """In simulation agents wait for a core: one after the other, and in round 7 all of
    them ten times as long.
    """
    spent, relay = spent_in_rounds(
        clock,
        tmp_path,
        lambda node, round: (node - 999) * (60.0 if round == 7 else 6.0),
        8,
        9,
    )
    assert [line["missing"] for line in relay] == [[]] * 10
    assert max(spent) < 8 * 60.0 + 4.0


# --- a server ---


def test_a_server_leaves_a_late_answer_out_if_it_has_a_newer_model() -> None:
    agents, server = fleet_of("fedavg", 3), server_of("fedavg", 3)
    center = Center[bytes](server, open_frame=bytes, wrap_frame=bytes)
    from flower_mcepl.exchange.turn import open_mail, play_round

    mails = [open_mail(agent, max_staleness=5) for agent in agents]
    replies = [
        play_round(a, m, center.parcel(a.index, round=1))
        for a, m in zip(agents, mails, strict=True)
    ]

    def answer(agent: int, *, round: int) -> list[str]:
        frames = [
            Posted(f.data, len(f.data), f.header_bytes, f.reference) for f in replies[agent].frames
        ]
        facts, held = agents[agent].describe(), replies[agent].held
        return center.take(agent, Answer(facts, {}, frames, held=held), round=round)

    assert answer(0, round=1) == answer(1, round=1) == []
    center.parcel(0, round=2)  # aggregates
    before = {name: tensor.clone() for name, tensor in server.state().tensors.items()}
    assert answer(2, round=1) == []  # late: nothing wrong with it
    center.parcel(0, round=3)
    assert all((tensor == before[name]).all() for name, tensor in server.state().tensors.items())


def test_the_arrays_of_late_frames_are_handed_on_as_they_came(clock: Clock) -> None:
    grid = delayed_grid(2, clock, lambda node, round: 40.0 if (node, round) == (1000, 2) else 2.0)
    gossip(grid, Topology.complete(2), rounds=5, evaluate_every=99, timeout=30.0)
    came = {id(a) for r in grid.answers for a in r.content.array_records.get("frame", {}).values()}
    went: list[Array] = [a for m in grid.log for a in m.content.array_records["frames"].values()]
    assert went
    assert {id(array) for array in went} <= came


def test_options_reach_the_strategy() -> None:
    from flower_mcepl.strategies import GossipStrategy

    config: dict[str, Any] = {
        "num-agents": 3,
        "timeout-factor": 2.5,
        "checkpoint-every": 7,
        "resume": "",
    }
    strategy = GossipStrategy.from_run_config(config)
    options = strategy.options
    assert (options.timeout_factor, options.checkpoint_every, options.resume) == (2.5, 7, "")
    for key, value in (("timeout-factor", -1.0), ("checkpoint-every", -1)):
        with pytest.raises(ConfigError, match=f"{key} .*must be >= 0"):
            GossipStrategy.from_run_config({**config, key: value})


# --- the same on the virtual clock of a simulation ---


@pytest.mark.parametrize("slow", [70.0, 150.0, 400.0])
def test_a_simulation_leaves_the_same_agents_behind(
    slow: float, clock: Clock, tmp_path: Path
) -> None:
    """Who is late, which answers count in which round, and every payload."""
    speeds = [30.0, 30.0, 30.0, slow, 40.0]
    grid = delayed_grid(5, clock, lambda node, round: speeds[node - 1000])
    options: dict[str, Any] = {"evaluate_every": 4, "timeout_factor": 1.5}
    gossip(grid, rounds=12, timeout=1000.0, record=tmp_path, name="flower", **options)
    record = RunRecord.create(tmp_path, name="simulated", config={})
    simulate(
        make_fleet(5),
        Topology.ring(5),
        num_rounds=12,
        record=record,
        speeds=", ".join(map(str, speeds)),
        round_timeout=1000.0,
        **options,
    )
    (flower,) = tmp_path.glob("*-flower*")
    keys = ("round", "answered", "late", "missing", "frames", "train_loss")
    lines = [
        [{key: line[key] for key in keys} for line in read_run(path).relay]
        for path in (flower, record.path)
    ]
    assert lines[0] == lines[1]
    assert any(line["late"] for line in lines[1]) == (slow > 1.5 * 40.0)
