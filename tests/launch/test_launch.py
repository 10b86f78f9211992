"""The launcher: choosing, parsing, cleaning up (fast); whole runs in Flower (slow)."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.errors import ConfigError
from flower_mcepl.launch import RunOutcome, run_app
from flower_mcepl.launch.command import main
from flower_mcepl.launch.logs import excerpt
from flower_mcepl.launch.plan import federation_line, format_run_config, num_nodes, refuse_shadowed
from flower_mcepl.launch.processes import ProcessFamily
from flower_mcepl.launch.superlink import LOST, TIMED_OUT, private_environment

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mcepl-launch-probe"
version = "1.0.0"
description = "A probe"
license = "Apache-2.0"
dependencies = []  # the probe runs in the environment of the tests

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "mcepl_launch_probe.server_app:app"
clientapp = "mcepl_launch_probe.client_app:app"

[tool.flwr.app.config]
num-agents = 2
crash = false
sleep = 0.0
word = ""
"""

CLIENT = """
import time

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    print("client begins", flush=True)
    time.sleep(context.run_config["sleep"])
    return Message(RecordDict({"metrics": MetricRecord({"one": 1})}), reply_to=msg)
"""

SERVER = """
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    Path("written-by-server.txt").write_text(context.run_config["word"])
    if context.run_config["crash"]:
        raise RuntimeError("the probe crashes on purpose")
    content = RecordDict({"config": ConfigRecord({"nothing": 0})})
    while len(nodes := list(grid.get_node_ids())) < context.run_config["num-agents"]:
        time.sleep(0.1)  # Flower starts the server before it has registered every node
    print("server sends", flush=True)
    kind = MessageType.TRAIN
    messages = [Message(content, dst_node_id=n, message_type=kind, ttl=300.0) for n in nodes]
    print("replies:", len(list(grid.send_and_receive(messages, timeout=300))), flush=True)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "mcepl-launch-probe"
    package = folder / "mcepl_launch_probe"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT)
    (package / "server_app.py").write_text(SERVER)
    return folder


@pytest.fixture
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start in an empty folder, and find neither a process nor a temporary file
    afterwards.
    """
    # short, because Ray puts sockets below it
    temporary = tempfile.mkdtemp(prefix="m-", dir="/tmp")
    mark = f"MCEPL_TEST_MARK={temporary}"
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("TMPDIR", temporary)
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    monkeypatch.chdir(tmp_path)
    yield
    assert ProcessFamily(mark).members() == []
    Path(temporary).rmdir()  # fails when anything is in it


# --- choosing and parsing


def test_mapping_becomes_what_flwr_reads() -> None:
    given = {
        "rounds": 3,
        "rate": 0.5,
        "quick": True,
        "graph": "ring 2",
        "data": Path("a/b"),
        "said": "it's",
    }
    assert format_run_config(given) == [
        "rounds=3",
        "rate=0.5",
        "quick=true",
        "graph='ring 2'",
        "data='a/b'",
        'said="it\'s"',
    ]


def test_strings_pass_unchanged() -> None:
    assert format_run_config(["a=1 b=2", " ", "c='x'"]) == ["a=1 b=2", "c='x'"]
    assert format_run_config("a=1") == ["a=1"]


@pytest.mark.parametrize("value", [None, [1], "two\nlines", "both ' and \"", b"bytes"])
def test_value_that_flwr_cannot_read_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match="`key`"):
        format_run_config({"key": value})


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])), st.integers(), st.booleans())
def test_formatted_values_survive_flowers_parser(text: str, number: int, flag: bool) -> None:
    parse = pytest.importorskip("flwr.common.config").parse_config_args
    wanted = {"text": text, "number": number % 2**31, "flag": flag}
    try:
        formatted = format_run_config(wanted)
    except ConfigError:
        assert "'" in text
    else:
        assert parse(formatted) == wanted


