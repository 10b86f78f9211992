"""A SuperLink of our own: from its first process to the last one below it."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, final

from flower_mcepl.errors import RECORD_NOTE, STOP_REQUEST, ConfigError, LaunchError
from flower_mcepl.launch.checks import refuse_unwritable
from flower_mcepl.launch.guardian import start_guardian
from flower_mcepl.launch.logs import excerpt, without_colors
from flower_mcepl.launch.plan import Plan
from flower_mcepl.launch.processes import ProcessFamily
from flower_mcepl.launch.signals import StopSignals

TIMED_OUT = "timed-out"
LOST = "lost"

# In the home of the SuperLink: the first asks the run to stop, the second is of the
# run and names its record.
STOP_FILE, NOTE_FILE = "stop", "record"
_TOKEN_FILE = "ray-token"  # Ray's, of this run
_CONNECTION = "private"  # the name of our SuperLink in our own Flower settings
_UNLESS_SET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_START_TIMEOUT = 120.0  # seconds; 3 on an idle machine, tens on a loaded one
_STOP_TIMEOUT = 8.0  # seconds; a strategy that waits looks every 3 seconds at least
_CALL_TIMEOUT = 120.0  # seconds for one short `flwr` command
# Ray's socket paths hold 107 characters (103 on macOS), 67 of them below its folder
_SOCKET_ROOM = 34


@contextlib.contextmanager
def private_superlink(signals: StopSignals) -> "Iterator[SuperLink]":
    """Private SuperLink; everything below it is ended while signals are held."""
    temporary = _short_temporary_folder()
    refuse_unwritable(Path(temporary), "the folder of temporary files (TMPDIR)")
    with tempfile.TemporaryDirectory(
        prefix="mcepl-", dir=temporary, ignore_cleanup_errors=True
    ) as home:
        superlink = SuperLink(Path(home))
        try:
            superlink.start()
            yield superlink
        finally:
            signals.hold()
            superlink.end()


@final
class SuperLink:
    """One SuperLink for one run, with all its files in ``home``."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._env = private_environment(home, os.environ)
        self._log_file = home / "superlink.log"
        self._mark = f"FLWR_HOME={home}"
        self._family = ProcessFamily(self._mark)
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._open_run: int | None = None  # submitted, and not known to have ended

    def start(self) -> None:
        """Start the process and wait until it answers."""
        _write_token(self._home)
        self._guardian = start_guardian(self._home, self._mark)
        # between the choice of a port and its use, somebody else may take it
        for _attempt in range(3):
            port = _free_port()
            (self._home / "config.toml").write_text(
                f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
                f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
                encoding="utf-8",
            )
            flags = "--insecure --simulation --isolation subprocess --host 127.0.0.1 --port".split()
            with self._log_file.open("ab") as log:
                self._process = self._spawn(
                    "flower-superlink", *flags, str(port), stdout=log, stderr=log
                )
            self._family.adopt(self._process.pid)
            self._tell_guardian(self._process.pid)
            if self._answers(port):
                return
        raise LaunchError(
            f"the SuperLink does not start; its log ends:\n{excerpt(self.read_log())}"
        )

    def submit(self, plan: Plan) -> int:
        """Hand the app to the SuperLink and return the run's number."""
        overrides = [word for entry in plan.run_config for word in ("--run-config", entry)]
        answer = self._flwr(
            "run",
            str(plan.app),
            _CONNECTION,
            "--federation-config",
            plan.federation_config,
            *overrides,
        )
        if not answer.get("success"):
            raise ConfigError(
                f"Flower refuses {plan.app}: {answer.get('error-message', 'no reason given')}"
            )
        self._open_run = int(answer["run-id"])
        return self._open_run

    def follow(self, take: Callable[[str], None], *, deadline: float | None) -> tuple[str, str]:
        """Pass on the run's log until the run ends; return its status and details."""
        seen = 0
        while True:
            for number, line in enumerate(self._stream(deadline)):
                if number >= seen:  # a stream that broke off starts again from the first line
                    seen += 1
                    take(line)
            if deadline is not None and time.monotonic() >= deadline:
                return TIMED_OUT, "the run was still going when its time was over, and was stopped"
            status, details = self._status()
            if status == LOST or status.startswith("finished"):
                self._open_run = None
                return status, details
            time.sleep(1)

    def end(self) -> None:
        """Stop the run if it still goes, and end every process below this one."""
        if self._open_run is not None and self._alive():
            self._request_stop()
            with contextlib.suppress(LaunchError):
                self._flwr("stop", str(self._open_run), _CONNECTION, timeout=20)
        self._family.members()  # remembers process groups while their parents still live
        if self._process is not None:
            self._process.terminate()
        left = self._family.end(grace=4.0, busy=self._alive)
        if left:
            sys.stderr.write(f"flower_mcepl: these processes of the run refuse to end: {left}\n")
        self._dismiss_guardian()

    def _request_stop(self) -> None:
        """Ask the run's strategy to write its summary; then it deletes the request."""
        request = self._home / STOP_FILE
        if self.record() is None:  # no strategy of ours goes on that would look for it
            return
        request.touch()
        end = time.monotonic() + _STOP_TIMEOUT
        while request.exists() and self._alive() and time.monotonic() < end:
            time.sleep(0.1)

    def _tell_guardian(self, pid: int) -> None:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        with contextlib.suppress(OSError):
            self._guardian.stdin.write(f"{pid}\n".encode())
            self._guardian.stdin.flush()

    def _dismiss_guardian(self) -> None:
        if self._guardian is None:
            return
        assert self._guardian.stdin is not None
        with contextlib.suppress(OSError):
            self._guardian.stdin.close()
        try:
            self._guardian.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()

    def record(self) -> Path | None:
        """Run record, once the run has told where it is.

        It tells so in a file: what a log says may be anybody's.
        """
        with contextlib.suppress(OSError):
            return Path((self._home / NOTE_FILE).read_text(encoding="utf-8"))
        return None

    def read_log(self) -> str:
        """Return what the SuperLink and the processes below it printed so far."""
        with contextlib.suppress(OSError):
            return without_colors(self._log_file.read_text(encoding="utf-8", errors="replace"))
        return ""

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _answers(self, port: int) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + _START_TIMEOUT
        while self._alive() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return self._alive()
            time.sleep(0.1)
        return False

    def _status(self) -> tuple[str, str]:
        """Status and details of the run, from Flower unless the SuperLink is gone."""
        if self._alive():
            try:
                run = self._flwr("ls", _CONNECTION, "--run-id", str(self._open_run)).get("runs", [])
            except LaunchError:
                if self._alive():
                    raise
            else:
                return (
                    (str(run[0]["status"]), str(run[0]["status-details"]))
                    if run
                    else ("unknown", "")
                )
        assert self._process is not None
        return LOST, f"the SuperLink went away with exit code {self._process.poll()}"

    def _stream(self, deadline: float | None) -> Iterator[str]:
        """Lines of ``flwr log`` until it, the time or the SuperLink ends."""
        lines: SimpleQueue[str | None] = SimpleQueue()
        command = ["log", str(self._open_run), _CONNECTION, "--stream"]
        with self._spawn("flwr", *command, stdout=subprocess.PIPE, PYTHONUNBUFFERED="1") as process:
            assert process.stdout is not None
            threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
            try:
                while deadline is None or time.monotonic() < deadline:
                    try:
                        line = lines.get(timeout=2)
                    except Empty:
                        # remembers process groups while their parents still live
                        self._family.members()
                        if not self._alive():
                            return
                        continue
                    if line is None:
                        return
                    if not line.startswith("Using SuperLink: "):
                        yield line
            finally:
                process.kill()

    def _flwr(self, *arguments: str, timeout: float = _CALL_TIMEOUT) -> dict[str, Any]:
        """Call one short ``flwr`` command and return the JSON that it prints."""
        with self._spawn("flwr", *arguments, "--format", "json", stdout=subprocess.PIPE) as process:
            try:
                answer = process.communicate(timeout=timeout)[0].decode(errors="replace")
                parsed: dict[str, Any] = json.loads(answer[answer.index("{") :])
            except (ValueError, subprocess.TimeoutExpired) as error:
                reason = excerpt(self.read_log())
                raise LaunchError(
                    f"`flwr {arguments[0]}` gives no answer; the SuperLink's log ends:\n{reason}"
                ) from error
            finally:
                process.kill()
        return parsed

    def _spawn(
        self,
        program: str,
        *arguments: str,
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int = subprocess.DEVNULL,
        **env: str,
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [_program(program, self._env), *arguments],
            env={**self._env, **env},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def private_environment(home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of the SuperLink: its files in ``home``, no calls home, no proxy.

    The SuperLink finds its helper programs through ``PATH`` only, so this interpreter's
    programs come first.
    """
    loopback = "127.0.0.1,localhost"
    # a cluster that the caller has named has rules of its own
    ray = {} if inherited.get("RAY_ADDRESS") else _ray_alone(home)
    proxies = {name: inherited[name] for name in ("NO_PROXY", "no_proxy") if inherited.get(name)}
    no_proxy = ",".join([*dict.fromkeys(proxies.values()), loopback])
    programs = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return {
        **_UNLESS_SET,
        **ray,
        **inherited,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "HOME": inherited.get("HOME") or str(home),  # Ray and Flower need one
        STOP_REQUEST: str(home / STOP_FILE),
        RECORD_NOTE: str(home / NOTE_FILE),
        "PYTHONIOENCODING": "utf-8",  # what we read; Flower's own lines are no ASCII
        "PATH": os.pathsep.join([*dict.fromkeys(programs), inherited.get("PATH", os.defpath)]),
    }


def _ray_alone(home: Path) -> dict[str, str]:
    """Settings by which a Ray of this machine alone answers nobody else.

    It listens on loopback, and takes orders from who can read the token alone. The
    first is meant for systems where Ray makes no clusters, and works on all; the second
    is of Ray 2.52 and later.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / _TOKEN_FILE),
    }


def _write_token(home: Path) -> None:
    """Write a token that nobody can guess, for this account's eyes only."""
    path = home / _TOKEN_FILE
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32).encode())


def _program(name: str, env: Mapping[str, str]) -> str:
    program = shutil.which(name, path=env["PATH"])
    if program is None:
        raise LaunchError(
            f"the program `{name}` must be installed beside {sys.executable}; it is not. Install "
            "flower-mcepl with its extra 'simulation' (in a clone: pip install -e "
            "'.[simulation]')."
        )
    return program


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
