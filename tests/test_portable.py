"""Other systems: Windows as far as it can be played, any encoding, spawn, and what a source distribution holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.study_app import write_app
from tests.windows import plays_windows

ROOT = Path(__file__).parents[1]

# --- Windows ---

ON_WINDOWS = """
import importlib, os, pathlib, pkgutil, re, signal, sys

assert sys.platform == "win32" and not hasattr(signal, "SIGKILL") and not hasattr(os, "fork")
import flower_mcepl

for module in pkgutil.walk_packages(flower_mcepl.__path__, "flower_mcepl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from flower_mcepl import RecordError, Topology, simulate
from flower_mcepl.cli import main
from flower_mcepl.files.sealed import file_lock
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.store import StateStore
from tests.fleet import make_fleet

# a record, a run that stops in its middle, its resumption, and what is kept of neither
record = RunRecord.create("runs", name="ring", config={}, with_frames=True)
options = {"num_rounds": 3, "checkpoint_every": 1, "key_interval": 2}


def stop(round, agent, reply):
    if round == 3:
        raise KeyboardInterrupt


try:
    simulate(make_fleet(3), Topology.ring(3), record=record, on_reply=stop, **options)
except KeyboardInterrupt:
    print("stopped")
result = simulate(make_fleet(3), Topology.ring(3), resume=record.path, log=print, **options)
assert result.summary["status"] == "finished"
assert sorted(path.name for path in record.path.iterdir() if path.is_file()) == [
    ".lock", "config.json", "relay.jsonl", "rounds.jsonl", "summary.json", "traffic.jsonl"
]

lock = pathlib.Path("lock")
with file_lock(lock, wait=0, busy="nobody holds it"):
    try:
        with file_lock(lock, wait=0, busy="process {process} does", error=RecordError):
            raise AssertionError("two hold one lock")
    except RecordError as error:
        assert str(error) == f"process {os.getpid()} does", error
with file_lock(lock, wait=0, busy="nobody holds it any more"):
    pass
store = StateStore(pathlib.Path("states"))
with store.hold(0):
    store.clear()


def command(*arguments):
    sys.argv = ["flower-mcepl", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        print(f"--- {arguments[0]} ended with {end.code}", flush=True)
        return end.code


if __name__ == "__main__":
    for arguments in (
        ["show", record.path],
        ["compare", "runs", "--markdown", "t.md", "--csv", "t.csv"],
        ["plot", record.path],
        ["report", record.path],
        ["frame", record.path / "frames" / "00002-agent-0000.frame"],
        ["run", "one.toml"],
        ["run", "two.toml", "--jobs", "2"],
        ["compare", "one", "two"],
    ):
        assert command(*arguments) == 0, arguments
    assert command("run", "flower.toml") == 1

    for path in pathlib.Path().rglob("*"):
        assert re.fullmatch(r'[^<>:"|?*\\\\\\x00-\\x1f]*[^. <>:"|?*\\\\]', path.name), path
    print("played to the end")
"""

STUDY = """
app = 'mcepl-portable-probe'
out = '{out}'
engine = '{engine}'
[config]
num-rounds = 1
[grid]
algorithm = ['{algorithms}']
"""


def on_windows(
    folder: Path, source: str, *, bare: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Carry out a Python source in `folder`, on Windows."""
    (folder / "stage").mkdir()
    (folder / "script.py").write_text(source, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=plays_windows(folder / "stage", bare=bare),
        capture_output=True,
        text=True,
        encoding="cp1252",
    )


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="open files are looked up in /proc"
)


@needs_proc
def test_records_commands_and_studies_work_on_windows(tmp_path: Path) -> None:
    app = write_app(tmp_path, "portable")
    with open(app / "mcepl_portable_probe" / "client_app.py", "a", encoding="utf-8") as client:
        client.write("import sys\n\nassert sys.platform == 'win32'\n")
    for name, engine, algorithms in (
        ("one", "in-process", "mcepl', 'dsgd"),
        ("two", "in-process", "dsgd"),
        ("flower", "flower", "dsgd"),
    ):
        text = STUDY.format(out=name, engine=engine, algorithms=algorithms)
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    result = on_windows(tmp_path, ON_WINDOWS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("played to the end\n")
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "needs Linux or macOS" in error
    assert "±" in result.stdout  # cp1252 has it


FORBIDDEN_THERE = {
    "import fcntl": "No module named 'fcntl'",
    "import signal; signal.SIGKILL": "no attribute 'SIGKILL'",
    "import os; os.getpgrp()": "no attribute 'getpgrp'",
    "import os; f = open('x', 'ab'); os.unlink('x')": "used by another process",
    "import os; os.mkdir('y'); f = open('y/z', 'ab'); os.rename('y', 'v')": "used by another process",
    "import os; open('a', 'ab'); open('b', 'ab'); os.rename('a', 'b')": "exists",
    "import os; os.fsync(open('script.py', 'rb').fileno())": "Bad file descriptor",
    "import os; os.open('.', os.O_RDONLY)": "a folder cannot be opened",
    "open('x')": "'encoding' argument not specified",
    "from pathlib import Path; Path('x').read_text()": "'encoding' argument not specified",
}


@needs_proc
def test_the_play_of_windows_can_fail(tmp_path: Path) -> None:
    source = f"""
for source in {list(FORBIDDEN_THERE)!r}:
    try:
        exec(source, {{"__name__": "flower_mcepl.sample"}})
    except Exception as error:
        print(error)
    else:
        print("nothing wrong")
"""
    result = on_windows(tmp_path, source, bare=True)
    assert result.returncode == 0, result.stderr
    errors = result.stdout.splitlines()
    for told, (source, error) in zip(errors, FORBIDDEN_THERE.items(), strict=True):
        assert error in told, source