def test_agents_come_from_the_app_then_from_overrides(app: Path, tmp_path: Path) -> None:
    assert num_nodes(app, []) == 2
    assert num_nodes(app, ["word='num-agents=9'", "num-agents=5 crash=true"]) == 5
    settings = tmp_path / "settings.toml"
    settings.write_text("num-agents = 7\n")
    assert num_nodes(app, [str(settings)]) == 7


@pytest.mark.parametrize("count", ["", "num-agents = 'many'"])
def test_unknown_number_of_agents_names_the_way_out(app: Path, count: str) -> None:
    (app / "pyproject.toml").write_text(PYPROJECT.replace("num-agents = 2", count))
    with pytest.raises(ConfigError, match="--num-supernodes"):
        num_nodes(app, [])


def test_folder_without_an_app_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pyproject\.toml"):
        num_nodes(tmp_path, [])
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ConfigError, match=r"\[tool\.flwr\.app\]"):
        num_nodes(tmp_path, [])


def test_federation_line_gives_each_client_one_cpu_unless_told() -> None:
    assert federation_line(3) == "num-supernodes=3 client-resources-num-cpus=1"
    assert federation_line(3, "client-resources-num-cpus=2") == (
        "num-supernodes=3 client-resources-num-cpus=2"
    )
    with pytest.raises(ConfigError, match="at least one"):
        federation_line(0)
    with pytest.raises(ConfigError, match="twice"):
        federation_line(3, "num-supernodes=4")


def test_foreign_package_in_the_current_folder_is_refused(app: Path, tmp_path: Path) -> None:
    refuse_shadowed(app, tmp_path)
    refuse_shadowed(app, app)  # its own package is no foreigner
    elsewhere = tmp_path / "elsewhere" / "mcepl_launch_probe"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match="mcepl_launch_probe"):
        refuse_shadowed(app, elsewhere.parent)


def test_environment_is_private_and_quiet(tmp_path: Path) -> None:
    env = private_environment(
        tmp_path,
        {
            "PATH": "/elsewhere",
            "FLWR_HOME": "/theirs",
            "FLWR_TELEMETRY_ENABLED": "1",
            "no_proxy": "a.b",
        },
    )
    assert env["FLWR_HOME"] == env["RAY_TMPDIR"] == str(tmp_path)
    assert env["FLWR_TELEMETRY_ENABLED"] == "1"  # set by the caller, so it stays
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["no_proxy"] == env["NO_PROXY"] == "a.b,127.0.0.1,localhost"
    assert (env["RAY_AUTH_MODE"], env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]) == ("token", "0")
    assert env["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray-token")
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["PATH"].split(os.pathsep)[-1] == "/elsewhere"


