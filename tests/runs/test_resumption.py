"""Runs that resume: what a relay, a center and whole runs do after an interruption is
what they do without one.
"""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import AgentData, ConfigError, MceplAgent, RunRecord, Topology, read_run, simulate
from flower_mcepl.agents import load_state
from flower_mcepl.clients import app as client_module
from flower_mcepl.clients import make_agent_app, memory
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.errors import RecordError, RosterError
from flower_mcepl.exchange.parcels import Answer, Posted
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.record.layout import checkpoint_rounds
from flower_mcepl.runs import checkpoint
from flower_mcepl.runs.checkpoint import (
    drop_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    set_damaged_aside,
)
from flower_mcepl.runs.same_run import check_same_run
from flower_mcepl.strategies import GossipStrategy, ServerStrategy, handover
from tests.fleet.agents import make_agent, make_fleet, same_tensors, split
from tests.fleet.flower import sent_round
from tests.fleet.grid import InProcessGrid
from tests.fleet.twins import Twin
from tests.oracles.baselines import agent_of, fleet_of, server_of

SIZE, ROUNDS = 4, 5


class Interruption(Exception):
    """What ends a run in these tests, as a kill would."""


def saved(state: Bundle, folder: Path) -> Bundle:
    """What comes back from the disk."""
    save_checkpoint(folder, 1, state)
    return newest_checkpoint(folder)


# --- the relay ---


@st.composite
def stories(draw: st.DrawFn) -> list[dict[int, dict[str, Any]]]:
    """What the agents answer in some rounds: whether, what they hold, what they lack,
    which frames they send.
    """
    answer = st.fixed_dictionaries(
        {
            "held": st.dictionaries(st.integers(0, SIZE - 1), st.integers(0, 6), max_size=3),
            "lacking": st.lists(st.integers(0, SIZE - 1), max_size=2, unique=True),
            "frames": st.lists(
                st.tuples(st.binary(max_size=9), st.none() | st.integers(0, 6)), max_size=2
            ),
            "late": st.integers(0, 1),
        }
    )
    return draw(st.lists(st.dictionaries(st.integers(0, SIZE - 1), answer), min_size=1, max_size=7))


def play(
    relay: Relay[bytes], story: list[dict[int, dict[str, Any]]], *, first: int
) -> Iterator[Any]:
    """Play some rounds, and give what can be seen of them."""
    for round, answers in enumerate(story, start=first):
        yield [relay.parcel(agent, round=round) for agent in range(SIZE)]
        for agent, answer in answers.items():
            facts = {"agent": agent, "num-weights": 10 * agent, "kept-weights": 3}
            posts = [
                Posted(frame, len(frame), len(frame) // 2, builds_on)
                for frame, builds_on in answer["frames"]
            ]
            told = Answer(facts, {}, posts, held=answer["held"], lacking=answer["lacking"])
            relay.take(agent, told, round=max(1, round - answer["late"]))
        yield relay.ledger.changes(), relay.ledger.totals(), relay.ledger.link_rows()


@pytest.mark.parametrize("spec", ["ring", "random-neighbors:degree=2"])
@given(story=stories(), at=st.integers(0, 6))
@settings(max_examples=60)
def test_a_relay_that_was_saved_and_restored_gives_the_same_parcels(
    spec: str, story: Any, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at, topology = min(at, len(story)), Topology.parse(spec, num_agents=SIZE)
    relay, later = (Relay[bytes](topology, evaluate_every=2, max_staleness=2) for _ in range(2))
    list(play(relay, story[:at], first=1))
    later.restore(saved(relay.state(round=at), tmp_path_factory.mktemp("checkpoint")))
    assert list(play(later, story[at:], first=at + 1)) == list(
        play(relay, story[at:], first=at + 1)
    )


def test_a_late_frame_never_takes_the_place_of_a_newer_one() -> None:
    relay = Relay[bytes](Topology.ring(3))
    for round, frame in ((3, b"new"), (2, b"old")):
        relay.take(0, Answer({}, {}, [Posted(frame, 3, 0, None)]), round=round)
    relay.take(1, Answer({}, {}), round=3)
    assert relay.parcel(1, round=4).frames == {0: [b"new"]}
    assert relay.ledger.uplinks[0].frames == 2  # both have come over the wire


# --- checkpoints on disk ---


def test_checkpoints_are_exact_and_the_previous_one_is_kept(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(5, dtype=np.float32).reshape(1, 5),
        "b": np.zeros(0, np.uint8),
        "c": np.array([True]),
    }
    for round in (3, 6, 9):
        save_checkpoint(tmp_path, round, Bundle({"π": [0.1, None, "ß"]}, arrays))
    assert checkpoint_rounds(tmp_path) == [6, 9]
    found = newest_checkpoint(tmp_path)
    assert found.facts == {"round": 9, "π": [0.1, None, "ß"]}
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].tobytes() == array.tobytes()
        assert found.arrays[name].shape == array.shape


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:9], lambda data: data[:50] + b"X" + data[51:]],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    told: list[str] = []
    for round in (1, 2):
        save_checkpoint(tmp_path, round, Bundle({}, {"a": np.zeros(9)}))
    newest = tmp_path / "round-000002.checkpoint"
    newest.write_bytes(damage(newest.read_bytes()))
    assert newest_checkpoint(tmp_path, told.append).facts["round"] == 1
    (line,) = told
    assert "round-000002.checkpoint is damaged" in line
    assert "Going back to the checkpoint before it." in line
    older = tmp_path / "round-000001.checkpoint"
    older.write_bytes(damage(older.read_bytes()))
    with pytest.raises(
        RecordError,
        match=r"no checkpoint in .* is whole: .*000002.* is damaged.*000001.* is damaged",
    ):
        newest_checkpoint(tmp_path)


