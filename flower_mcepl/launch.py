"""Run a Flower app to its end in a private SuperLink, and tell truly whether it ended well.

``flwr run`` exits 0 even when the run failed, reuses whatever SuperLink answers on its port, and leaves one
behind. This program owns its SuperLink instead: own settings folder, own loopback port, own process family::

    python -m flower_mcepl.launch examples/quickstart --run-config 'num-rounds=3'

It exits 0 only when Flower says ``finished:completed``, and nothing that it started outlives it. Only the
standard library is imported here: the Flower programs run beside us, from the same environment.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO, Any, final

from flower_mcepl.errors import ConfigError, FlowerMceplError

COMPLETED = "finished:completed"
TIMED_OUT = "timed-out"
LOST = "lost"

_CONNECTION = "private"  # the name of our SuperLink in our own Flower settings
_OFF_UNLESS_SET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # how flwr 1.41 reads --run-config
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_START_TIMEOUT = 120.0  # seconds; 3 on an idle machine, tens on a loaded one
_CALL_TIMEOUT = 120.0  # seconds for one short `flwr` command
_SOCKET_ROOM = 34  # Ray's socket paths hold 107 characters (103 on macOS), 67 of them below its folder


class LaunchError(FlowerMceplError):
    """Flower's programs are missing, do not start or do not answer."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    run_id
        Flower's number of the run.
    status
        Flower's word for it (``finished:completed``, ``finished:failed``, ``finished:stopped``), or
        ``timed-out`` when its time was over, or ``lost`` when the SuperLink went away.
    details
        The reason, as far as it is known.
    log
        The log of the run, without colors.
    seconds
        Wall time from the start of the SuperLink to the end of the run.
    superlink_log
        What the SuperLink and the processes below it printed.
    """

    run_id: int
    status: str
    details: str
    log: str
    seconds: float
    superlink_log: str = ""

    @property
    def ok(self) -> bool:
        """Whether the run really finished well."""
        return self.status == COMPLETED


def run_app(
    app: Path,
    *,
    run_config: Mapping[str, object] | Sequence[str] = (),
    num_supernodes: int,
    federation_config: str = "",
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] | None = None,
) -> RunOutcome:
    """Run one Flower app in a private SuperLink and wait for its end.

    The SuperLink starts in the current folder, so that an app's relative paths mean what the caller expects.

    Parameters
    ----------
    app
        Folder of the app, the one with its ``pyproject.toml``.
    run_config
        Overrides of the app's settings: a mapping, or the strings that ``flwr run --run-config`` takes.
    num_supernodes
        How many SuperNodes Flower simulates.
    federation_config
        More of ``flwr run --federation-config``; ``client-resources-num-cpus`` is 1 unless said here.
    timeout
        Seconds after which the run is stopped (default: none).
    env
        Environment variables on top of the caller's.
    on_line
        Called with each line of the run's log as it arrives.

    Returns
    -------
    RunOutcome
        How the run ended; a failed run is an outcome, not an exception.

    Raises
    ------
    ConfigError
        Flower refuses the app or its settings.
    LaunchError
        The SuperLink does not start or does not answer.
    """
    overrides = format_run_config(run_config)
    federation = federation_line(num_supernodes, federation_config)
    refuse_shadowed(app, Path.cwd())
    started = time.monotonic()
    deadline = None if timeout is None else started + timeout
    with _Signals() as signals, _SuperLink(signals, env or {}) as superlink:
        run_id = superlink.submit(app, overrides, federation)
        lines: list[str] = []

        def take(line: str) -> None:
            lines.append(_ANSI.sub("", line))
            if on_line is not None:
                on_line(line)

        status, details = superlink.follow(run_id, take, deadline)
        return RunOutcome(run_id, status, details, "\n".join(lines), time.monotonic() - started, superlink.read_log())


# --- What to run ----------------------------------------------------------------------------------


def format_run_config(run_config: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Return the values of ``--run-config``, one for each key of a mapping; strings pass as they are."""
    if isinstance(run_config, str):
        return [run_config]
    if not isinstance(run_config, Mapping):
        return [entry for entry in run_config if entry.strip()]
    return [f"{key}={_toml_value(key, value)}" for key, value in run_config.items()]


