"""Other systems: Windows as far as it can be played, any encoding, spawn, and what a
source distribution holds.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_mcepl import Topology, simulate
from flower_mcepl.launch.processes import _table_of_proc, _table_of_ps
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.terminal import any_encoding, spelled
from tests.fleet.agents import make_fleet
from tests.fleet.study_app import write_app
from tests.fleet.windows import plays_windows

ROOT = Path(__file__).parents[2]

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
from tests.fleet.agents import make_fleet

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


@pytest.mark.slow
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
    "import os; os.mkdir('y'); f = open('y/z', 'ab'); os.rename('y', 'v')": (
        "used by another process"
    ),
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


# --- any encoding ---

IN_AN_ENCODING = """
import io
import sys

from flower_mcepl import Topology, simulate
from flower_mcepl.cli import main
from flower_mcepl.launch.command import main as launch
from flower_mcepl.report.__main__ import main as report
from tests.fleet.agents import make_fleet

_, record, nowhere, *encodings = sys.argv
for encoding in encodings:  # of the streams; "own" is the one that Python chose
    if encoding != "own":
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding, write_through=True)
        sys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding, write_through=True)
    simulate(make_fleet(2), Topology.ring(2), num_rounds=1, log=print)
    assert report([record]) == 0
    assert launch([record]) == 1
    for arguments in (
        ["show", record],
        ["compare", record],
        ["compare", nowhere],
        ["plot", record],
        ["report", record],
        ["frame", record + "/frames/00001-agent-0000.frame"],
        # itself writes to no other place in a C locale
    ["tensorboard", "plain", "--out", "events"],
        ["run", "study.toml", "--dry-run"],
        ["run", "study.toml"],
        ["run", "--help"],
        ["doctor", "--help"],
        ["data", "--help"],
    ):
        sys.argv = ["flower-mcepl", *arguments]
        try:
            main()
        except SystemExit as end:
            assert (end.code in (0, None)) == (arguments[1] != nowhere), arguments
    print("done in", encoding, flush=True)
"""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def record_of_many_letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record whose place and whose classes have letters that few encodings have."""
    folder = tmp_path_factory.mktemp("records") / "n\xe4me \u540d"
    record = RunRecord.create(name="n\xe4me", path=folder, config={}, with_frames=True)
    simulate(make_fleet(3), Topology.ring(3), num_rounds=2, record=record)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for agent in config["agents"]:
        agent["classes"] = "\u540d gr\xf6\xdfe \u2026"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "encodings"),
    [({"PYTHONIOENCODING": "ascii"}, ("own", "cp1252")), (C_LOCALE, ("own",))],
    ids=["ascii-and-cp1252", "C-locale"],
)
def test_no_command_dies_on_an_encoding(
    env: dict[str, str], encodings: tuple[str, ...], record_of_many_letters: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path, "letters")
    study = f"app = '{app}'\nout = 'out'\nengine = 'in-process'\n[[runs]]\nlabel = 'one'\n"
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    (tmp_path / "plain").symlink_to(record_of_many_letters)
    (tmp_path / "script.py").write_text(IN_AN_ENCODING, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "script.py", str(record_of_many_letters), "\u540d", *encodings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr).decode("cp1252", "replace")
    in_ascii, in_cp1252, _ = (result.stdout + b"done in").split(b"done in", 2)
    assert b"mean +/- sd" in in_ascii
    assert (b"mean \xb1 sd" in in_cp1252) == ("cp1252" in encodings)
    assert rb"\u540d" in in_ascii  # told, though it cannot be shown
    assert b"Traceback" not in result.stderr
    assert result.stderr.count(b"error: ") == len(encodings)


