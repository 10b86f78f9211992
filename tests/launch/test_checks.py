"""What a launcher refuses before anything starts, and how it shows errors."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flower_mcepl.errors import ConfigError, LaunchError
from flower_mcepl.files import room
from flower_mcepl.launch import checks
from flower_mcepl.launch.checks import check_plan, refuse_unwritable
from flower_mcepl.launch.command import main
from flower_mcepl.launch.logs import ShortTracebacks, own_error, why_ray_did_not_start
from flower_mcepl.launch.plan import Plan
from flower_mcepl.launch.superlink import private_environment
from flower_mcepl.runs import check

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in main',
    "    start()",
]


def plan(*run_config: str) -> Plan:
    return Plan(QUICKSTART, 10, list(run_config), "")


@pytest.fixture
def looked_at_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are checked in this process, where torch is loaded already."""

    def run(command: list[str], *, input: str, **_: Any) -> "subprocess.CompletedProcess[str]":
        assert command == [sys.executable, "-m", check.__name__]
        out = io.StringIO()
        with monkeypatch.context() as other:
            other.setattr(sys, "stdin", io.StringIO(input))
            other.setattr(sys, "stdout", out)
            return subprocess.CompletedProcess(command, check.main(), out.getvalue(), "")

    monkeypatch.setattr(checks, "subprocess", SimpleNamespace(run=run))


@pytest.mark.slow
def test_another_process_checks_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^run-config key num-rounds must be int; got 'many'"):
        check_plan(plan("num-rounds='many'"))


@pytest.mark.usefixtures("looked_at_here")
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            "num-round=3",
            r"pyproject.toml does not have; got 'num-round'. Did you mean 'num-rounds'",
        ),
        ("xyzzy=3", "got 'xyzzy'. Its keys: .*algorithm.*width"),
        ("num-rounds='many'", "run-config key num-rounds must be int; got 'many'"),
        ("num-agents=3", r"mean degree must be in \[0, 2\]; got 4"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_starts(
    entry: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        check_plan(plan(entry))


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(QUICKSTART), "--run-config", "num-round=3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flower_mcepl: ConfigError: Flower takes no run-config key")
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("looked_at_here")
def test_good_settings_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_plan(plan("num-rounds=3 topology='ring'", "dsgd.lr=0.5"))


def test_the_settings_of_another_app_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nnum-agents = 2\ntopology = 7\n"
    )
    check_plan(Plan(tmp_path, 2, ["topology=8"], ""))


def test_a_folder_that_is_a_file_or_read_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"record-dir must be a folder .*; .*file cannot"):
        refuse_unwritable(tmp_path / "file" / "runs", "record-dir")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root
    with pytest.raises(LaunchError, match=r"can be written; .* cannot. Name another"):
        refuse_unwritable(tmp_path / "new" / "runs", "record-dir")


def test_a_full_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOM", 10**18)
    with pytest.raises(LaunchError, match=r"must have .* MB of room; .* Make room"):
        refuse_unwritable(tmp_path, "record-dir")


def test_a_process_without_a_home_gets_one(tmp_path: Path) -> None:
    assert private_environment(tmp_path, {})["HOME"] == str(tmp_path)
    assert private_environment(tmp_path, {"HOME": "/home/me"})["HOME"] == "/home/me"


def shown(lines: list[str]) -> list[str]:
    tracebacks = ShortTracebacks()
    return [out for line in lines for out in tracebacks.feed(line)]


def test_a_traceback_of_an_own_error_is_its_last_line() -> None:
    own = "flower_mcepl.errors.RosterError: round 3 needs 2 agents. Mend them."
    lines = ["INFO : begin", *TRACEBACK, own, "ERROR : Exit Code: 700"]
    assert shown(lines) == ["INFO : begin", own.removeprefix("flower_mcepl.errors."), lines[-1]]
    assert own_error("\n".join(lines)) == "RosterError: round 3 needs 2 agents. Mend them."


def test_a_traceback_of_another_error_stays_whole() -> None:
    lines = ["a", *TRACEBACK, "KeyError: 'label'", "", *TRACEBACK, "ValueError: 3", "z"]
    assert shown(lines) == lines
    assert own_error("\n".join(lines)) is None


def test_a_ray_that_does_not_start_is_named() -> None:
    lines = [
        TRACEBACK[0],
        '  File "/x/ray/_private/worker.py", line 1905, in init',
        "    _global_node = ray._private.node.Node(",
        '  File "/x/ray/_private/state.py", line 60, in _connect_and_get_accessor',
        "ray.exceptions.RaySystemError: System error: Failed to connect to GCS.",
        "",
        "The above exception was the direct cause of the following exception:",
        *TRACEBACK,
        "RuntimeError: Simulation Runtime crashed.",
    ]
    assert why_ray_did_not_start("\n".join(lines)) == lines[4]
    # an actor that dies is told through ray.get, in the same file
    lines[1] = '  File "/x/ray/_private/worker.py", line 2822, in get'
    assert why_ray_did_not_start("\n".join(lines)) is None
    assert why_ray_did_not_start("\n".join([*TRACEBACK, "KeyError: 'ray'"])) is None
