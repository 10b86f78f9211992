"""Runs of a study that broke off: they go on, to the bits of runs that did not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl.cli.run import run
from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.record.parsing import read_raw
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.values import to_json
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.studies import Study, engines, read_study, run_study
from flower_mcepl.studies.attempts import (
    ABOUT,
    RECORDS,
    UNFINISHED,
    can_resume,
    code_digest,
    find_attempts,
)
from flower_mcepl.studies.engines import ENGINES
from flower_mcepl.studies.runner import Task, broken_off_strangers, tasks_of
from tests.fleet.study_app import write_app, write_study
from tests.fleet.twins import Twin

# every round ends with a checkpoint
KEYS = 'checkpoint-every = 1\nkeep-frames = true\nresume = ""\n'
STUDY = "[config]\nnum-rounds = 4\n[grid]\nseed = [1, 2]\n"


# One a worker: a process has one module of a name.
@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    app = write_app(tmp_path_factory.mktemp("apps"), "attempts")
    pyproject = app / "pyproject.toml"
    head = "[tool.flwr.app.config]\n"
    text = pyproject.read_text(encoding="utf-8").replace(head, head + KEYS)
    pyproject.write_text(text, encoding="utf-8")
    return app


@pytest.fixture(scope="session")
def whole(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study as nothing interrupts it."""
    plan = read_study(write_study(tmp_path_factory.mktemp("whole"), app, STUDY))
    assert [outcome.error for outcome in run_study(plan)] == [None, None]
    return plan


def play(path: Path) -> list[str | None]:
    return [outcome.error for outcome in run_study(read_study(path))]


def ends_at(monkeypatch: pytest.MonkeyPatch, count: int, end: Callable[[], Any]) -> None:
    """Let a run end otherwise when the so-manieth line of a round is written."""
    real, lines = RunRecord.log_round, [0]

    def log_round(self: RunRecord, *arguments: Any, **named: Any) -> None:
        lines[0] += 1
        if lines[0] == count:
            end()
        real(self, *arguments, **named)

    monkeypatch.setattr(RunRecord, "log_round", log_round)


def interrupt() -> None:
    raise KeyboardInterrupt


def break_off(path: Path, count: int = 8) -> Task:
    """Interrupt the study in round 3 of its second run; the first has five lines."""
    with pytest.MonkeyPatch.context() as patch:
        ends_at(patch, count, interrupt)
        with pytest.raises(KeyboardInterrupt):
            play(path)
    return tasks_of(read_study(path))[1]


def attempt_of(task: Task) -> Path:
    (folder,) = (task.out / UNFINISHED).iterdir()
    return folder


def amend(task: Task, **changes: Any) -> None:
    about = attempt_of(task) / ABOUT
    about.write_text(to_json({**read_raw(about), **changes}), encoding="utf-8")


