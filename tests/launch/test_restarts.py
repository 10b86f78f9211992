"""Runs that lose a process of the simulation, are stopped, or lose their launcher."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl.errors import RECORD_NOTE, STOP_REQUEST
from flower_mcepl.launch import RunOutcome, run_app
from flower_mcepl.launch import run as module
from flower_mcepl.launch.command import main
from flower_mcepl.launch.guardian import start_guardian
from flower_mcepl.launch.plan import Plan
from flower_mcepl.launch.processes import ProcessFamily
from flower_mcepl.launch.restarts import plan_of_resumption
from flower_mcepl.launch.run import carry_out
from flower_mcepl.launch.superlink import SuperLink, private_environment
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.strategies.launcher import announce_record
from flower_mcepl.studies import engines
from flower_mcepl.studies.flower_app import FlowerApp
from tests.fleet.flower import agent_grid, gossip

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
CONFIG = """
[tool.flwr.app.config]
num-agents = 3
num-rounds = 5
seed = 1
resume = ""
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(CONFIG)
    return folder


def make_record(folder: Path, *, cause: str | None, checkpoint: bool = True) -> Path:
    """What a run that broke off leaves, as far as a launcher reads it."""
    (folder / "checkpoint").mkdir(parents=True)
    if checkpoint:
        (folder / "checkpoint" / "round-000002.checkpoint").touch()
    error = None if cause is None else {"type": cause, "reason": "why"}
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "error": error}))
    return folder


# --- which runs are resumed


def test_a_run_that_lost_a_worker_goes_on_in_its_record(app: Path, tmp_path: Path) -> None:
    plan = Plan(app, 3, ["num-rounds=5", "seed=1"], "")
    record = make_record(tmp_path / "record", cause="LostWorkerError")
    following = plan_of_resumption(plan, record)
    assert following is not None
    assert following.run_config == ["num-rounds=5", "seed=1", f"resume='{record}'"]
    again = plan_of_resumption(following, record)
    assert again is not None
    assert again.run_config[-1] == f"resume='{record}'"


