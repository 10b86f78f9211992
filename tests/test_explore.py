"""The fast suite draws the same examples every time; finds can be repeated."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import explore

ROOT = Path(__file__).parent.parent
# a property that fails at times, and one that always holds
PROPERTIES = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=200)
@given(number=st.integers(0, 2**20))
def test_false_at_times(number):
    assert number % 20 != 7

@settings(max_examples=20)
@given(number=st.integers())
def test_true(number):
    assert number == int(str(number))
"""


def draws() -> list[object]:
    seen: list[object] = []

    @settings(max_examples=200)
    @given(st.one_of(st.integers(), st.text(), st.floats()).map(repr))
    def note(value: object) -> None:
        seen.append(value)

    note()
    return seen


def test_examples_do_not_depend_on_what_else_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draws()
    (tmp_path / "full_of_constants.py").write_text(
        "".join(f"A{n} = {10**9 + n}; B{n} = 'constant {n}'\n" for n in range(300))
    )
    monkeypatch.syspath_prepend(tmp_path)
    __import__("full_of_constants")
    assert draws() == before
    assert len({*before}) > 100


@pytest.mark.parametrize("_", range(2))
def test_every_test_begins_with_the_same_global_seeds(_: int) -> None:
    drawn = random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002
    assert drawn == (0.8444218515250481, 0.5488135039273248, 0.49625658988952637)


@pytest.mark.slow
def test_a_find_is_an_exit_code_and_a_command_that_repeats_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "torch.py").write_text("raise ImportError('takes seconds')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    test = tmp_path / "test_properties.py"
    test.write_text(PROPERTIES)

    def run(*command: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    code, output = run("-m", "tests.explore", "--seconds", "60", str(test))
    assert code == 1, output
    assert "FOUND" in output
    assert "@reproduce_failure(" in output
    (line,) = (line for line in output.splitlines() if line.startswith("python -m pytest -n 0 "))
    (found,) = set(re.findall(r"number=\d+", output))
    code, again = run(*shlex.split(line.removeprefix("python ").replace("-n 0 ", "")))
    assert code == 1
    assert found in again


def test_what_a_pass_says_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int | str] = [0, 0, 1]
    monkeypatch.setattr(explore, "play", lambda *_: codes.pop(0))
    assert explore.explore(60, []) == 1
    assert "pytest's exit code: 1" in capsys.readouterr().out
    codes[:] = ["none, it did not end in 400 s"]
    assert explore.explore(60, []) == 1
    assert "did not end" in capsys.readouterr().out
    codes[:] = [0]
    assert explore.explore(0, []) == 0  # one pass at least
    assert "nothing found in 0 s with the seeds" in capsys.readouterr().out