def facts(record: Path) -> tuple[Any, ...]:
    """What must not depend on how a run was carried out."""
    run = read_run(record)
    rows, lines = (
        [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        for rows in (run.rounds, run.relay)
    )
    frames = {file.name: file.read_bytes() for file in (record / "frames").iterdir()}
    states = {file.name: file.read_bytes() for file in (record / "agents").iterdir()}
    return rows, lines, run.traffic, frames, states


def check_as_whole(task: Task, whole: Study) -> None:
    (same,) = (one for one in tasks_of(whole) if one.run.digest == task.run.digest)
    assert facts(task.record) == facts(same.record)
    assert not any((task.out / UNFINISHED).iterdir())


def test_a_run_goes_on_after_ctrl_c(app: Path, whole: Study, tmp_path: Path) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    assert [attempt.after for attempt in task.broken_off()] == [2]
    assert play(path) == [None]
    check_as_whole(task, whole)
    (resumption,) = read_run(task.record).config["resumptions"]
    assert resumption["after_round"] == 2
    log = task.log.read_text(encoding="utf-8")
    assert [log.count(f"round {round}/4") for round in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert "it goes on after round 2" in log


def test_a_run_goes_on_after_a_kill(app: Path, whole: Study, tmp_path: Path) -> None:
    path = write_study(tmp_path, app, STUDY)

    def killed() -> None:
        ends_at(pytest.MonkeyPatch(), 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        play(path)

    assert Twin(killed).wait() == -signal.SIGKILL
    task = tasks_of(read_study(path))[1]
    assert [attempt.after for attempt in task.broken_off()] == [3]
    assert play(path) == [None]
    check_as_whole(task, whole)


def test_a_run_that_failed_goes_on(app: Path, whole: Study, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    path = write_study(tmp_path, app, STUDY)
    with pytest.MonkeyPatch.context() as patch:
        ends_at(patch, 8, full)
        assert play(path) == [None, "OSError: [Errno 28] No space left on device"]
    task = tasks_of(read_study(path))[1]
    with pytest.MonkeyPatch.context() as patch:  # and again, one round later
        ends_at(patch, 2, full)
        assert play(path) == ["OSError: [Errno 28] No space left on device"]
    assert [attempt.after for attempt in task.broken_off()] == [3]
    assert play(path) == [None]
    check_as_whole(task, whole)
    assert [one["after_round"] for one in read_run(task.record).config["resumptions"]] == [2, 3]


@pytest.mark.parametrize(
    "change", [{"code": "other"}, {"versions": {"torch": "0"}}, {"engine": "batched"}]
)
def test_a_run_of_other_code_begins_anew(
    change: dict[str, Any], app: Path, whole: Study, tmp_path: Path
) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    amend(task, **change)
    assert task.broken_off() == []
    assert play(path) == [None]
    check_as_whole(task, whole)
    assert "resumptions" not in read_run(task.record).config


def test_a_run_that_is_refused_to_go_on_begins_anew(
    app: Path, whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    (record,) = (attempt_of(task) / RECORDS).iterdir()
    agents = [{**row, "num_examples": 3} for row in read_run(record).config["agents"]]
    RunRecord(record).amend_config(agents=agents)  # as of a run on other data
    seen: list[int] = []
    real = engines.simulate

    def broken(*arguments: Any, **options: Any) -> Any:
        seen.append(len([*(task.out / UNFINISHED).iterdir()]))
        if options["resume"] is None:
            raise FlowerMceplError("the disk with the data is not there")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "simulate", broken)
        assert play(path) == ["the disk with the data is not there"]
    assert seen == [1, 2]
    assert [attempt.after for attempt in task.broken_off()] == [2]  # nothing was thrown away
    assert play(path) == [None]
    check_as_whole(task, whole)
    log = task.log.read_text(encoding="utf-8")
    assert "it cannot: a run is resumed with the settings it began with; num-examples" in log


def test_the_attempt_that_came_furthest_goes_on(app: Path, whole: Study, tmp_path: Path) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    first = attempt_of(task)
    shutil.copytree(first, tmp_path / "early")
    assert break_off(path, 2).broken_off()[0].after == 3
    shutil.copytree(tmp_path / "early", first.with_name("early"))
    assert [attempt.after for attempt in task.broken_off()] == [3, 2]
    assert play(path) == [None]
    check_as_whole(task, whole)


def test_a_finished_record_only_has_to_come_to_its_place(
    app: Path, whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, app, STUDY)
    real = RunRecord.amend_config

    def amend_config(self: RunRecord, **changes: Any) -> None:
        if changes.get("study"):
            raise KeyboardInterrupt
        real(self, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "amend_config", amend_config)
        with pytest.raises(KeyboardInterrupt):
            play(path)
    first, second = tasks_of(read_study(path))
    assert [attempt.finished for attempt in first.broken_off()] == [True]
    begun: list[int] = []
    in_process = ENGINES["in-process"]
    with monkeypatch.context() as patch:
        patch.setitem(
            ENGINES, "in-process", lambda *a: begun.append(a[1]["seed"]) or in_process(*a)
        )
        assert play(path) == [None, None]
    assert begun == [2]
    for task in (first, second):
        check_as_whole(task, whole)


def test_what_nobody_can_go_on_with_is_removed(app: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    unfinished = task.out / UNFINISHED
    for name, about in (("torn", "{"), ("bare", to_json(task.subject)), ("list", "[]")):
        (unfinished / name).mkdir()
        (unfinished / name / ABOUT).write_text(about, encoding="utf-8")
    (unfinished / "empty").mkdir()
    assert len(find_attempts(task.out, task.subject)) == 1
    amend_all(task, code="other")
    assert play(write_study(tmp_path, app, STUDY)) == [None]
    assert [*unfinished.iterdir()] == []


def amend_all(task: Task, **changes: Any) -> None:
    for about in (task.out / UNFINISHED).glob(f"*/{ABOUT}"):
        if "digest" in about.read_text(encoding="utf-8"):
            about.write_text(to_json({**read_raw(about), **changes}), encoding="utf-8")


def test_a_run_that_the_study_leaves_out_for_a_while_goes_on(
    app: Path, whole: Study, tmp_path: Path
) -> None:
    task = break_off(write_study(tmp_path, app, STUDY))
    other = read_study(write_study(tmp_path, app, STUDY.replace("[1, 2]", "[1]")))
    assert run_study(other) == []
    assert broken_off_strangers(other) == [attempt_of(task)]
    again = write_study(tmp_path, app, STUDY)
    assert broken_off_strangers(read_study(again)) == []
    assert play(again) == [None]
    check_as_whole(task, whole)
    assert "resumptions" in read_run(task.record).config


def test_it_is_told_why_a_run_that_broke_off_begins_anew(
    app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, app, STUDY)
    task = break_off(path)
    assert task.begins_anew() is None
    amend(task, code="other", versions={"torch": "0"})
    run(path, dry_run=True)
    line = "broke off, and begins anew: after round 2; changed since: code, versions."
    assert f"WARNING: {task.run.slug} {line}" in capsys.readouterr().out


def test_where_no_checkpoint_is_written_a_run_begins_anew(
    app: Path, whole: Study, tmp_path: Path
) -> None:
    path = write_study(tmp_path, app, STUDY.replace("[grid]", "checkpoint-every = 0\n[grid]"))
    task = break_off(path)
    assert task.broken_off() == []
    assert play(path) == [None]
    assert facts(task.record) == facts(tasks_of(whole)[1].record)


def test_flower_is_told_of_the_record(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks_of(read_study(write_study(tmp_path, app, STUDY, engine="flower")))[0]
    settings: list[dict[str, Any]] = []

    def run_app(folder: Path, *, run_config: dict[str, Any], on_line: Any) -> Any:
        settings.append(run_config)
        raise FlowerMceplError("stop")

    monkeypatch.setattr(engines, "run_app", run_app)
    for resume in (None, tmp_path / "record"):
        with pytest.raises(FlowerMceplError, match="stop"):
            ENGINES["flower"](task.app, task.run.config, tmp_path, print, resume)
    assert [one.get("resume") for one in settings] == [None, tmp_path / "record"]
    assert all(one["record-dir"] == tmp_path for one in settings)
    assert can_resume("flower", task.app)
    del task.app.config["resume"]
    assert not can_resume("flower", task.app)  # Flower would refuse the key
    assert can_resume("in-process", task.app)


@pytest.mark.flower
@pytest.mark.slow
def test_under_flower_a_run_goes_on_after_ctrl_c(
    app: Path, whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_study(tmp_path, app, STUDY.replace("[1, 2]", "[2]"), engine="flower")
    (task,) = tasks_of(read_study(path))
    command = [sys.executable, "-m", "flower_mcepl", "run", str(path)]
    # Where pytest itself was started in the background, its children ignore Ctrl-C.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears) as process:
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end and not task.broken_off():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    (attempt,) = task.broken_off()
    assert f"{task.run.slug} broke off; it goes on after round {attempt.after}." in output
    assert play(path) == [None]
    (same,) = (one for one in tasks_of(whole) if one.run.digest == task.run.digest)
    rows, lines, _, frames, _ = facts(task.record)
    expected = facts(same.record)
    assert rows == expected[0]
    assert [line["frames"] for line in lines] == [line["frames"] for line in expected[1]]
    assert frames.keys() == expected[3].keys()  # each names its own run
    assert [one["after_round"] for one in read_run(task.record).config["resumptions"]] == [
        attempt.after
    ]
    assert not any((task.out / UNFINISHED).iterdir())


def digest_of(folder: Path) -> str:
    code_digest.cache_clear()
    return code_digest(folder)


def test_the_code_of_an_app_is_its_python_files(app: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(app, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of(copy)
    assert before == digest_of(app)
    package = copy / "mcepl_attempts_probe"
    for name in (".git/hook.py", "env/lib/site.py", "__pycache__/client_app.pyc", "notes.txt"):
        (copy / name).parent.mkdir(exist_ok=True, parents=True)
        (copy / name).write_text("1", encoding="utf-8")
    (copy / "env" / "pyvenv.cfg").touch()
    (package / ".client_app.py").write_text("1", encoding="utf-8")
    if sys.platform != "win32":
        for name in (".#client_app.py", "gone.py"):  # the first as an open editor leaves it
            (package / name).symlink_to("nobody@nowhere.1")
    assert digest_of(copy) == before
    client = package / "client_app.py"
    client.write_text(client.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    changed = digest_of(copy)
    (package / "tools.py").touch()
    assert len({before, changed, digest_of(copy)}) == 3