def test_a_cluster_that_the_caller_names_keeps_its_own_rules(tmp_path: Path) -> None:
    env = private_environment(tmp_path, {"RAY_ADDRESS": "10.0.0.1:6379"})
    assert not [key for key in env if key.startswith("RAY_AUTH")]
    assert private_environment(tmp_path, {"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == (
        "disabled"
    )


# --- saying why


def test_excerpt_starts_at_the_error_before_the_last_traceback() -> None:
    why = "ERROR : b\nTraceback (most recent call last)\n  new"
    assert excerpt(f"INFO : a\nTraceback (most recent call last)\n  old\n{why}") == why


def test_excerpt_without_an_error_is_the_end() -> None:
    lines = [f"line {number}" for number in range(100)]
    assert excerpt("\n".join(lines)).splitlines() == lines[-20:]
    assert excerpt("") == ""


@pytest.mark.parametrize(
    ("status", "code"), [("finished:completed", 0), ("finished:failed", 1), ("lost", 1)]
)
def test_exit_code_and_both_frame_lines_follow_the_run(
    status: str,
    code: int,
    app: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def carry_out(
        _: object,
        *,
        on_line: Callable[[str], object],
        on_record: Callable[[Path], object],
        **options: object,
    ) -> RunOutcome:
        assert (options["timeout"], options["restarts"]) == (None, 2)
        on_line("\x1b[92mINFO \x1b[0m:      \t└── Run record: runs/a b")
        on_record(Path("runs/a b"))
        return RunOutcome(7, status, "the reason", "ERROR : what happened", 1.0)

    monkeypatch.setattr("flower_mcepl.launch.command.carry_out", carry_out)
    assert main([str(app), "--run-config", "crash=true"]) == code
    printed = capsys.readouterr()
    assert printed.out == "INFO :      \t└── Run record: runs/a b\n"
    first, *between, last = printed.err.splitlines()
    assert (
        first == f"flower_mcepl: running {app} (crash=true) with 2 nodes; Ctrl-C stops it cleanly"
    )
    assert ("flower_mcepl: the reason" in between) == (code != 0)
    assert re.fullmatch(rf"flower_mcepl: {status} after \d+\.\d s; run record: runs/a b", last)


def test_bad_settings_exit_1_with_one_line(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(app), "--num-supernodes", "0"]) == 1
    assert capsys.readouterr().err.startswith(
        "flower_mcepl: ConfigError: a run needs at least one SuperNode"
    )


# --- a SuperLink that dies, played by two small programs and then by the real one

PLAYED = {
    "flower-superlink": """
import http.server, os, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answers).serve_forever()
""",
    "flwr": """
import os, sys, time, tomllib, urllib.request

def kill_superlink():
    with open(os.environ["FLWR_HOME"] + "/config.toml", "rb") as settings:
        address = tomllib.load(settings)["superlink"]["private"]["address"]
    try:
        urllib.request.urlopen(f"http://{address}/die")
    except OSError:
        pass

if sys.argv[1] == "run":
    print('{"success": true, "run-id": "7"}')
elif sys.argv[1] == "log":
    print("INFO :      the round begins", flush=True)
    if WHEN == "while-streaming":
        kill_superlink()
        time.sleep(60)
elif sys.argv[1] == "ls":
    kill_superlink()
    sys.exit("no connection")
""",
}


@pytest.mark.parametrize("when", ["while-streaming", "while-asked-for-the-status"])
def test_superlink_that_dies_loses_the_run(
    when: str, app: Path, tmp_path: Path, nothing_stays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in PLAYED.items():
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\nWHEN = {when!r}\n{source}")
        program.chmod(0o755)
    monkeypatch.setattr(
        "flower_mcepl.launch.superlink._program", lambda name, _: str(tmp_path / name)
    )
    outcome = run_app(app, timeout=50)
    assert (outcome.status, outcome.details) == (LOST, "the SuperLink went away with exit code 3")
    assert outcome.log == "INFO :      the round begins"


@pytest.mark.flower
@pytest.mark.slow
def test_real_superlink_that_dies_loses_the_run(app: Path, nothing_stays: None) -> None:
    family = ProcessFamily(f"MCEPL_TEST_MARK={tempfile.gettempdir()}")

    def kill_superlink(line: str) -> None:
        if line.startswith("server sends"):
            shown = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family.members()}
            (superlink,) = (
                pid for pid, command in shown.items() if b"/flower-superlink\0" in command
            )
            os.kill(superlink, signal.SIGKILL)

    outcome = run_app(app, run_config={"sleep": 200.0}, timeout=300, on_line=kill_superlink)
    assert outcome.status == LOST, outcome
    assert "exit code -9" in outcome.details


# --- whole runs


@pytest.mark.flower
@pytest.mark.slow
def test_run_that_ends_well(app: Path, tmp_path: Path, nothing_stays: None) -> None:
    heard: list[str] = []
    outcome = run_app(
        app, run_config={"word": "hello there", "num-agents": 3}, timeout=300, on_line=heard.append
    )
    assert outcome.ok, outcome
    assert "replies: 3" in outcome.log.splitlines()
    assert len(heard) == len(outcome.log.splitlines())
    # our folder is the SuperLink's
    assert (tmp_path / "written-by-server.txt").read_text() == "hello there"


def listening(family: ProcessFamily) -> dict[int, tuple[str, bytes]]:
    """Ports that a family listens on: the address in /proc's hex, and the program."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state, inode = (line.split()[place] for place in (1, 3, 9))
            if state == "0A":
                sockets[f"socket:[{inode}]"] = local
    found = {}
    for pid in family.members():
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if local := sockets.get(os.readlink(descriptor)):
                    address, _, port = local.partition(":")
                    program = Path(f"/proc/{pid}/cmdline").read_bytes()
                    found[int(port, 16)] = (address, program)
    return found


@pytest.mark.flower
@pytest.mark.slow
def test_a_run_is_reached_from_nowhere_else_and_ray_asks_for_its_token(
    app: Path, nothing_stays: None
) -> None:
    """All that listens does so on loopback; Ray answers nobody without the token."""
    family = ProcessFamily(f"MCEPL_TEST_MARK={tempfile.gettempdir()}")
    seen: dict[int, tuple[str, bytes]] = {}
    answers: dict[str, int] = {}

    def look(line: str) -> None:
        if line.startswith("server sends"):
            time.sleep(10)  # until the clients are at work
            seen.update(listening(family))
            (gcs,) = (port for port, (_, program) in seen.items() if b"gcs_server" in program)
            (token,) = Path(tempfile.gettempdir()).glob("mcepl-*/ray-token")
            assert token.stat().st_mode & 0o777 == 0o600
            for name, text in (("right", token.read_text()), ("wrong", "0" * 64), ("none", "")):
                answers[name] = ray_health(gcs, text)

    outcome = run_app(app, run_config={"sleep": 30.0}, timeout=300, on_line=look)
    assert outcome.ok, outcome
    programs = b" ".join(program for _, program in seen.values())
    for name in (b"flower-superlink", b"gcs_server", b"raylet"):
        assert name in programs
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert {port: who for port, who in seen.items() if who[0] not in loopback} == {}
    assert answers["right"] == 0
    assert answers["wrong"] != 0
    assert answers["none"] != 0


def ray_health(port: int, token: str) -> int:
    """Exit code of a question to Ray that needs the token."""
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    code = (
        "import sys; from ray._raylet import GcsClient\n"
        f"GcsClient(address='127.0.0.1:{port}').internal_kv_keys(b'', None, timeout=10)"
    )
    env = {key: value for key, value in os.environ.items() if key != "MCEPL_TEST_MARK"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **auth}, capture_output=True, check=False
    ).returncode


@pytest.mark.flower
@pytest.mark.slow
def test_run_that_crashes_is_told(app: Path, nothing_stays: None) -> None:
    outcome = run_app(app, run_config={"crash": True}, timeout=300)
    assert not outcome.ok
    assert outcome.status == "finished:failed"
    assert "crashes on purpose" in outcome.details
    assert "RuntimeError: the probe crashes on purpose" in excerpt(outcome.log)


@pytest.mark.flower
@pytest.mark.slow
def test_unknown_setting_is_refused_with_flowers_words(app: Path, nothing_stays: None) -> None:
    with pytest.raises(ConfigError, match=r"(?i)run config"):
        run_app(app, run_config={"no-such-key": 1}, timeout=300)


@pytest.mark.flower
@pytest.mark.slow
def test_run_over_its_time_is_stopped(app: Path, nothing_stays: None) -> None:
    outcome = run_app(app, run_config={"sleep": 200.0}, timeout=25)
    assert outcome.status == TIMED_OUT


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_everything(signum: signal.Signals, app: Path, nothing_stays: None) -> None:
    command = [sys.executable, "-m", "flower_mcepl.launch", str(app), "--run-config", "sleep=200.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith("server sends"):
                break
        time.sleep(6)  # Ray's workers come up
        launcher.send_signal(signum)
        assert launcher.wait(timeout=60) == 128 + signum