def test_a_log_gets_what_its_stream_can_write() -> None:
    lines: list[bytes] = []
    log = any_encoding(lambda line: lines.append(line.encode("cp1252")))
    log("plain")
    log("a \xb1 b \u2026 \u2500 \u540d")
    assert lines == [b"plain", b"a +/- b ... - \\u540d"]
    assert spelled("\xb1\u2026\xe4\ud800") == r"+/-...\xe4\ud800"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def docstrings(tree: ast.AST) -> set[int]:
    """Where the strings begin that are statements of their own."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def test_what_we_log_is_ascii() -> None:
    """Under Flower, log lines go where a console's encoding decides; tables and pages
    go elsewhere.
    """
    for path in python_files("flower_mcepl"):
        if path.relative_to(ROOT).parts[1] in ("report", "terminal"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        beside = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.isascii() or id(node) in beside, f"{path}, line {node.lineno}"


def without_encoding(source: str) -> Iterator[int]:
    """Lines where a text file is opened, read or written in whatever encoding the
    system has.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and opens_text(node):
            if "encoding" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def opens_text(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return keywords.get("text") == "True"
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    modes = [mode for mode in modes if re.fullmatch("[rwax+bt]{1,3}", str(mode))]
    mode = keywords.get("mode", "".join(modes))
    if name in ("NamedTemporaryFile", "TemporaryFile", "fdopen"):
        return bool(mode) and "b" not in mode
    if name != "open" or ast.unparse(function) in ("os.open", "Image.open"):
        return False
    is_ours = isinstance(function, ast.Name) or bool(modes) or not call.args
    return is_ours and "b" not in mode


def test_every_text_file_has_a_named_encoding() -> None:
    paths = python_files("flower_mcepl", "examples", "benchmarks")
    lines = {path: [*without_encoding(path.read_text(encoding="utf-8"))] for path in paths}
    assert len(lines) > 200
    assert {path: wrong for path, wrong in lines.items() if wrong} == {}


def test_the_check_of_encodings_can_fail() -> None:
    wrong = """open("x")
open("x", "w")
path.open()
path.open("a")
path.read_text()
(folder / "x").write_text("y")
subprocess.run(["ps"], text=True)
tempfile.NamedTemporaryFile("w")
"""
    right = """open("x", "rb")
open("x", encoding="utf-8")
path.open("ab")
path.read_text(encoding="utf-8")
subprocess.run(["ps"])
os.open("x", os.O_RDONLY)
opener.open("http://x", timeout=5)
tempfile.NamedTemporaryFile()
"""
    assert sorted(without_encoding(wrong)) == list(range(1, 9))
    assert list(without_encoding(right)) == []


# --- macOS ---


def forks(source: str) -> Iterator[int]:
    """Lines that start a process as the system does by default: by a fork on Linux, by
    a spawn elsewhere.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            made = re.match(
                r"(multiprocessing|mp)\.(Process|Pool|Queue|Manager|Pipe)\(|os\.fork", call
            )
            context = re.match(r"(multiprocessing|mp)\.(get_context|set_start_method)\(", call)
            pool = re.match(r"(\w+\.)*ProcessPoolExecutor\(", call) and "mp_context" not in call
            if made or pool or (context and "'spawn'" not in call):
                yield node.lineno


@pytest.mark.slow
def test_processes_are_spawned() -> None:
    assert list(forks("mp.Pool(2)\nmultiprocessing.get_context()\nos.fork()")) == [1, 2, 3]
    for path in python_files("flower_mcepl", "examples", "benchmarks"):
        if path.name != "mutants.py":  # POSIX alone: a spawned child would load torch each time
            assert list(forks(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.skipif(
    shutil.which("ps") is None or not Path("/proc/self/stat").exists(), reason="needs ps and /proc"
)
def test_ps_tells_of_processes_what_proc_tells() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        tables = [{row[0]: row for row in table()} for table in (_table_of_proc, _table_of_ps)]
        for pid in (os.getpid(), child.pid):
            assert tables[0][pid] == tables[1][pid]
        assert tables[0][child.pid] == (child.pid, os.getpid(), os.getpgrp())
        child.communicate(b"\n")


# --- the source distribution ---

OF_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|flower_mcepl\.egg-info/.*")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="only a repository is built"
)
def test_source_distribution_is_the_repository(tmp_path: Path) -> None:
    """Its tests find all that they read, and nothing that a run has left in the tree
    goes out with it.
    """
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    files = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    for left in (
        "examples/quickstart/runs/a/config.json",
        "examples/drop_in/gossip/runs/b",
        "examples/deployment/fleet/node-0/key",
        "tests/__pycache__/c.cpython-311.pyc",
        "runs/d",
        "dist/e",
    ):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()
    build = "from setuptools import build_meta; build_meta.build_sdist('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, check=True)
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as tar:
        names = [member.name.partition("/")[2] for member in tar if member.isfile()]
    assert sorted(name for name in names if not OF_SETUPTOOLS.fullmatch(name)) == sorted(files)
