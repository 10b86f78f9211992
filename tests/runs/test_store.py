"""States on disk: whole or refused, whatever happens to the files and to who writes
them.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import StateError
from flower_mcepl.agents import AgentState
from flower_mcepl.exchange.turn import open_mail
from flower_mcepl.files.sealed import Kind, write_sealed
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.store import STATE, StateStore, device_store, forget_runs
from tests.fleet.agents import SEED, make_agent, noisy_net, same_tensors
from tests.fleet.twins import twin

ROOT = Path(__file__).parents[2]
RUN = "0123456789abcdef"
HEADER = 26  # bytes


def generation(round: int, *, agent: int = 0, run: str = RUN, size: int = 64) -> Generation:
    """A state whose every array tells its round."""
    # one without dimensions
    tensors = {"scores/a": torch.full((size,), float(round)), "count": torch.tensor(round)}
    state = AgentState.of_tensors({"agent": agent, "round": round}, tensors)
    inbox = {"3/flips": np.full(size, round, np.uint32), "3/values": np.zeros(0, np.float32)}
    return Generation(
        run, round, agent, state, inbox, {f"{round}/bits": np.full(size, round % 256, np.uint8)}
    )


def is_whole(found: Generation) -> bool:
    """Tell whether it is exactly what `generation` makes, no part of it from another
    round.
    """
    sound = generation(
        found.round, agent=found.agent, run=found.run, size=len(found.inbox["3/flips"])
    )
    return (
        found.state.facts == sound.state.facts
        and same_tensors(found.state.tensors, sound.state.tensors)
        and all(
            mine.keys() == other.keys()
            and all(
                mine[name].dtype == other[name].dtype and np.array_equal(mine[name], other[name])
                for name in mine
            )
            for mine, other in ((found.inbox, sound.inbox), (found.outbox, sound.outbox))
        )
    )


class Told:
    """A store of which the log is kept."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.store = StateStore(folder, log=self.lines.append)

    def load(self, before: int = 99, *, agent: int = 0, run: str = RUN) -> Generation | None:
        return self.store.load(agent, run=run, before=before)


def a_store(folder: Path, *, rounds: int = 0) -> Told:
    told = Told(folder)
    for round in range(1, rounds + 1):
        told.store.save(generation(round))
    return told


def file_of(folder: Path, round: int, *, agent: int = 0) -> Path:
    return folder / f"agent-{agent:04d}-round-{round:06d}.state"


# --- what it keeps ---


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    agent = make_agent(2, model_fn=noisy_net, momentum=0.9)
    agent.train(round=1)
    mail = open_mail(agent, max_staleness=5)
    mail.outbox.write(agent.outgoing(), round=1)
    StateStore(tmp_path).save(Generation.of(agent, mail, run=RUN, round=1))
    other = make_agent(2, model_fn=noisy_net, momentum=0.9)
    others_mail = open_mail(other, max_staleness=5)
    found = StateStore(tmp_path).load(2, run=RUN, before=2)
    assert found is not None
    found.restore(other, others_mail)
    assert other.state().facts == agent.state().facts
    assert same_tensors(other.state().tensors, agent.state().tensors)
    mine, theirs = mail.outbox.arrays(), others_mail.outbox.arrays()
    assert mine.keys() == theirs.keys()
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def test_an_empty_store_has_nothing_and_makes_nothing(tmp_path: Path) -> None:
    told = a_store(tmp_path / "none")
    assert told.load() is None
    assert told.lines == []
    assert not (tmp_path / "none").exists()


@given(rounds=st.lists(st.integers(1, 30), min_size=1, max_size=20), agents=st.integers(1, 3))
@settings(max_examples=25)
def test_the_newest_two_stay_and_what_a_repeated_round_overtakes_goes(
    rounds: list[int], agents: int
) -> None:
    """Against a list that is cut at each round and never longer than two."""
    with tempfile.TemporaryDirectory() as folder:
        told = a_store(Path(folder))
        kept: list[int] = []
        for round in rounds:
            for agent in range(agents):
                told.store.save(generation(round, agent=agent))
            kept = [*(earlier for earlier in kept if earlier < round), round][-2:]
            for agent in range(agents):
                assert told.store.rounds(agent) == kept
                for before in (*kept, kept[-1] + 1):
                    found = told.load(before, agent=agent)
                    newest = max((earlier for earlier in kept if earlier < before), default=None)
                    assert (found.round if found else None) == newest
                    assert found is None or is_whole(found)


def test_what_a_checkpoint_needs_stays(tmp_path: Path) -> None:
    told = a_store(tmp_path)
    for round, checkpoints in (
        (2, ()),
        (3, (3,)),
        (4, (3,)),
        (5, (3,)),
        (7, (3, 6)),
        (8, (3, 6)),
        (9, (6, 9)),
    ):
        told.store.save(generation(round), checkpoints=checkpoints)
        # round 6 was not played: the state of round 5 is what it goes on from
        for checkpoint in checkpoints:
            found = told.load(checkpoint + 1)
            assert found is not None
            assert found.round == {3: 3, 6: 5, 9: 9}[checkpoint]
    assert told.store.rounds(0) == [5, 8, 9]