def test_settings_of_a_file_stay_when_a_run_is_resumed(app: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("num-rounds = 5\n[dsgd]\nlr = 0.5\n")
    record = make_record(tmp_path / "record", cause="LostWorkerError")
    following = plan_of_resumption(Plan(app, 3, [f"{tmp_path}/run.toml"], ""), record)
    assert following is not None
    assert following.run_config == ["num-rounds=5", "dsgd.lr=0.5", f"resume='{record}'"]


def test_without_a_checkpoint_it_begins_anew(app: Path, tmp_path: Path) -> None:
    plan = Plan(app, 3, [], "")
    record = make_record(tmp_path / "record", cause="LostWorkerError", checkpoint=False)
    assert plan_of_resumption(plan, record) == plan


@pytest.mark.parametrize("cause", ["RosterError", "IncompleteRunError", "ZeroDivisionError", None])
def test_what_would_end_as_before_is_not_tried_again(
    cause: str | None, app: Path, tmp_path: Path
) -> None:
    record = make_record(tmp_path / "record", cause=cause)
    assert plan_of_resumption(Plan(app, 3, [], ""), record) is None
    assert plan_of_resumption(Plan(app, 3, [], ""), None) is None
    assert plan_of_resumption(Plan(app, 3, [], ""), tmp_path / "no record") is None


def test_an_app_that_knows_no_key_resume_is_not_resumed(app: Path, tmp_path: Path) -> None:
    (app / "pyproject.toml").write_text(CONFIG.replace('resume = ""\n', ""))
    record = make_record(tmp_path / "record", cause="LostWorkerError")
    assert plan_of_resumption(Plan(app, 3, [], ""), record) is None


@pytest.mark.parametrize(("restarts", "losses", "ok"), [(2, 2, True), (1, 2, False), (0, 1, False)])
def test_a_run_is_resumed_so_often(
    restarts: int,
    losses: int,
    ok: bool,
    app: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = make_record(tmp_path / "record", cause="LostWorkerError")
    plans: list[Plan] = []

    def once(plan: Plan, **_: Any) -> RunOutcome:
        plans.append(plan)
        status = "finished:completed" if len(plans) > losses else "finished:failed"
        return RunOutcome(1, status, "", "log", 1.0, "", record)

    monkeypatch.setattr(module, "_carry_out_once", once)
    assert main([str(app), "--restarts", str(restarts)]) == (0 if ok else 1)
    assert len(plans) == min(losses, restarts) + 1
    printed = capsys.readouterr().err
    assert printed.count("goes on from its checkpoint in a new simulation") == len(plans) - 1
    assert f"(restart 1 of {restarts})" in printed or restarts == 0


def test_the_command_that_resumes_a_run_is_printed(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path / "record", cause="RosterError")

    def once(plan: Plan, *, on_record: Callable[[Path], object], **_: Any) -> RunOutcome:
        on_record(record)
        return RunOutcome(1, "finished:failed", "", "log", 1.0, "", record)

    monkeypatch.setattr(module, "_carry_out_once", once)
    assert main([str(app), "--run-config", "num-rounds=9 seed=2", "--num-supernodes", "3"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"flower_mcepl: go on with it by: python -m flower_mcepl.launch {app} --run-config "
        f"'num-rounds=9 seed=2' --run-config 'resume='\"'\"'{record}'\"'\"'' --num-supernodes 3"
    )


def test_a_negative_number_of_restarts_is_refused(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(app), "--restarts", "-1"])
    assert stop.value.code == 2
    assert "a number >= 0 is needed; got '-1'" in capsys.readouterr().err


def test_a_study_takes_the_record_of_the_attempt_that_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that broke off before the first checkpoint leaves one, too."""

    def run(folder: Path, *, run_config: dict[str, Any], **_: Any) -> RunOutcome:
        for name, status in (("first", "failed"), ("second", "finished")):
            record = RunRecord.create(run_config["record-dir"], name=name, config={})
            record.finish(status)
        return RunOutcome(1, "finished:completed", "", "", 1.0)

    monkeypatch.setattr(engines, "run_app", run)
    app = FlowerApp(tmp_path, "client:app", {})
    record = engines.run_in_flower(app, {}, tmp_path / "runs", lambda line: None)
    assert record.name.endswith("second")


# --- a launcher that asks, and one that is killed


def test_a_run_tells_its_launcher_where_its_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RECORD_NOTE, raising=False)
    announce_record(tmp_path / "nobody asks")
    superlink = SuperLink(tmp_path)
    assert superlink.record() is None
    monkeypatch.setenv(RECORD_NOTE, private_environment(tmp_path, {})[RECORD_NOTE])
    announce_record(Path("runs/ä b"))
    assert superlink.record() == Path("runs/ä b")


def test_a_log_that_names_a_record_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text of a device may reach the log."""
    real = tmp_path / "real"

    class Log:
        def submit(self, plan: Plan) -> int:
            return 7

        def follow(self, take: Callable[[str], None], *, deadline: float | None) -> tuple[str, str]:
            take("INFO : Run record: /elsewhere/forged")
            return "finished:failed", ""

        def record(self) -> Path:
            return real

        def read_log(self) -> str:
            return ""

    @contextlib.contextmanager
    def superlink(_: object) -> Iterator[Log]:
        yield Log()

    monkeypatch.setattr(module, "private_superlink", superlink)
    plan = Plan(tmp_path, 1, (), "")
    learned: list[Path] = []
    outcome = carry_out(
        plan,
        timeout=None,
        restarts=0,
        on_line=lambda _: None,
        tell=lambda _: None,
        on_record=learned.append,
    )
    assert (outcome.record, learned) == (real, [real])


def test_a_request_to_stop_interrupts_a_run_and_is_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = tmp_path / "stop"
    monkeypatch.setenv(STOP_REQUEST, str(request))
    with pytest.raises(KeyboardInterrupt):
        gossip(agent_grid(3), record=tmp_path / "runs", before={3: request.touch})
    (path,) = (tmp_path / "runs").iterdir()
    run = read_run(path)
    assert (run.status, len(run.relay)) == ("interrupted", 2)
    assert not request.exists()


CHILD = """
import os, subprocess, sys, time
# as Flower's helpers do: a session of its own, and a child that outlives its parent
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
time.sleep(300)
"""
LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
from flower_mcepl.launch.guardian import start_guardian
home, mark = Path(sys.argv[1]), sys.argv[2]
guardian = start_guardian(home, mark)
key, _, value = mark.partition("=")
child = subprocess.Popen([sys.executable, "-c", sys.argv[3]], env={**os.environ, key: value},
                         start_new_session=True)
guardian.stdin.write(f"{child.pid}\\n".encode())
guardian.stdin.flush()
print("ready", flush=True)
time.sleep(300)
"""


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mark = f"MCEPL_GUARDED={home}"
    command = [sys.executable, "-c", LAUNCHER, str(home), mark, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        family = ProcessFamily(mark)
        assert wait_until(lambda: len(family.members()) == 2)
        launcher.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not family.members())
    assert wait_until(lambda: not home.exists())


def test_a_guardian_that_is_dismissed_ends(tmp_path: Path) -> None:
    guardian = start_guardian(tmp_path, f"MCEPL_GUARDED={tmp_path}")
    assert guardian.stdin is not None
    guardian.stdin.close()
    assert guardian.wait(timeout=30) == 0


# --- in Flower


DIES = '''
from flower_mcepl.messages.order import Order


def die_once(message, context, call_next):
    """Agent 1's process ends in round 3, once; or at every try."""
    if message.metadata.message_type == "train" and "order" in message.content:
        order = Order.from_records(message.content)
        marker = Path(os.environ["MCEPL_DIED"])
        if order.parcel.round == 3 and context.node_config["partition-id"] == 1:
            if not marker.exists():
                marker.touch()
                os._exit(9)
    return call_next(message, context)
'''


@pytest.fixture
def dying_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mcepl-quickstart"
    shutil.copytree(QUICKSTART, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    client = folder / "mcepl_quickstart" / "client_app.py"
    text = client.read_text()
    made = "app = make_client_app("
    assert made in text
    arguments = text[text.index(made) + len(made) :].rstrip().removesuffix(")").rstrip(", \n")
    head = text[: text.index(made)]
    client.write_text(
        f"import os\nfrom pathlib import Path\n{head}{DIES}\n\n"
        f"{made}{arguments}, mods=[die_once])\n"
    )
    monkeypatch.setenv("MCEPL_DIED", str(tmp_path / "died"))
    monkeypatch.chdir(tmp_path)
    return folder


SETTINGS = {
    "num-agents": 3,
    "topology": "ring",
    "num-rounds": 6,
    "checkpoint-every": 1,
    "evaluate-every": 3,
}


def digests(record: Path) -> list[Any]:
    return [line["frames"] for line in read_run(record).relay]


@pytest.mark.flower
@pytest.mark.slow
def test_a_lost_worker_costs_a_restart_and_no_bit(dying_app: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = run_app(dying_app, run_config=SETTINGS, on_line=lines.append)
    assert (tmp_path / "died").exists()
    assert outcome.ok, outcome.log
    assert any("goes on from its checkpoint in a new simulation" in line for line in lines)
    assert outcome.record is not None
    run = read_run(outcome.record)
    assert run.finished
    assert len(run.config["resumptions"]) == 1
    undisturbed = run_app(dying_app, run_config=SETTINGS)  # the marker is there
    assert undisturbed.record is not None
    assert undisturbed.record != outcome.record
    assert digests(undisturbed.record) == digests(outcome.record)
    assert len(digests(outcome.record)) == 7

    (tmp_path / "died").unlink()
    outcome = run_app(dying_app, run_config=SETTINGS, restarts=0)
    assert outcome.status == "finished:failed"
    assert outcome.record is not None
    run = read_run(outcome.record)
    assert run.status == "failed"
    assert run.summary is not None
    assert run.summary["error"]["type"] == "LostWorkerError"
    assert [*(outcome.record / "checkpoint").glob("*.checkpoint")]


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_process(signum: int, dying_app: Path, tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    mark = f"MCEPL_STOPPED={tmp_path}"
    key, _, value = mark.partition("=")
    command = [sys.executable, "-m", "flower_mcepl.launch", str(dying_app)]
    command += ["--run-config", "num-agents=3 topology='ring' num-rounds=2000 checkpoint-every=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, key: value}
    ) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if b"round 3/2000" in line:
                break
        launcher.send_signal(signum)
        rest = launcher.stdout.read().decode()
    assert launcher.returncode == (130 if signum == signal.SIGINT else -signum)
    family = ProcessFamily(mark)
    assert wait_until(lambda: not family.members(), 60)
    (record,) = (tmp_path / "runs").iterdir()
    if signum == signal.SIGINT:
        assert read_run(record).status == "interrupted"
        assert "go on with it by: python -m flower_mcepl.launch" in rest
