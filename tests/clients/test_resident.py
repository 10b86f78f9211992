"""Resident worker of a device: the same bits as without, whatever ends when."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_mcepl import ConfigError, FlowerMceplError, StateError
from flower_mcepl.clients import make_client_app, resident
from flower_mcepl.clients.named import NamedApp
from flower_mcepl.messages.answer import from_records
from flower_mcepl.messages.bundle import NodeBundle
from tests.fleet.flower_messages import (
    a_context,
    a_message,
    be_a_node,
    frame_of,
    the_answer,
)

MODULE = "tests.fleet.flower_messages"
NAMES = (f"{MODULE}:model_fn", f"{MODULE}:data_fn")
TRAP = "tests.clients.test_resident:trap"
ROUNDS = (1, 2, 3)

pytestmark = pytest.mark.skipif(not resident.AVAILABLE, reason="no sockets of the user's own")


def trap(context: Context) -> Any:
    """Data function that ends its process while a file is there."""
    if os.path.exists(str(context.run_config["trap"])):
        print("the trap shut", flush=True)
        os._exit(3)
    from tests.fleet.flower_messages import data_fn

    return data_fn(context)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """Folder of the workers' sockets; they end with the tests."""
    folder = Path(tempfile.mkdtemp(prefix="mcepl-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder
        for pid in workers(folder):
            os.kill(pid, signal.SIGKILL)
        for process in resident._workers:
            process.wait()
    shutil.rmtree(folder)


def workers(folder: Path) -> list[int]:
    """Processes whose command names a socket in the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (
                f'"{folder}'.encode() in place.read_bytes()
                and int(place.parent.name) != os.getpid()
            ):
                found.append(int(place.parent.name))
    return found


@pytest.fixture(autouse=True)
def identity(runtime: Path) -> None:
    be_a_node()


def a_device(root: Path, **settings: Any) -> Context:
    return a_context(run_id=77, node={"state-dir": str(root)}, **settings)


def play(context: Context, round: int, names: tuple[str, str] = NAMES, **options: Any) -> Message:
    """One message, as in a process that Flower has just started."""
    app = make_client_app(*names, **options)
    return app(a_message(round, neighbors=() if round > 1 else None), context)


def frames(root: Path, **settings: Any) -> list[bytes]:
    return [frame_of(play(a_device(root, **settings), round)) for round in ROUNDS]


def test_the_worker_gives_the_bits_of_processes_of_their_own(tmp_path: Path, runtime: Path) -> None:
    without = frames(tmp_path / "without", worker="none")
    assert workers(runtime) == []
    assert frames(tmp_path / "with") == without
    assert len(workers(runtime)) == 1


def test_one_worker_plays_all_agents_of_a_node(tmp_path: Path, runtime: Path) -> None:
    def answers(root: Path, kind: str) -> list[bytes]:
        context = a_device(root, worker=kind)
        app = make_client_app(*NAMES)
        parts = {seat: a_message(1).content for seat in range(3)}
        content = RecordDict(NodeBundle(3, parts).to_records(ConfigRecord))
        reply = app(Message(content, dst_node_id=1000, message_type="train"), context)
        answered = NodeBundle.from_records(reply.content).parts
        return [from_records(answered[seat]).raw[0] for seat in range(3)]

    play(a_device(tmp_path / "before"), 1)
    before = workers(runtime)
    assert answers(tmp_path / "with", "resident") == answers(tmp_path / "without", "none")
    assert workers(runtime) == before


def test_a_state_in_the_context_comes_back_from_the_worker() -> None:
    contexts = [a_context(run_id=78, worker=kind) for kind in ("resident", "none")]
    for context in contexts:
        for round in ROUNDS:
            play(context, round)
    states = [dict(context.state.array_records["mcepl-state"]) for context in contexts]
    assert states[0]["generation"].data == states[1]["generation"].data


def test_errors_are_those_of_a_process_of_its_own_and_end_no_worker(tmp_path: Path) -> None:
    errors = []
    for kind in ("none", "resident"):
        with pytest.raises(FlowerMceplError) as error:
            play(a_device(tmp_path, worker=kind, **{"score-lr": -1.0}), 1)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "score-lr" in errors[0]
    assert the_answer(play(a_device(tmp_path), 1)).fresh


def test_no_state_is_kept_unless_all_mods_let_the_answer_pass(tmp_path: Path) -> None:
    def stop(message: Message, context: Context, call_next: Any) -> Message:
        call_next(message, context)
        raise RuntimeError("a mod that fails behind the app")

    first = frame_of(play(a_device(tmp_path), 1))
    with pytest.raises(RuntimeError, match="behind the app"):
        play(a_device(tmp_path), 2, mods=[stop])
    again = play(a_device(tmp_path), 2)
    assert frames(tmp_path / "undisturbed")[:2] == [first, frame_of(again)]


def test_a_mod_that_calls_twice_plays_the_round_again(tmp_path: Path) -> None:
    def twice(message: Message, context: Context, call_next: Any) -> Any:
        call_next(message, context)
        return call_next(message, context)

    expected = frames(tmp_path / "once")
    assert frame_of(play(a_device(tmp_path / "twice"), 1, mods=[twice])) == expected[0]
    assert frame_of(play(a_device(tmp_path / "twice"), 2)) == expected[1]


def test_a_worker_killed_between_messages_costs_nothing(tmp_path: Path, runtime: Path) -> None:
    expected = frames(tmp_path / "whole")
    assert frame_of(play(a_device(tmp_path / "killed"), 1)) == expected[0]
    for pid in workers(runtime):
        os.kill(pid, signal.SIGKILL)
    assert frame_of(play(a_device(tmp_path / "killed"), 2)) == expected[1]


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_message_alone(tmp_path: Path) -> None:
    file = tmp_path / "trap"
    file.touch()
    names = (NAMES[0], TRAP)
    with pytest.raises(
        FlowerMceplError, match=r"agent 0: .* ended while it played \(the trap shut"
    ):
        play(a_device(tmp_path / "state", trap=str(file)), 1, names)
    file.unlink()
    assert the_answer(play(a_device(tmp_path / "state", trap=str(file)), 1, names)).fresh


@pytest.mark.slow
def test_a_worker_that_cannot_load_the_app_says_why(tmp_path: Path) -> None:
    with pytest.raises(FlowerMceplError, match=r"exit code 1: .*has no nowhere"):
        play(a_device(tmp_path), 1, (NAMES[0], f"{MODULE}:nowhere"))


@pytest.mark.slow
def test_a_worker_ends_when_idle_and_with_its_supernode(tmp_path: Path, runtime: Path) -> None:
    before = {*workers(runtime)}
    play(a_context(1, node={"state-dir": str(tmp_path), "worker-idle": 0.5}), 1)
    (idle,) = {*workers(runtime)} - before
    wait_until_gone(idle)

    node = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getppid", lambda: node.pid)
        play(a_context(1, node={"state-dir": str(tmp_path)}), 2)
    (orphan,) = {*workers(runtime)} - before - {idle}
    node.wait()
    wait_until_gone(orphan)
    assert not list(runtime.rglob(f"{orphan}*.sock"))


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 60
    while pid in {process.pid for process in resident._workers if process.poll() is None}:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_sockets_lie_where_nobody_else_comes(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(a_device(tmp_path / "state"), 1)
    (folder,) = runtime.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    for socket in folder.glob("*.sock"):
        assert socket.stat().st_mode & 0o777 == 0o600

    open_to_all = Path(tempfile.mkdtemp(prefix="mcepl-"))
    (open_to_all / folder.name).mkdir(mode=0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_to_all))
    with pytest.raises(StateError, match=r"closed to others \(mode 700\); .* has mode 755"):
        play(a_device(tmp_path / "state"), 1)
    shutil.rmtree(open_to_all)

    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(StateError, match="at most 80 bytes"):
        play(a_device(tmp_path / "state"), 1)


def test_names_are_checked_before_anything_is_loaded() -> None:
    for wrong in ("my_app.task", "my_app.task:", ":model_fn", "my app:model_fn", "a:b:c"):
        with pytest.raises(ConfigError, match=r'named as "module:attribute"'):
            make_client_app(wrong, NAMES[1])
    with pytest.raises(ConfigError, match="all by name"):
        make_client_app(NAMES[0], trap)
    with pytest.raises(ConfigError, match="all by name"):
        make_client_app(trap, trap, task=NAMES[0])
    for functions in ((trap, trap), NAMES[:2]):
        with pytest.raises(ConfigError, match=r"run-config key task, .* got task='regression'"):
            make_client_app(*functions, task="regression")
    app = make_client_app("sys:nothing", NAMES[1])
    assert isinstance(app, NamedApp)
    with pytest.raises(ConfigError, match="sys has no nothing"):
        app.load()


@pytest.mark.slow
def test_a_message_that_the_worker_answers_loads_no_torch() -> None:
    code = (
        "import sys; from flower_mcepl.clients import make_client_app; "
        "make_client_app('tests.nowhere:model_fn', 'tests.nowhere:data_fn'); "
        "print([name for name in ('torch', 'networkx', 'tests') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "[]"