def test_going_back_is_told(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=7)
    again = told.load(7)
    assert again is not None
    assert again.round == 6
    assert told.lines == [
        "agent 0 plays round 7 again, from its state after round 6; the newest that it has is "
        "that after round 7."
    ]
    assert told.load(3) is None
    assert told.lines[1:] == [
        f"agent 0 has no sound state from before round 3 in {tmp_path}: it starts afresh."
    ]


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    told = a_store(tmp_path / "deep" / "er", rounds=1)
    assert (
        file_of(told.store.folder, 1).stat().st_mode & 0o777,
        told.store.folder.stat().st_mode & 0o777,
    ) == (
        0o600,
        0o700,
    )


# --- damage ---


def damaged(folder: Path, round: int, data: bytes) -> Told:
    """Three rounds, of which one is overwritten."""
    told = a_store(folder, rounds=3)
    file_of(folder, round).write_bytes(data)
    return told


SOUND = generation(3).encode()
SIZE = HEADER + len(SOUND)
CUTS = [0, 1, 7, 8, 9, 25, HEADER, HEADER + 1, HEADER + 8, HEADER + 100, SIZE // 2, SIZE - 1]


@pytest.mark.parametrize("size", CUTS)
def test_a_file_cut_off_anywhere_gives_way_to_the_one_before(tmp_path: Path, size: int) -> None:
    told = a_store(tmp_path, rounds=3)
    newest = file_of(tmp_path, 3)
    assert newest.stat().st_size == SIZE
    whole = newest.read_bytes()
    newest.write_bytes(whole[:size])
    found = told.load()
    assert found is not None
    assert found.round == 2
    assert is_whole(found)
    (line,) = told.lines
    assert line.startswith(f"agent 0: the state {newest} is damaged: ")
    assert f"it is kept as {newest.name}.damaged" in line
    assert (tmp_path / f"{newest.name}.damaged").read_bytes() == whole[:size]
    assert told.store.rounds(0) == [2]


@given(place=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(max_examples=150)
def test_no_flipped_bit_goes_unseen(place: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = a_store(Path(folder), rounds=3)
        data = bytearray(file_of(Path(folder), 3).read_bytes())
        data[place] ^= 1 << bit
        file_of(Path(folder), 3).write_bytes(data)
        found = told.load()
        assert found is not None
        assert found.round == 2
        assert is_whole(found)
        assert len(told.lines) == 1


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=50)
def test_whatever_stands_under_the_name_is_refused(data: bytes, appended: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = a_store(Path(folder), rounds=3)
        file = file_of(Path(folder), 3)
        file.write_bytes((file.read_bytes() if appended else b"") + data)
        found = told.load()
        assert found is not None
        assert found.round == (3 if appended and not data else 2)
        assert is_whole(found)


def test_damaged_files_are_kept_beside_each_other(tmp_path: Path) -> None:
    for data in (b"one", b"two", b"three"):
        told = a_store(tmp_path, rounds=3)
        file_of(tmp_path, 3).write_bytes(data)
        assert told.load() is not None
    aside = sorted(tmp_path.glob("*.damaged"))
    assert [file.name.removeprefix("agent-0000-round-000003.state") for file in aside] == [
        "-1.damaged", "-2.damaged", ".damaged",
    ]  # fmt: skip
    assert {file.read_bytes() for file in aside} == {b"one", b"two", b"three"}


def test_where_all_are_damaged_the_agent_starts_afresh_and_says_so(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=3)
    for round in (2, 3):
        file_of(tmp_path, round).write_bytes(b"")
    assert told.load() is None
    assert [line.partition(":")[0] for line in told.lines[:2]] == ["agent 0", "agent 0"]
    assert told.lines[2].endswith("it starts afresh.")
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_a_missing_newest_file_is_no_damage(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=3)
    file_of(tmp_path, 3).unlink()
    found = told.load()
    assert found is not None
    assert found.round == 2
    assert told.lines == []


def test_leftovers_of_a_killed_writer_mean_nothing_and_go(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=2)
    mine = [tmp_path / f".agent-0000-round-{round:06d}.state.123.tmp" for round in (2, 3)]
    others = tmp_path / ".agent-0001-round-000003.state.123.tmp"
    for leftover in (*mine, others):
        leftover.write_bytes(generation(9).encode()[:100])
    found = told.load()
    assert found is not None
    assert found.round == 2
    told.store.save(generation(3))
    assert [leftover.exists() for leftover in (*mine, others)] == [False, False, True]


def test_a_failing_writer_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = a_store(tmp_path, rounds=3)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                told.store.save(generation(4))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- what is not ours ---


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            generation(3, run="f" * 16),
            r"000003\.state is of run 'f{16}', but agent 0 needs that of run '0123",
        ),
        (generation(3, agent=1), r"000003\.state is of agent 1, but agent 0 needs that of agent 0"),
        (
            generation(2),
            r"000003\.state is of round 2, but agent 0 needs that of round 3.*move it away",
        ),
    ],
)
def test_a_sound_file_of_something_else_is_refused_by_name(
    tmp_path: Path, found: Generation, message: str
) -> None:
    told = a_store(tmp_path, rounds=3)
    write_sealed(file_of(tmp_path, 3), found.encode(), STATE)
    with pytest.raises(StateError, match=message):
        told.load()
    assert told.store.rounds(0) == [2, 3]


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=3)
    write_sealed(file_of(tmp_path, 3), SOUND, STATE._replace(version=7))
    with pytest.raises(
        StateError, match=r"000003\.state is an agent's state of format version 7, but this release"
    ):
        told.load()


