"""A real fleet on loopback, through the scripts of examples/deployment: a SuperLink
with TLS and three SuperNodes.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flower_mcepl.launch.processes import ProcessFamily
from flower_mcepl.record.reading import read_run
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.store import device_store

SCRIPTS = Path(__file__).parents[2] / "examples" / "deployment"
NODES = ("node-0", "node-1", "node-2")
START, RUN = 600, 1800  # seconds; a loaded machine needs twenty times as long as an idle one


class Fleet:
    """Starts nothing by itself; leaving the context ends everything that it started,
    and all that descends from it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_ports(5 + len(NODES))
        self._guests = 0
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._started: list[subprocess.Popen[bytes]] = []
        self._env = {
            **os.environ,
            "FLEET": str(folder),
            "FLEET_PORT": str(self.port),
            "PATH": programs,
        }

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        left = ProcessFamily(mark=f"FLEET={self.folder}").end(grace=5)
        for process in self._started:
            process.wait(timeout=10)
        assert not left, f"these processes refuse to end: {left}"

    def up(self, *members: str) -> None:
        """Start members, all by default, and wait until they are online."""
        self._script("up.sh", *members)

    def down(self) -> None:
        """End all members as an operator does."""
        self._script("down.sh")

    def start_run(self, app: Path, *settings: str) -> "subprocess.Popen[bytes]":
        """Run an app; its log goes to ``run.log``, and the exit code of the process
        tells how it ended.
        """
        arguments = [word for entry in settings for word in ("--run-config", entry)]
        return self._spawn("run.sh", *arguments, log=self.folder / "run.log", APP=str(app))

    def finish(self, run: "subprocess.Popen[bytes]") -> None:
        """Wait until the run has ended well."""
        self.wait_until(lambda: run.poll() is not None, "the end of the run", of=None, seconds=RUN)
        assert run.returncode == 0, self.logs()

    def kill(self, member: str) -> None:
        """Kill a member and all that it started at once, as a loss of power does."""
        # Asked once only: it would take in the process group, which all members share,
        # the second time.
        victims = ProcessFamily(mark=f"FLWR_HOME={self.folder / member / 'flwr'}").members()
        assert self.pid(member) in victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def start_stranger(self) -> "subprocess.Popen[bytes]":
        """Start a SuperNode with a key of its own that nobody has registered."""
        return self._start_other(self._make_other("stranger", "partition-id=1"))

    def add_guest(self, name: str, node_config: str) -> None:
        """Register one more SuperNode, start it, and wait until it is online."""
        folder = self._make_other(name, node_config)
        (folder / "state").mkdir()
        env = {**self._env, "FLWR_HOME": str(self.folder / "operator")}
        register = ["flwr", "supernode", "register", str(folder / "key.pub"), "fleet"]
        subprocess.run([*register, "--name", name], env=env, check=True, capture_output=True)
        self._start_other(folder)
        self.wait_until(lambda: "SuperNode ID" in self.log(name), f"{name} online", of=None)

    def public_key(self, name: str) -> str:
        """Public key of a member, as in its .pub file."""
        return (self.folder / name / "key.pub").read_text().strip()

    def _make_other(self, name: str, node_config: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / "key"],
            check=True,
        )
        (folder / "ca.crt").write_bytes((self.folder / "ca" / "ca.crt").read_bytes())
        (folder / "node.env").write_text(
            f"SUPERLINK='127.0.0.1:{self.port}'\n"
            f"RUNTIME_PORT={self.port + 1 + len(NODES) + self._guests}\n"
            f"NODE_CONFIG='{node_config}'\n"
        )
        self._guests += 1
        return folder

    def _start_other(self, folder: Path) -> "subprocess.Popen[bytes]":
        return self._spawn("supernode.sh", str(folder), log=folder / "log")

    def node_config(self, node: str) -> dict[str, Any]:
        """What the node says of itself."""
        lines = (self.folder / node / "node.env").read_text().splitlines()
        (told,) = [line.partition("=")[2] for line in lines if line.startswith("NODE_CONFIG=")]
        return tomllib.loads("\n".join(shlex.split(told)[0].split()))

    def record(self) -> Path:
        """The one run record."""
        (record,) = (self.folder / "superlink" / "runs").iterdir()
        return record

    def rounds_done(self) -> int:
        """How many rounds the record tells of."""
        files = list((self.folder / "superlink" / "runs").glob("*/relay.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    def wait_for_rounds(self, number: int, *, of: "subprocess.Popen[bytes]") -> None:
        """Wait until so many rounds of a run are done."""
        self.wait_until(lambda: self.rounds_done() >= number, f"round {number}", of=of, seconds=RUN)

    def stored_rounds(self, agent: int) -> list[int]:
        """After which rounds the agent's states lie on its device."""
        return device_store(self._state_dir(agent), run=self._run_id(), agent=agent).rounds(agent)

    def stored_state(self, agent: int) -> Generation:
        """The newest state on the agent's device."""
        store = device_store(self._state_dir(agent), run=self._run_id(), agent=agent)
        found = store.load(agent, run=self._run_id(), before=1_000_000)
        assert found is not None
        return found

    def _state_dir(self, agent: int) -> Path:
        return self.folder / NODES[agent] / "state"

    def _run_id(self) -> str:
        return str(read_run(self.record()).config["run"])

    def log(self, member: str) -> str:
        """What a member has printed."""
        return (self.folder / member / "log").read_text(errors="replace")

    def pid(self, member: str) -> int:
        return int((self.folder / member / "pid").read_text())

    def wait_until(
        self,
        holds: Callable[[], bool],
        what: str,
        *,
        of: "subprocess.Popen[bytes] | None",
        seconds: float = START,
    ) -> None:
        """Look twice a second; fail at once where the run ends first."""
        end = time.monotonic() + seconds
        while not holds():
            assert of is None or of.poll() is None, (
                f"the run has ended before {what}\n{self.logs()}"
            )
            assert time.monotonic() < end, f"waited {seconds} s in vain for {what}\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of all logs, for a failure's message."""
        files = [self.folder / "run.log", *sorted(self.folder.glob("*/log"))]
        return "\n".join(
            f"--- {file}\n{file.read_text(errors='replace')[-3000:]}"
            for file in files
            if file.exists()
        )

    def _spawn(
        self, script: str, *arguments: str, log: Path, **env: str
    ) -> "subprocess.Popen[bytes]":
        with log.open("ab") as file:
            process = subprocess.Popen(
                [SCRIPTS / script, *arguments],
                env={**self._env, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _script(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [SCRIPTS / name, *arguments],
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START,
            start_new_session=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}\n{self.logs()}"


def _free_ports(number: int) -> int:
    """Return the first of so many neighboring ports that are free on loopback."""
    for _attempt in range(100):
        first = random.randrange(20_000, 32_000)  # below the ports that the system gives away
        with ExitStack() as probes:
            try:
                for port in range(first, first + number):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports on loopback")