def test_numbers_of_numpy_are_facts_as_in_the_record(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, Bundle({"num-examples": np.int64(20), "held": {3: np.arange(2)}}))
    assert newest_checkpoint(tmp_path).facts == {
        "round": 1,
        "num-examples": 20,
        "held": {"3": [0, 1]},
    }


def test_a_sound_checkpoint_that_cannot_be_used_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, Bundle({}))
    with monkeypatch.context() as newer_release:
        newer_release.setattr(
            checkpoint, "SEAL", checkpoint.SEAL._replace(version=checkpoint.SEAL.version + 1)
        )
        save_checkpoint(tmp_path, 2, Bundle({}))
    with pytest.raises(
        RecordError, match=r"000002.checkpoint cannot be used: .*Use the release that wrote it"
    ):
        newest_checkpoint(tmp_path)


def test_damaged_checkpoints_are_set_aside_and_deleted_with_the_others(tmp_path: Path) -> None:
    for round in (1, 2):
        save_checkpoint(tmp_path / "checkpoint", round, Bundle({}))
    set_damaged_aside(tmp_path / "checkpoint", after=1)
    assert checkpoint_rounds(tmp_path / "checkpoint") == [1]
    assert (tmp_path / "checkpoint" / "round-000002.checkpoint.damaged").is_file()
    drop_checkpoints(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


# --- whole runs in one process ---

Fleet = Callable[[], dict[str, Any]]
DIFFERENCES = {"precision": "int8-differences"}  # frames build on what the outbox keeps
FLEETS: dict[str, Fleet] = {
    "mcepl": lambda: {"agents": make_fleet(SIZE), "topology": Topology.ring(SIZE)},
    "dfedavgm": lambda: {
        "agents": fleet_of("dfedavgm", **DIFFERENCES),
        "topology": Topology.ring(SIZE),
    },
    "choco": lambda: {"agents": fleet_of("choco"), "topology": Topology.ring(SIZE)},
    "dispfl": lambda: {
        "agents": fleet_of("dispfl", anneal_rounds=9),
        "topology": Topology.ring(SIZE),
    },
    **{
        name: lambda name=name: {"agents": fleet_of(name), "server": server_of(name)}  # type: ignore[misc]
        for name in ("fedavg", "ditto", "fedspa", "fedpm")
    },
}


def plain_rows(path: Path, file: str) -> list[dict[str, Any]]:
    """The lines of a record without what a clock says."""
    rows = [json.loads(line) for line in (path / file).read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def assert_same_records(one: Path, two: Path) -> None:
    for file in ("rounds.jsonl", "relay.jsonl", "traffic.jsonl"):
        assert plain_rows(one, file) == plain_rows(two, file), file
    left, right = read_run(one), read_run(two)
    assert left.summary is not None
    assert right.summary is not None
    for key in ("status", "num_rounds", "accuracy", "bytes", "links"):
        assert left.summary[key] == right.summary[key], key
    names = sorted(path.name for path in (one / "agents").iterdir())
    assert names == sorted(path.name for path in (two / "agents").iterdir())
    assert len(names) >= SIZE
    for name in names:
        mine, other = load_state(one / "agents" / name), load_state(two / "agents" / name)
        assert mine.facts == other.facts
        assert same_tensors(mine.tensors, other.tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Records of runs that nothing interrupted."""
    found: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in found:
            record = RunRecord.create(tmp_path_factory.mktemp(name), name=name, config={})
            simulate(**FLEETS[name](), num_rounds=ROUNDS, evaluate_every=2, record=record)
            found[name] = record.path
        return found[name]

    return make


def break_off(
    fleet: dict[str, Any], folder: Path, *, at: tuple[int, int], every: int = 1, **config: Any
) -> Path:
    """Begin a run that ends when an agent has answered in a round."""

    def stumble(round: int, agent: int, reply: object) -> None:
        if (round, agent) == at:
            raise Interruption

    record = RunRecord.create(folder, name="broken", config=config)
    with pytest.raises(Interruption):
        simulate(
            **fleet,
            num_rounds=ROUNDS,
            evaluate_every=2,
            record=record,
            checkpoint_every=every,
            on_reply=stumble,
        )
    return record.path


def every_round(first: int, last: int) -> list[Any]:
    """Runs that break off in each round; those between are slow."""
    rounds = range(first, last + 1)
    middle = rounds[2:-1]
    return [
        pytest.param(name, round, marks=[pytest.mark.slow] if round in middle else [])
        for name in ("mcepl", "fedavg")
        for round in rounds
    ]


CASES = every_round(2, ROUNDS + 1)


@pytest.mark.parametrize(
    ("name", "round"),
    [
        *CASES,
        ("dfedavgm", 4),
        ("dispfl", 4),
        ("choco", 4),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("fedspa", "fedpm", "ditto")),
    ],
)
def test_a_resumed_simulation_is_one_that_was_never_interrupted(
    name: str, round: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = break_off(FLEETS[name](), tmp_path, at=(round, 2))
    result = simulate(
        **FLEETS[name](), num_rounds=ROUNDS, evaluate_every=2, checkpoint_every=1, resume=path
    )
    assert_same_records(path, whole(name))
    assert result.rows == [
        json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()
    ]
    (noted,) = read_run(path).config["resumptions"]
    assert noted["after_round"] == round - 1
    assert noted["versions"]["torch"]
    assert not (path / "checkpoint").exists()


def test_a_run_may_break_off_again_and_again_and_between_checkpoints(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 0), every=2)
    assert len(read_run(path).relay) == 3  # round 3 was played and is played again
    tried = iter((3, 5))

    def stumble(round: int, agent: int, reply: object) -> None:
        if (round, agent) == (4, 1) and next(tried) == 3:
            raise Interruption

    again = {"num_rounds": ROUNDS, "evaluate_every": 2, "checkpoint_every": 2, "resume": path}
    with pytest.raises(Interruption):
        simulate(**FLEETS["mcepl"](), **again, on_reply=stumble)
    simulate(**FLEETS["mcepl"](), **again, on_reply=stumble)
    assert_same_records(path, whole("mcepl"))
    assert [noted["after_round"] for noted in read_run(path).config["resumptions"]] == [2, 2]


def test_a_damaged_checkpoint_costs_the_rounds_since_the_one_before(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    newest = path / "checkpoint" / "round-000003.checkpoint"
    newest.write_bytes(newest.read_bytes()[:-7])
    told: list[str] = []
    options = {"num_rounds": ROUNDS, "evaluate_every": 2, "checkpoint_every": 1, "resume": path}
    simulate(**FLEETS["mcepl"](), **options, log=told.append)
    assert "is damaged" in told[0]
    assert_same_records(path, whole("mcepl"))


def test_a_record_may_hold_the_run_config_that_the_agents_were_made_from(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = break_off(
        FLEETS["mcepl"](), tmp_path, at=(4, 2), run_config={"algorithm": "mcepl", "score-lr": 1.0}
    )
    simulate(**FLEETS["mcepl"](), num_rounds=ROUNDS, evaluate_every=2, resume=path)
    assert_same_records(path, whole("mcepl"))


def test_more_rounds_than_the_run_had(tmp_path: Path) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    longer = RunRecord.create(tmp_path, name="longer", config={})
    simulate(**FLEETS["mcepl"](), num_rounds=ROUNDS + 2, evaluate_every=2, record=longer)
    simulate(**FLEETS["mcepl"](), num_rounds=ROUNDS + 2, evaluate_every=2, resume=path)
    assert_same_records(path, longer.path)


def fleet_on(data: AgentData) -> list[MceplAgent]:
    """The fleet of these tests, whose first agent has other data."""
    agents = make_fleet(SIZE)
    agents[0].data = data
    return agents


DATA = make_agent(0).data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_every": 3}, "evaluate_every was 2 and is now 3"),
        ({"max_staleness": 1}, "max_staleness was 5 and is now 1"),
        ({"threads": 2}, "threads was 1 and is now 2"),
        ({"topology": Topology.complete(SIZE)}, "topology was .* and is now "),
        ({"agents": make_fleet(SIZE, seed=8)}, "seed was 7 and is now 8"),
        (
            {"agents": [*make_fleet(SIZE - 1), make_agent(SIZE - 1, score_lr=0.5)]},
            r"; score-lr of agent 3 was 1\.0 and is now 0\.5\. Resume it as it was",
        ),
        (
            {"agents": make_fleet(SIZE, retention={"conv": 0.3, "linear": 0.2})},
            r"retention of agent 0 was \{.*'linear': 0\.9\} and is now \{.*'linear': 0\.2\}",
        ),
        (
            {"agents": fleet_on(AgentData.of(split(0, size=23), split(1), agent=0))},
            "num-examples of agent 0 was 24 and is now 23",
        ),
        (
            {"agents": fleet_on(dataclasses.replace(DATA, evaluated="validation"))},
            "num-test-examples of agent 0 was 24 and is now not set",
        ),
        (
            {"agents": fleet_on(dataclasses.replace(DATA, class_counts={"train": {0: 24}}))},
            "train-counts of agent 0 was '0:.* 1:.* 2:.*' and is now '0:24'",
        ),
        (
            {"num_rounds": ROUNDS - 1},
            f"num-rounds may grow when a run is resumed, not shrink; it was {ROUNDS}; got 4",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    before = (path / "relay.jsonl").read_text()
    with pytest.raises(ConfigError, match=message):
        simulate(
            **{
                **FLEETS["mcepl"](),
                "num_rounds": ROUNDS,
                "evaluate_every": 2,
                "resume": path,
                **options,
            }
        )
    assert (path / "relay.jsonl").read_text() == before  # and nothing has changed


def test_classes_that_one_side_keeps_to_itself_are_not_compared(tmp_path: Path) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    options = {"num_rounds": ROUNDS, "evaluate_every": 2, "resume": path, "tell_classes": False}
    simulate(**FLEETS["mcepl"](), **options)
    assert read_run(path).finished


@pytest.mark.parametrize("algorithm", [{}, {"algorithm": "mcepl"}])
def test_more_rounds_are_refused_where_a_schedule_would_become_longer(
    algorithm: dict[str, str],
) -> None:
    before = {"lr-schedule": "cosine", **algorithm, "num-rounds": 100}
    after = before | {"num-rounds": 400}
    with pytest.raises(ConfigError, match="lr-rounds would change from 100 to 400"):
        check_same_run(
            {"run_config": before, "num_rounds": 100}, {"run_config": after, "num_rounds": 400}
        )


def test_what_cannot_be_resumed_is_refused(whole: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"num_rounds": ROUNDS, "evaluate_every": 2}
    with pytest.raises(
        RecordError, match=r"can be resumed until it has finished, and the one in .* has, after"
    ):
        simulate(**FLEETS["mcepl"](), **options, resume=whole("mcepl"))
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(2, 0), every=0)
    with pytest.raises(RecordError, match=r"is resumed from a checkpoint, and .* holds none"):
        simulate(**FLEETS["mcepl"](), **options, resume=path)
    with pytest.raises(RecordError, match=r"a run record is a folder with config.json"):
        simulate(**FLEETS["mcepl"](), **options, resume=tmp_path)
    with pytest.raises(RecordError, match="of one run"):
        simulate(**FLEETS["mcepl"](), num_rounds=1, record=RunRecord(whole("mcepl")))
    with pytest.raises(ConfigError, match="Leave out record"):
        simulate(**FLEETS["mcepl"](), **options, resume=path, record=RunRecord(path))
    with pytest.raises(ConfigError, match="checkpoints are part of a run record"):
        simulate(**FLEETS["mcepl"](), **options, checkpoint_every=1)
    path = break_off(FLEETS["mcepl"](), tmp_path / "other", at=(3, 0))
    next((path / "agents").glob("agent-0001-*")).unlink()
    with pytest.raises(RecordError, match="that of agent 1 is missing"):
        simulate(**FLEETS["mcepl"](), **options, resume=path)


def test_a_run_whose_summary_finds_no_room_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunRecord, status: str, **summary: Any) -> None:
        raise RecordError("no space left on device")

    record, lines = RunRecord.create(tmp_path, name="full", config={}), list[str]()
    options: dict[str, Any] = {"num_rounds": 2, "record": record, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "finish", full)
        with pytest.raises(RecordError, match="no space left"):
            simulate(**FLEETS["mcepl"](), **options, log=lines.append)
    assert "can go on after round 2" in lines[-1]


def test_a_record_whose_lines_were_rewritten_is_refused_as_it_is(tmp_path: Path) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    rows = path / "rounds.jsonl"
    rewritten = rows.read_bytes().replace(b"\n", b"\r\n")
    rows.write_bytes(rewritten)
    with pytest.raises(RecordError, match="has rewritten the file"):
        simulate(**FLEETS["mcepl"](), num_rounds=ROUNDS, evaluate_every=2, resume=path)
    assert rows.read_bytes() == rewritten


def test_a_record_of_a_run_that_is_still_going_on_is_refused(tmp_path: Path) -> None:
    path = break_off(FLEETS["mcepl"](), tmp_path, at=(4, 2))
    options = {"num_rounds": ROUNDS, "evaluate_every": 2, "resume": path}
    met = []

    def look(round: int, agent: int, reply: object) -> None:
        if (round, agent) == (5, 0):
            with pytest.raises(RecordError, match=f"is still going on, in process {os.getpid()}"):
                simulate(**FLEETS["mcepl"](), **options)
            met.append(round)

    simulate(**FLEETS["mcepl"](), **options, on_reply=look)
    assert met == [5]


def kill(round: int, agent: int, reply: object) -> None:
    if (round, agent) == (4, 2):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_a_record_that_is_resumed(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    def play() -> None:
        record = RunRecord.create(tmp_path, name="killed", config={})
        options = {"num_rounds": ROUNDS, "evaluate_every": 2, "checkpoint_every": 2}
        simulate(**FLEETS["mcepl"](), **options, record=record, on_reply=kill)

    assert Twin(play).wait() == -signal.SIGKILL
    (path,) = tmp_path.iterdir()
    assert (path / ".lock").exists()  # it holds nobody up
    simulate(**FLEETS["mcepl"](), num_rounds=ROUNDS, evaluate_every=2, resume=path)
    assert_same_records(path, whole("mcepl"))


# --- through Flower's messages ---


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clients think that they are in Flower's simulation."""
    for module in (client_module, memory, handover):
        monkeypatch.setattr(module, "in_simulation", lambda: True)


FIRST = {"conv": 0.3, "linear": 0.9}  # retention of the common first mask
node_ids = itertools.count(1000, 1000)


def new_grid(
    name: str, size: int = SIZE, *, make: Callable[[int], Any] | None = None, **node_config: Any
) -> InProcessGrid:
    """Nodes under new ids, with empty contexts."""
    settings = DIFFERENCES if name == "dfedavgm" else {}
    if make is None:
        of_name = partial(agent_of, name, **settings)
        make = make_agent if name == "mcepl" else of_name
    client_module._agents.clear()
    grid = InProcessGrid(make_agent_app(lambda context: make(agent_index(context))), 0)
    first = next(node_ids)
    for index in range(size):
        grid.add_node(first + (7 * index) % 10, index, **node_config)  # not in the agents' order
    return grid


def strategy_of(name: str, **options: Any) -> GossipStrategy | ServerStrategy:
    options = {"evaluate_every": 2, "wait_timeout": 0.01, "checkpoint_every": 1, **options}
    if name in ("mcepl", "dfedavgm"):
        return GossipStrategy(Topology.ring(SIZE), **options)
    return ServerStrategy(server_of(name), **options)


def run_flower(
    name: str, *, stop: int | None = None, grid: InProcessGrid | None = None, **options: Any
) -> Any:
    strategy = strategy_of(name, **options)

    def look(round: int, _: object) -> None:
        if round == stop:
            raise Interruption

    if stop is None:
        strategy.start(grid or new_grid(name), num_rounds=ROUNDS, evaluate_fn=look)
    else:
        with pytest.raises(Interruption):
            strategy.start(grid or new_grid(name), num_rounds=ROUNDS, evaluate_fn=look)
    return strategy


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("name", "round"),
    [
        *every_round(1, ROUNDS),
        ("dfedavgm", 1),
        ("dfedavgm", 4),
    ],
)
def test_a_resumed_run_of_flower_is_one_that_was_never_interrupted(
    name: str, round: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = run_flower(name, stop=round, record=tmp_path)
    path = broken.record.path
    resumed = run_flower(name, resume=path)
    assert resumed.record.path == path
    assert resumed.book.run == broken.book.run
    run, expected = read_run(path), read_run(whole(name))
    assert [line["round"] for line in run.relay] == list(range(1, ROUNDS + 2))
    assert [line["frames"] for line in run.relay] == [line["frames"] for line in expected.relay]
    assert [line["fresh"] for line in run.relay[1:]] == [[]] * ROUNDS
    assert plain_rows(path, "rounds.jsonl") == plain_rows(expected.path, "rounds.jsonl")
    assert plain_rows(path, "traffic.jsonl") == plain_rows(expected.path, "traffic.jsonl")
    assert run.summary is not None
    assert expected.summary is not None
    assert run.summary["bytes"] == expected.summary["bytes"]
    for file in (expected.path / "agents").iterdir():
        mine, other = load_state(path / "agents" / file.name), load_state(file)
        assert mine.facts == other.facts
        assert same_tensors(mine.tensors, other.tensors)
    assert sorted(file.name for file in (path / "agents").iterdir()) == sorted(
        file.name for file in (expected.path / "agents").iterdir()
    )


@pytest.mark.usefixtures("simulated")
def test_rounds_since_the_checkpoint_are_played_again(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = run_flower("mcepl", stop=4, record=tmp_path, checkpoint_every=3).record.path
    assert len(read_run(path).relay) == 4
    grid = new_grid("mcepl")
    run_flower("mcepl", resume=path, grid=grid, checkpoint_every=3)
    assert {
        sent_round(message) for message in grid.log if message.metadata.message_type != "query"
    } == {4, 5, 6}
    assert plain_rows(path, "rounds.jsonl") == plain_rows(whole("mcepl"), "rounds.jsonl")


@pytest.mark.usefixtures("simulated")
def test_an_agent_that_is_missing_when_a_run_resumes_is_named(tmp_path: Path) -> None:
    path = run_flower("mcepl", stop=3, record=tmp_path).record.path
    with pytest.raises(RosterError, match=r"there are nodes of 3 agents; missing agents: 3\."):
        run_flower("mcepl", resume=path, grid=new_grid("mcepl", 3))
    run_flower("mcepl", resume=path, grid=new_grid("mcepl", 3), min_agents=3)
    assert [line["missing"] for line in read_run(path).relay[3:]] == [[3]] * 3
    running = {f"agent {agent}": "running" for agent in range(3)}
    assert read_run(path).relay[3]["states"] == {**running, "agent 3": "gone"}


@pytest.mark.usefixtures("simulated")
def test_a_run_goes_on_without_the_agent_that_had_died_before_it_broke_off(tmp_path: Path) -> None:
    """All were there at the checkpoint, after round 3; one died in round 4."""
    grid = new_grid("mcepl")
    strategy = strategy_of("mcepl", record=tmp_path, checkpoint_every=3)

    def look(round: int, _: object) -> None:
        if round == 3:
            grid.down.add(strategy.roster.node_of[3])
        if round == 4:
            raise Interruption

    with pytest.raises(Interruption):
        strategy.start(grid, num_rounds=ROUNDS, evaluate_fn=look)
    assert strategy.record is not None
    path = strategy.record.path

    def die(message: Message) -> Message:
        if message.metadata.message_type == "train":
            raise Interruption
        return message

    dying = new_grid("mcepl", 3)
    dying.tamper = die
    # it breaks off again before a round is over, when round 4 is forgotten
    with pytest.raises(Interruption):
        strategy_of("mcepl", resume=path).start(dying, num_rounds=ROUNDS)
    run_flower("mcepl", resume=path, grid=new_grid("mcepl", 3))
    run = read_run(path)
    assert [noted["answered"] for noted in run.config["resumptions"]] == [3, 3]
    assert [line["missing"] for line in run.relay] == [[]] * 3 + [[3]] * 3


@pytest.mark.usefixtures("simulated")
def test_an_agent_of_flower_may_come_back_with_a_retention_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_flower("mcepl", stop=3, record=tmp_path).record.path
    own = {1: {"retention": {"conv": 0.3, "linear": 0.5}, "first_retention": FIRST}}
    grid = new_grid("mcepl", make=lambda index: make_agent(index, **own.get(index, {})))
    with caplog.at_level("INFO", logger="flwr"):
        run_flower("mcepl", resume=path, grid=grid)
    run = read_run(path)
    assert run.finished
    (line,) = (text for text in caplog.messages if "other settings or data" in text)
    assert line.startswith(
        "round 4: agent 1 has other settings or data: first-retention was not set"
    )
    assert line.endswith(f"; retention was {FIRST}, now {own[1]['retention']}")
    assert [line["fresh"] for line in run.relay[1:]] == [[]] * ROUNDS  # from its state, not anew
    linear = [run.handshakes[agent]["parameters"]["retention"]["linear"] for agent in range(SIZE)]
    assert linear == [0.9, 0.5, 0.9, 0.9]
    densities = [line["density"] for line in run.rounds if line["agent"] == 1]
    assert densities[0] > 0.8
    assert densities[-1] < 0.6


@pytest.mark.usefixtures("simulated")
def test_a_resumed_run_needs_the_same_run_config(tmp_path: Path) -> None:
    config = {
        "algorithm": "dispfl",
        "num-agents": SIZE,
        "num-rounds": ROUNDS,
        "record-dir": str(tmp_path),
        "checkpoint-every": 1,
        "seed": 7,
    }

    def start(**changes: Any) -> None:
        strategy = GossipStrategy.from_run_config(
            {**config, **{k.replace("_", "-"): v for k, v in changes.items()}}
        )
        strategy.start(new_grid("dispfl"), evaluate_fn=look)

    def look(round: int, _: object) -> None:
        if round == 2:
            raise Interruption

    with pytest.raises(Interruption):
        start()
    (path,) = tmp_path.iterdir()
    resume = str(path)
    with pytest.raises(ConfigError, match=r"run-config key lr was not set and is now 0\.05"):
        start(resume=resume, lr=0.05)
    with pytest.raises(ConfigError, match="run-config key seed was 7 and is now 8"):
        start(resume=resume, seed=8)
    with pytest.raises(ConfigError, match="anneal-rounds would change from 5 to 6"):
        start(resume=resume, num_rounds=6)
    free = {"round_timeout": 9.0, "wait_timeout": 3.0, "timeout_factor": 2.0, "checkpoint_every": 2}
    free |= {
        "keep_frames": True,
        "tell_classes": False,
        "state_runs": 1,
    }
    start(resume=resume, record_dir="elsewhere", **free)
    assert read_run(path).summary is not None


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_devices_keep_the_states_of_the_checkpoints(
    stop: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """On devices every agent has its states on its own disk, not in the record."""
    (tmp_path / "runs").mkdir()
    on_disk = {"state-dir": str(tmp_path / "states")}
    grid = new_grid("mcepl", **on_disk)
    path = run_flower(
        "mcepl", stop=stop, record=tmp_path / "runs", checkpoint_every=3, grid=grid
    ).record.path
    assert not (path / "agents").exists()
    run_flower("mcepl", resume=path, checkpoint_every=3, grid=new_grid("mcepl", **on_disk))
    assert [line["fresh"] for line in read_run(path).relay[1:]] == [[]] * ROUNDS
    for file in ("rounds.jsonl", "traffic.jsonl"):
        assert plain_rows(path, file) == plain_rows(whole("mcepl"), file)