@pytest.mark.parametrize("body", [b"", b"{}", SOUND[:50], SOUND[:-1], SOUND + b"x", bytes(64)])
def test_a_sealed_file_that_holds_no_state_is_refused_by_name(tmp_path: Path, body: bytes) -> None:
    told = a_store(tmp_path, rounds=3)
    write_sealed(file_of(tmp_path, 3), body, STATE)
    with pytest.raises(StateError, match=r"000003\.state: a saved state must be what this release"):
        told.load()


def test_a_sealed_file_of_another_kind_is_damage(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=3)
    write_sealed(file_of(tmp_path, 3), SOUND, Kind(b"12345678", STATE.version, "something"))
    found = told.load()
    assert found is not None
    assert found.round == 2
    assert "it does not begin as an agent's state does" in told.lines[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_agent(0, seed=SEED + 1),
            r"round-000001\.state: the saved state is of seed 7, but agent 0 has 8",
        ),
        (
            make_agent(0, model_fn=noisy_net),
            r"round-000001\.state: the saved state is of fingerprint .*, but agent 0 has",
        ),
        (make_agent(1), r"round-000001\.state: the saved state is of agent 0, but agent 1 has 1"),
    ],
)
def test_a_state_of_another_seed_or_model_is_refused_by_name(
    tmp_path: Path, other: Any, message: str
) -> None:
    agent = make_agent(0)
    StateStore(tmp_path).save(
        Generation.of(agent, open_mail(agent, max_staleness=5), run=RUN, round=1)
    )
    found = StateStore(tmp_path).load(0, run=RUN, before=2)
    assert found is not None
    with pytest.raises(StateError, match=message):
        found.restore(other, open_mail(other, max_staleness=5))


@pytest.mark.parametrize(
    "run", ["", "../../etc", "0123456789ABCDEF", RUN + "0", RUN[:-1], RUN[:-1] + "/"]
)
def test_a_runs_id_that_is_no_folders_name_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(StateError, match="a run's id is 16 lower-case hex digits; got"):
        device_store(tmp_path, run=run, agent=0)


def test_a_file_without_the_right_to_read_it_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = a_store(tmp_path, rounds=3)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StateError, match=r"000003\.state cannot be read .*Permission denied"):
        told.load()
    assert told.store.rounds(0) == [2, 3]


def test_a_sector_that_the_disk_cannot_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = a_store(tmp_path, rounds=3)
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == file_of(tmp_path, 3):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    found = told.load()
    assert found is not None
    assert found.round == 2
    assert "the disk cannot read it" in told.lines[0]


# --- runs, and other processes ---


def older_runs(root: Path, runs: list[str], *, agent: int = 0) -> None:
    for age, run in enumerate(reversed(runs)):
        store = device_store(root, run=run, agent=agent)
        store.save(generation(1, run=run, agent=agent))
        os.utime(file_of(store.folder, 1, agent=agent), (1e9 + age, 1e9 + age))


def test_old_runs_go_but_nothing_else(tmp_path: Path) -> None:
    runs = [f"{number:016x}" for number in range(4)]  # the newest first
    older_runs(tmp_path, runs)
    older_runs(tmp_path, runs[3:], agent=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / runs[2] / "agent-0000" / "mine.txt").write_text("keep")
    forget_runs(tmp_path, agent=0, keep=2)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    state = "agent-0000/agent-0000-round-000001.state"
    other = "agent-0001/agent-0001-round-000001.state"
    assert left == [
        f"{runs[0]}/{state}",
        f"{runs[1]}/{state}",
        f"{runs[2]}/agent-0000/mine.txt",
        f"{runs[3]}/{other}",
    ]
    assert (tmp_path / "notes").is_dir()
    forget_runs(tmp_path, agent=1, keep=1)
    assert (tmp_path / runs[3]).is_dir()


