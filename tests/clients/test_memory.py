"""Where an agent's state is between two messages: on the device's disk, in the Context,
handed over to the relay of a simulation.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, Context, Message, RecordDict

from flower_mcepl import ConfigError, StateError
from flower_mcepl.clients import app as client_app
from flower_mcepl.clients import make_client_app, memory
from flower_mcepl.clients.kept import KeptAgents, size_of
from flower_mcepl.config.sizes import read_bytes
from flower_mcepl.files import room
from flower_mcepl.messages.envelope import raw_array
from flower_mcepl.runs.settings import DeviceSettings, RunSettings
from flower_mcepl.runs.store import StateStore
from tests.fleet.agents import make_agent, noisy_net
from tests.fleet.flower import state_of
from tests.fleet.flower_messages import (
    RUN,
    a_context,
    a_message,
    be_a_node,
    data_fn,
    frame_of,
    the_answer,
    the_app,
)

OTHER_RUN = "feedfeedfeedfeed"


@pytest.fixture(autouse=True)
def identity() -> None:
    be_a_node()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What Flower's logger, which hands nothing on to pytest's, is told."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, client_app):
        monkeypatch.setattr(module, "in_simulation", lambda: True)


def a_device(root: Path, agent: int = 0, **run: Any) -> Context:
    """The Context that a SuperNode gives a new ClientApp process: it holds nothing of
    earlier messages.
    """
    return a_context(agent, node={"state-dir": str(root)}, **run)


def play(context: Context, round: int, **order: Any) -> Message:
    """One message, in a process that has seen none before."""
    return the_app()(a_message(round, neighbors=() if round > 1 else None, **order), context)


def played(contexts: Iterator[Context], rounds: Sequence[int], **order: Any) -> list[bytes]:
    return [frame_of(play(next(contexts), round, **order)) for round in rounds]


def devices(root: Path, agent: int = 0) -> Iterator[Context]:
    while True:
        yield a_device(root, agent)


def in_one_context(**node: Any) -> Iterator[Context]:
    context = a_context(**node)
    while True:
        yield context


def fresh(reply: Message) -> bool:
    return the_answer(reply).fresh


def store_of(root: Path, agent: int = 0, *, run: str = RUN) -> StateStore:
    return StateStore(root / run / f"agent-{agent:04d}")


# --- on a device ---


def test_a_devices_disk_gives_the_same_bits_as_the_context(tmp_path: Path) -> None:
    rounds = [1, 2, 3, 4]
    assert played(devices(tmp_path), rounds) == played(in_one_context(), rounds)


def test_a_restarted_node_goes_on_as_the_same_agent_and_its_context_stays_empty(
    tmp_path: Path,
) -> None:
    contexts = [a_device(tmp_path) for _ in range(3)]
    replies = [
        play(context, round, introduce=False) for round, context in enumerate(contexts, start=1)
    ]
    assert [fresh(reply) for reply in replies] == [True, False, False]
    assert [context.state for context in contexts] == [RecordDict()] * 3
    assert store_of(tmp_path).rounds(0) == [2, 3]
    asked = the_answer(play(a_device(tmp_path), 4, introduce=True))
    assert (asked.fresh, asked.facts["agent"]) == (False, 0)
    assert asked.introduces  # under a new node id the relay asks who it is


def test_a_round_that_is_sent_again_is_played_again_with_the_same_bits(
    tmp_path: Path, warnings: list[str]
) -> None:
    first = played(devices(tmp_path), [1, 2, 3, 4])
    assert warnings == []
    again = frame_of(play(a_device(tmp_path), 4))
    assert again == first[3]
    assert warnings == [
        "agent 0 plays round 4 again, from its state after round 3; the newest that it has is "
        "that after round 4."
    ]
    assert played(devices(tmp_path), [5, 6]) == played(in_one_context(), [1, 2, 3, 4, 5, 6])[4:]
    assert store_of(tmp_path).rounds(0) == [5, 6]


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, warnings: list[str]) -> None:
    played(devices(tmp_path), [1, 2, 3])
    newest = next((tmp_path / RUN / "agent-0000").glob("*000003.state"))
    newest.write_bytes(newest.read_bytes()[:-1])
    reply = play(a_device(tmp_path), 4)
    assert not fresh(reply)
    assert frame_of(reply) == played(in_one_context(), [1, 2, 4])[2]
    (line,) = warnings
    assert line.startswith(f"agent 0: the state {newest} is damaged: the checksum over its ")
    assert "An earlier state is taken" in line


def test_a_state_of_another_model_is_refused_and_stays(tmp_path: Path) -> None:
    played(devices(tmp_path), [1, 2])
    other = make_client_app(lambda context: noisy_net(), data_fn)
    with pytest.raises(
        StateError, match=r"agent-0000-round-000002\.state: the saved state is of fingerprint"
    ):
        other(a_message(3, neighbors=()), a_device(tmp_path))
    with pytest.raises(
        StateError, match=r"round-000002\.state: the saved state is of seed 7, but agent 0 has 8"
    ):
        the_app()(a_message(3, neighbors=()), a_device(tmp_path, seed=8))
    assert not fresh(play(a_device(tmp_path), 3))


def test_runs_and_agents_do_not_meet(tmp_path: Path) -> None:
    played(devices(tmp_path), [1, 2])
    assert fresh(play(a_device(tmp_path), 3, run=OTHER_RUN))
    assert fresh(play(a_device(tmp_path, 1), 3))
    assert not fresh(play(a_device(tmp_path), 3))


def test_the_states_of_the_last_runs_stay(tmp_path: Path) -> None:
    runs = [f"{number:016x}" for number in range(4)]
    for run in runs:
        for round in (1, 2):
            play(a_context(node={"state-dir": str(tmp_path), "state-runs": 3}), round, run=run)
    assert sorted(path.name for path in tmp_path.iterdir()) == runs[1:]
    play(a_device(tmp_path), 1)  # two, by default
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([runs[3], RUN])


def test_a_failure_after_the_round_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    def broken(message: Message, context: Context, call_next: Any) -> Message:
        call_next(message, context)
        raise RuntimeError("no answer")

    played(devices(tmp_path), [1])
    with pytest.raises(RuntimeError):
        the_app(mods=[broken])(a_message(2, neighbors=()), a_device(tmp_path))
    assert store_of(tmp_path).rounds(0) == [1]
    with store_of(tmp_path).hold(0):  # nobody else has it
        pass


def test_a_disk_that_fills_up_is_named_with_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StateStore, "save", full)
    with pytest.raises(StateError, match=r"agent 0: .*state-dir.*No space left on device.*Give "):
        play(a_device(tmp_path), 1)


def test_a_full_or_read_only_folder_is_told_before_the_agent_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(client_app, "OpenSeat", train)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StateError, match=r"agent 0: .*state-dir.* that can be written; .*file"):
            play(a_device(folder), 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(StateError, match=r"agent 0: .*that can be written; .*--node-config"):
            play(a_device(tmp_path), 1)
    with monkeypatch.context() as patch:
        patch.setattr(room, "ROOM", 10**18)
        with pytest.raises(StateError, match=r"must have 1000000000000 MB of room; .* has \d+ MB"):
            play(a_device(tmp_path), 1)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_run_config_may_not_say_where_a_device_writes(tmp_path: Path) -> None:
    context = a_context(0, **{"state-dir": str(tmp_path / "elsewhere")})
    with pytest.raises(ConfigError, match=r"state-dir comes from the device alone.*--node-config"):
        play(context, 1)
    with pytest.raises(ConfigError, match="state-dir comes from the device alone"):
        RunSettings.from_run_config({"state-dir": "none"})
    assert not [*tmp_path.iterdir()]


def test_two_nodes_that_play_one_agent_at_once_are_told(tmp_path: Path) -> None:
    class Meanwhile:
        """A mod in whose time another node gets a message for the same agent."""

        def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
            reply = call_next(message, context)
            with pytest.raises(
                StateError, match=r"one process at a time plays agent 0; process \d+ is at it in"
            ):
                play(a_device(tmp_path), 1)
            play(a_device(tmp_path, 1), 1)
            return reply

    app = the_app(mods=[Meanwhile()])
    assert the_answer(app(a_message(1), a_device(tmp_path))).posts


@pytest.mark.parametrize("run", ["../elsewhere", "", "00C0FFEE00C0FFEE"])
def test_the_message_must_say_of_which_run_it_is(run: str, tmp_path: Path) -> None:
    rule = f"agent 0: run must be 16 lower-case hex digits; got {run!r}"
    with pytest.raises(ConfigError, match=re.escape(rule)):
        play(a_device(tmp_path), 1, run=run)
    assert list(tmp_path.iterdir()) == []


def test_a_device_writes_nowhere_else_than_in_its_state_dir(tmp_path: Path) -> None:
    """Nor does it send its state, which the relay asks of simulated agents."""
    answers = [
        play(a_device(tmp_path / "state"), 1, store=True),
        play(a_device(tmp_path / "state"), 2, train=False, store=True),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert [the_answer(answer).state for answer in answers] == [b"", b""]


# --- where that is ---


def test_the_users_state_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert DeviceSettings().state_folder() == tmp_path / "flower_mcepl"
    for unset in ("", "relative/paths/count/for/nothing"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert DeviceSettings().state_folder() == Path("/home/somebody/.local/state/flower_mcepl")
        assert DeviceSettings(state_dir="~/agents").state_folder() == Path("/home/somebody/agents")
    assert DeviceSettings(state_dir="/var/lib/agents").state_folder() == Path("/var/lib/agents")
    assert DeviceSettings(state_dir="none").state_folder() is None


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(
        ConfigError,
        match=r"no home folder for its agent's state .*Set state-dir to an absolute path",
    ):
        DeviceSettings().state_folder()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"state_dir": "agents"},
            "state-dir must be an absolute path, or \"none\" to keep .*; got 'agents'",
        ),
        ({"state_runs": 0}, "state-runs must be >= 1; got 0"),
    ],
)
def test_bad_places_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeviceSettings(**settings)


# --- in a Context ---


def test_a_second_run_in_one_context_begins_afresh(warnings: list[str]) -> None:
    """As when one ServerApp starts two strategies, one after the other."""
    context = a_context()
    assert [fresh(play(context, round)) for round in (1, 2)] == [True, False]
    assert [fresh(play(context, round, run=OTHER_RUN)) for round in (1, 2)] == [True, False]
    assert warnings == [
        f"agent 0 starts afresh: round 1 of run {OTHER_RUN} was asked for, and its state is that "
        f"after round 2 of run {RUN}."
    ]


def test_the_context_carries_one_array() -> None:
    context = a_context()
    play(context, 1)
    (record,) = context.state.array_records.values()
    assert len(context.state) == len(record) == 1
    assert state_of(context).round == 1


def test_a_used_agent_is_as_good_as_a_new_one_when_a_round_comes_again(tmp_path: Path) -> None:
    """One process, one app, the same Flower run: the agent is built once, and restored
    for each message.
    """
    app = the_app()
    context = a_device(tmp_path)
    messages = [a_message(round, neighbors=() if round > 1 else None) for round in (1, 2, 3, 3, 4)]
    frames = [frame_of(app(message, context)) for message in messages]
    assert frames[2] == frames[3]
    assert [*frames[:3], frames[4]] == played(in_one_context(), [1, 2, 3, 4])
    # older than all that is stored: not the used agent as it is
    assert fresh(app(a_message(1), context))


# --- in a simulation ---


@pytest.mark.usefixtures("simulated")
def test_a_simulated_agent_keeps_its_state_in_the_context_whatever_the_device_says(
    tmp_path: Path,
) -> None:
    context = a_device(tmp_path / "state")
    play(context, 1)
    assert state_of(context).round == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("simulated")
def test_a_simulated_agent_hands_its_state_over_where_the_relay_wants_it() -> None:
    context = a_context(3)
    assert the_answer(play(context, 1)).state == b""
    for round, order in ((2, {}), (3, {"evaluate": True, "train": False})):
        answer = the_answer(play(context, round, store=True, **order))
        assert answer.state == state_of(context).encode()
        assert answer.exported == {}


@pytest.mark.usefixtures("simulated")
def test_a_resumed_simulation_goes_on_from_what_was_handed_over(warnings: list[str]) -> None:
    context = a_context()
    replies = [play(context, round, store=True) for round in (1, 2, 3, 4, 5)]
    handed = raw_array(the_answer(replies[3]).state, Array)
    resumed = a_context()  # round 5 was not finished: it comes again
    again = [play(resumed, 5, state=handed), play(resumed, 6)]
    assert [fresh(reply) for reply in again] == [False, False]
    assert frame_of(again[0]) == frame_of(replies[4])
    assert frame_of(again[1]) == frame_of(play(context, 6))
    assert warnings == []


@pytest.mark.usefixtures("simulated")
def test_a_context_that_is_ahead_gives_way_to_the_state_that_is_handed(
    warnings: list[str],
) -> None:
    context = a_context()
    replies = [play(context, round, store=True) for round in (1, 2, 3)]
    handed = raw_array(the_answer(replies[0]).state, Array)
    assert frame_of(play(context, 2, state=handed)) == frame_of(replies[1])
    assert warnings == []
    assert fresh(play(context, 1))
    assert len(warnings) == 1


def test_what_is_stored_is_the_agents_whole_state(tmp_path: Path) -> None:
    """The sizes that docs and README tell: scores and gradient as float32, a count and
    the masks sent and held.
    """
    play(a_device(tmp_path), 1)
    found = store_of(tmp_path).load(0, run=RUN, before=2)
    assert found is not None
    dtypes = {name.partition("/")[0]: tensor.dtype for name, tensor in found.state.tensors.items()}
    assert dtypes == {
        "scores": torch.float32,
        "gradient": torch.float32,
        "neighbor-count": torch.uint8,
    }
    assert {name.partition("/")[2] for name in found.outbox} == {
        "round",
        "kinds",
        "bits",
        "values",
        "flips",
    }


# --- agents that a process keeps


def test_agents_are_kept_within_a_number_of_bytes_and_the_newest_always() -> None:
    kept, agents = KeptAgents(), [make_agent(i) for i in range(4)]
    for index in range(3):
        kept.keep((1, "app", index), agents[index], size=40, most=100)
    assert [*kept] == [(1, "app", 1), (1, "app", 2)]
    assert kept.take((1, "app", 0)) is None
    assert kept.take((1, "app", 1)) is agents[1]
    kept.keep((1, "app", 1), agents[1], size=40, most=100)  # used last
    kept.keep((1, "app", 3), agents[3], size=60, most=100)
    assert [*kept] == [(1, "app", 1), (1, "app", 3)]
    kept.keep((1, "app", 2), agents[2], size=10**9, most=100)
    assert [*kept] == [(1, "app", 2)]
    kept.keep((2, "app", 0), agents[0], size=1, most=100)  # another run
    assert [*kept] == [(2, "app", 0)]


def test_an_agent_is_as_large_as_its_state_and_its_network() -> None:
    agent = make_agent(0)
    model = sum(t.nbytes for t in [*agent.model.parameters(), *agent.model.buffers()])
    state = agent.state()
    assert size_of(agent, state) == model + sum(a.nbytes for a in state.arrays.values()) > 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1GB", 10**9),
        ("512 MB", 512 * 10**6),
        ("0", 0),
        ("1.5kb", 1500),
        ("7", 7),
        ("2TB", 2 * 10**12),
    ],
)
def test_a_size_in_bytes(text: str, number: int) -> None:
    assert read_bytes(text, key="agent-cache") == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 GiB", "1e9", "much", "1GBB", "١GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'agent-cache must be a size such as "1GB"'):
        DeviceSettings(agent_cache=text)