def _toml_value(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and "\n" not in text:
            if "'" not in text:
                return f"'{text}'"
            if '"' not in text and "\\" not in text:
                return f'"{text}"'
    raise ConfigError(
        f"a run-config value must be a bool, int, float, or a one-line str with one kind of quote at most; "
        f"`{key}` is {value!r}. Put other values into a TOML file and pass its path."
    )


def num_agents(app: Path, run_config: Sequence[str]) -> int:
    """Return how many agents the app will have: ``num-agents`` of the overrides, else of its own settings."""
    found: object = _app_settings(app).get("config", {}).get("num-agents")
    for entry in run_config:
        if entry.strip().endswith(".toml"):
            found = _read_toml(Path(entry.strip()).expanduser()).get("num-agents", found)
        else:
            found = dict(_PAIR.findall(entry)).get("num-agents", found)
    try:
        return int(str(found))
    except ValueError:
        problem = "has no" if found is None else f"has {found!r} as its"
        raise ConfigError(
            f"the number of SuperNodes must be known; {app} {problem} `num-agents` in "
            "[tool.flwr.app.config]. Say it with --num-supernodes."
        ) from None


def federation_line(num_supernodes: int, more: str = "") -> str:
    """Return the value of ``--federation-config``, with one CPU per client unless ``more`` says otherwise."""
    if num_supernodes < 1:
        raise ConfigError(f"a run needs at least one SuperNode; got {num_supernodes}.")
    said = dict(_PAIR.findall(more))
    if "num-supernodes" in said:
        raise ConfigError("num-supernodes is said twice; take it out of the federation config.")
    cpus = "" if "client-resources-num-cpus" in said else " client-resources-num-cpus=1"
    return f"num-supernodes={num_supernodes}{cpus} {more}".rstrip()


def refuse_shadowed(app: Path, cwd: Path) -> None:
    """Raise when the current folder holds a foreign package of the app's name.

    Ray's workers search the current folder before the app, so the clients would silently run foreign code.
    """
    for reference in _app_settings(app).get("components", {}).values():
        package = str(reference).partition(":")[0].partition(".")[0]
        for found in (cwd / package / "__init__.py", cwd / f"{package}.py"):
            if package and found.is_file() and not found.resolve().is_relative_to(app.resolve()):
                raise ConfigError(
                    f"the app's package `{package}` must not exist in the current folder too, because Ray "
                    f"would import that one; found {found}. Start from another folder or rename the package."
                )


def _app_settings(app: Path) -> dict[str, Any]:
    try:
        settings = _read_toml(app / "pyproject.toml")["tool"]["flwr"]["app"]
    except KeyError:
        raise ConfigError(f"a Flower app has [tool.flwr.app] in its pyproject.toml; {app} has none.") from None
    return dict(settings)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a readable TOML file: {error}. Give the folder of a Flower app.") from error


# --- The private SuperLink ------------------------------------------------------------------------


@final
class _SuperLink:
    """A SuperLink of our own: from its first process to the last one below it."""

    def __init__(self, signals: "_Signals", env: Mapping[str, str]) -> None:
        self._signals = signals
        self._given_env = env
        self._open_runs: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_SuperLink":
        self._home = Path(tempfile.mkdtemp(prefix="mcepl-", dir=_short_temporary_folder()))
        self._env = private_environment(self._home, {**os.environ, **self._given_env})
        self._family = ProcessFamily(mark=f"FLWR_HOME={self._home}")
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> None:
        for _attempt in range(3):  # between the choice of a port and its use, somebody else may take it
            port = _free_port()
            (self._home / "config.toml").write_text(
                f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
                f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
                encoding="utf-8",
            )
            flags = "--insecure --simulation --isolation subprocess --host 127.0.0.1 --port".split()
            self._process = self._spawn("flower-superlink", *flags, str(port))
            self._family.adopt(self._process.pid)
            if self._answers(port):
                return
        raise LaunchError(f"the SuperLink does not start; its log ends:\n{excerpt(self.read_log())}")

    def _answers(self, port: int) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + _START_TIMEOUT
        while self._alive() and time.monotonic() < end:
            with contextlib.suppress(OSError, urllib.error.URLError):
                direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return self._alive()
            time.sleep(0.1)
        return False

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _spawn(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self._home / "superlink.log").open("ab") as log:
            return subprocess.Popen(
                [_program(program, self._env), *arguments],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _flwr(self, *arguments: str, timeout: float = _CALL_TIMEOUT) -> dict[str, Any]:
        """Call one short ``flwr`` command and return the JSON that it prints."""
        try:
            done = subprocess.run(
                [_program("flwr", self._env), *arguments, "--format", "json"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
                start_new_session=True,
            )
            answer = done.stdout.decode(errors="replace")
            parsed: dict[str, Any] = json.loads(answer[answer.index("{") :])
        except (ValueError, subprocess.TimeoutExpired) as error:
            reason = excerpt(self.read_log())
            raise LaunchError(f"`flwr {arguments[0]}` gives no answer; the SuperLink's log ends:\n{reason}") from error
        return parsed

    def submit(self, app: Path, overrides: Sequence[str], federation: str) -> int:
        """Hand the app to the SuperLink and return the run's number."""
        options = [word for entry in overrides for word in ("--run-config", entry)]
        answer = self._flwr("run", str(app), _CONNECTION, "--federation-config", federation, *options)
        if not answer.get("success"):
            raise ConfigError(f"Flower refuses {app}: {answer.get('error-message', 'no reason given')}")
        run_id = int(answer["run-id"])
        self._open_runs.add(run_id)
        return run_id

    def follow(self, run_id: int, take: Callable[[str], None], deadline: float | None) -> tuple[str, str]:
        """Pass on the run's log line by line until the run ends; return its status and details."""
        seen = 0
        while True:
            for number, line in enumerate(self._stream(run_id, deadline)):
                if number >= seen:  # a stream that broke off starts again from the first line
                    seen += 1
                    take(line)
            if deadline is not None and time.monotonic() >= deadline:
                return TIMED_OUT, "the run was still going when its time was over, and was stopped"
            if not self._alive():
                code = self._process.poll() if self._process else None
                return LOST, f"the SuperLink went away with exit code {code}"
            runs = self._flwr("ls", _CONNECTION, "--run-id", str(run_id)).get("runs")
            if runs and str(runs[0]["status"]).startswith("finished"):
                self._open_runs.discard(run_id)
                return str(runs[0]["status"]), str(runs[0]["status-details"])
            time.sleep(1)

    def _stream(self, run_id: int, deadline: float | None) -> Iterator[str]:
        lines: SimpleQueue[str | None] = SimpleQueue()
        command = [_program("flwr", self._env), "log", str(run_id), _CONNECTION, "--stream"]
        with subprocess.Popen(
            command,
            env={**self._env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
            try:
                while deadline is None or time.monotonic() < deadline:
                    try:
                        line = lines.get(timeout=2)
                    except Empty:
                        self._family.members()  # remembers process groups while their parents still live
                        if not self._alive():
                            return
                        continue
                    if line is None:
                        return
                    if not line.startswith("Using SuperLink: "):
                        yield line
            finally:
                process.kill()

    def read_log(self) -> str:
        """Return what the SuperLink and the processes below it printed so far."""
        with contextlib.suppress(OSError):
            return _ANSI.sub("", (self._home / "superlink.log").read_text(encoding="utf-8", errors="replace"))
        return ""

    def _end(self) -> None:
        self._signals.hold()
        try:
            for run_id in self._open_runs if self._alive() else ():
                with contextlib.suppress(FlowerMceplError):
                    self._flwr("stop", str(run_id), _CONNECTION, timeout=20)
            self._family.members()
            if self._process is not None:
                self._process.terminate()
            left = self._family.end(grace=4.0, busy=self._alive)
            if left:
                sys.stderr.write(f"flower_mcepl: these processes of the run refuse to end: {left}\n")
        finally:
            shutil.rmtree(self._home, ignore_errors=True)


def private_environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the SuperLink: Flower's and Ray's files in ``home``, no calls home, no proxy.

    The SuperLink finds its helper programs through ``PATH`` only, so this interpreter's programs come first.
    """
    loopback = "127.0.0.1,localhost"
    proxies = {name: inherited[name] for name in ("NO_PROXY", "no_proxy") if inherited.get(name)}
    no_proxy = ",".join([*dict.fromkeys(proxies.values()), loopback])
    programs = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return {
        **_OFF_UNLESS_SET,
        **inherited,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PATH": os.pathsep.join([*dict.fromkeys(programs), inherited.get("PATH", os.defpath)]),
    }


def _program(name: str, env: Mapping[str, str]) -> str:
    found = shutil.which(name, path=env["PATH"])
    if found is None:
        raise LaunchError(
            f"the program `{name}` must be installed beside {sys.executable}; it is not. "
            "Run: pip install 'flower-mcepl[simulation]'"
        )
    return found


def _pump(source: IO[bytes], lines: "SimpleQueue[str | None]") -> None:
    with contextlib.suppress(ValueError):  # closed under our hands: nobody listens any more
        for line in source:
            lines.put(line.decode(errors="replace").rstrip("\r\n"))
    lines.put(None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _short_temporary_folder() -> str:
    usual = tempfile.gettempdir()
    too_long = len(usual) + len("/mcepl-12345678") > _SOCKET_ROOM
    return "/tmp" if too_long and os.access("/tmp", os.W_OK | os.X_OK) else usual


# --- Every process that descends from ours --------------------------------------------------------


@final
class ProcessFamily:
    """The processes we started and all that descend from them, however they detach.

    SuperLink puts its helper into a session of its own, and Ray's agents outlive the processes that started
    them. A process belongs to the family when its parent does, when its process group belonged to a member,
    or (on Linux) when it carries our mark in its environment. Never by its name.

    Parameters
    ----------
    mark
        One ``NAME=value`` entry that only our processes have in their environment.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._groups: set[int] = set()

    def members(self) -> list[int]:
        """Return the living processes of the family."""
        table = _process_table()
        parents = {pid: parent for pid, parent, _ in table}
        mine = {pid for pid, _, group in table if group in self._groups or self._marked(pid)}
        for pid in parents:
            line = [pid]
            while (parent := parents.get(line[-1], 0)) and line[-1] not in mine and parent not in line:
                line.append(parent)
            if line[-1] in mine:
                mine.update(line)
        mine.discard(os.getpid())
        self._groups = {group for pid, _, group in table if pid in mine} - {os.getpgrp()}
        return sorted(mine)

    def _marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # gone, somebody else's, or no /proc
            return False

    def adopt(self, pid: int) -> None:
        """Take in a process that leads its own group."""
        self._groups.add(pid)

    def end(self, *, grace: float, busy: Callable[[], bool] = lambda: False) -> list[int]:
        """Wait, then SIGTERM, then SIGKILL, at most ``grace`` seconds each; return who is left."""
        if self._gone_within(grace, busy):
            return []
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.members():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signum)
            if self._gone_within(grace, busy):
                return []
        return self.members()

    def _gone_within(self, seconds: float, busy: Callable[[], bool]) -> bool:
        end = time.monotonic() + seconds
        while busy() or self.members():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


def _process_table() -> list[tuple[int, int, int]]:
    """Return (pid, parent, process group) of every living process, zombies left out."""
    if not Path("/proc/self/stat").exists():
        shown = subprocess.run(
            ["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True
        ).stdout
        rows = [row.split() for row in shown.splitlines()]
        return [(int(pid), int(parent), int(group)) for pid, parent, group, state in rows if state[0] != "Z"]
    table = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                after_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
                state, parent, group = after_name.split()[:3]
                if state not in "ZX":
                    table.append((int(entry.name), int(parent), int(group)))
    return table


class Interrupted(KeyboardInterrupt):
    """A signal asked us to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@final
class _Signals:
    """Turn the first stop signal into ``Interrupted``, and ignore more of them while we clean up."""

    def __enter__(self) -> "_Signals":
        self._held = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)
                if signum and signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[signum] = signal.signal(signum, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def hold(self) -> None:
        """Ignore signals from here on."""
        self._held = True

    def _stop(self, signum: int, _frame: FrameType | None) -> None:
        if not self._held:
            self.hold()
            raise Interrupted(signum)


# --- The command ----------------------------------------------------------------------------------


def excerpt(log: str, *, limit: int = 60) -> str:
    """Return the part of a log that says why: from the last traceback or error on, else its last lines."""
    lines = log.rstrip().splitlines()
    tracebacks = [at for at, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    errors = [at for at, line in enumerate(lines) if line.startswith("ERROR")]
    if tracebacks:
        before = [at for at in errors if at < tracebacks[-1]]
        start = before[-1] if before and tracebacks[-1] - before[-1] <= 2 else tracebacks[-1]
    else:
        start = errors[0] if errors else len(lines) - limit // 3
    return "\n".join(lines[max(start, 0) :][-limit:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m flower_mcepl.launch``; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        nodes = options.num_supernodes
        if nodes is None:
            nodes = num_agents(options.app, options.run_config)
        outcome = run_app(
            options.app,
            run_config=options.run_config,
            num_supernodes=nodes,
            federation_config=" ".join(options.federation_config),
            timeout=options.timeout,
            on_line=_print_line,
        )
    except KeyboardInterrupt as stop:
        _say("stopped; the run, its SuperLink and their processes are ended.")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except FlowerMceplError as error:
        _say(f"{type(error).__name__}: {error}")
        return 1
    except BrokenPipeError:  # whoever read our output left; there is nowhere to say more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if options.keep_superlink_log:
        kept = Path(f"superlink-{outcome.run_id}.log")
        kept.write_text(outcome.superlink_log, encoding="utf-8")
        _say(f"the SuperLink's log is in {kept}")
    _say(f"run {outcome.run_id} {outcome.status} after {outcome.seconds:.1f} s")
    if outcome.ok:
        return 0
    _say(f"{outcome.details}\n--- the run's log says ---\n{excerpt(outcome.log)}")
    if "Traceback" not in outcome.log:
        _say(f"--- the SuperLink's log says ---\n{excerpt(outcome.superlink_log)}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flower_mcepl.launch",
        description="Run a Flower app to its end in a private SuperLink; exit 0 only if it finished well.",
        allow_abbrev=False,
    )
    pairs: dict[str, Any] = {"action": "append", "default": [], "metavar": "'KEY=VALUE ...'"}
    add = parser.add_argument
    add("app", type=Path, metavar="APP", help="folder of the app, the one with its pyproject.toml")
    add("--run-config", **pairs, help="override settings of the app, as in `flwr run`; may be repeated")
    add("--num-supernodes", type=int, metavar="N", help="nodes to simulate (default: the app's num-agents)")
    add("--federation-config", **pairs, help="more, as in `flwr run` (default: client-resources-num-cpus=1)")
    add("--timeout", type=float, metavar="S", help="stop the run after S seconds (default: never)")
    add("--keep-superlink-log", action="store_true", help="leave superlink-<run>.log in the current folder")
    return parser


def _print_line(line: str) -> None:
    sys.stdout.write((line if sys.stdout.isatty() else _ANSI.sub("", line)) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"flower_mcepl: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