def test_a_run_that_left_no_state_takes_no_other_runs_place(tmp_path: Path) -> None:
    """Its first round failed: there is a lock, no state, and a folder newer than all
    others.
    """
    older, failed, newest = (f"{number:016x}" for number in range(3))
    older_runs(tmp_path, [newest, older])
    folder = tmp_path / failed / "agent-0000"
    with StateStore(folder).hold(0):
        forget_runs(tmp_path, agent=0, keep=2)
        assert folder.is_dir()  # another process is at it
    forget_runs(tmp_path, agent=0, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [older, newest]
    assert device_store(tmp_path, run=older, agent=0).rounds(0) == [1]


@pytest.mark.parametrize("call", ["is_dir", "unlink"])
def test_what_cannot_be_removed_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    runs = [f"{number:016x}" for number in range(4)]  # the newest first
    older_runs(tmp_path, runs)
    theirs = tmp_path / runs[2] / "agent-0000"
    does = getattr(Path, call)

    def denied(path: Path, **options: Any) -> Any:
        if path.is_relative_to(theirs):
            raise PermissionError(13, "Permission denied", str(path))
        return does(path, **options)

    monkeypatch.setattr(Path, call, denied)
    lines: list[str] = []
    forget_runs(tmp_path, agent=0, keep=1, log=lines.append)
    assert [line.partition(": ")[0] for line in lines] == [
        f"states of earlier runs in {theirs} stay there"
    ]
    assert "Permission denied" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [runs[0], runs[2]]


def test_two_processes_do_not_play_one_agent(tmp_path: Path) -> None:
    folder = tmp_path / RUN / "agent-0000"
    older_runs(tmp_path, [RUN])
    reading, writing = os.pipe()

    def hold_on() -> None:
        with StateStore(folder).hold(0):
            os.write(writing, b"held")
            signal.pause()

    with twin(hold_on) as other:
        os.close(writing)
        assert os.read(reading, 9) == b"held"
        with pytest.raises(
            StateError,
            match=rf"one process at a time plays agent 0; process {other.pid} is at it in",
        ):
            StateStore(folder).hold(0).__enter__()
        with StateStore(folder).hold(1):
            pass
        forget_runs(tmp_path, agent=0, keep=0)
        assert StateStore(folder).rounds(0) == [1]
        other.kill()  # however it ends, the lock is free
        os.close(reading)
    with StateStore(folder).hold(0):
        pass
    forget_runs(tmp_path, agent=0, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_runs_states_can_be_cleared(tmp_path: Path) -> None:
    told = a_store(tmp_path, rounds=3)
    told.store.save(generation(3, agent=12))
    (tmp_path / "agent-0000.safetensors").write_bytes(b"the final state")
    with told.store.hold(0):
        pass
    told.store.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["agent-0000.safetensors"]


# --- killed ---

WRITERS = """
import os, sys
from pathlib import Path
from flower_mcepl.runs.store import StateStore
from tests.runs.test_store import RUN, generation
store = StateStore(Path(sys.argv[1]))
for line in sys.stdin:  # one writer after the other, each a process of its own
    if writer := os.fork():
        os.waitpid(writer, 0)
        print("dead", flush=True)
        continue
    with store.hold(0):
        found = store.load(0, run=RUN, before=10**6)
        round = 0 if found is None else found.round
        print(os.getpid(), flush=True)
        while True:
            round += 1
            store.save(generation(round, size=200_000))
            print(round, flush=True)
"""


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    """A process that writes one round after the other dies at any moment, by SIGKILL;
    the next one takes over.
    """
    moments = random.Random(0)
    reached = 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for kills in range(300):  # more than thirty where a round takes longer than that
            if kills >= 30 and reached >= 30:
                break
            writers.stdin.write("next\n")
            writers.stdin.flush()
            writer = int(writers.stdout.readline())
            time.sleep(moments.uniform(0, 0.25))
            os.kill(writer, signal.SIGKILL)
            finished = [reached, *map(int, iter(lambda: writers.stdout.readline().strip(), "dead"))]  # type: ignore[union-attr]
            told = a_store(tmp_path)
            found = told.load(10**6)
            assert told.lines == []  # nothing is damaged
            assert found is not None or finished == [0]
            if found is not None:
                assert is_whole(found)
                # killed after the rename, before it said so
                assert found.round in (finished[-1], finished[-1] + 1)
                before = told.load(found.round)
                assert before is None or (is_whole(before) and before.round == found.round - 1)
                assert before is not None or found.round == 1
                reached = found.round
        writers.stdin.close()
    assert reached >= 30
    a_store(tmp_path).store.save(generation(reached + 1))
    assert list(tmp_path.glob(".*.tmp")) == []
