"""The launcher's process family: everything that descends from us ends, and nothing
else.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flower_mcepl.launch.processes import ProcessFamily

DETACHED = """
import subprocess, sys, time
child = "import time; print('up', flush=True); time.sleep(60)"
if "deaf" in sys.argv:
    child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + child
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
if "leave" not in sys.argv:
    time.sleep(60)
"""


@pytest.mark.parametrize("manner", ["stay", "leave", "deaf"])
@pytest.mark.parametrize("by_mark", [True, False], ids=["by-mark", "by-descent"])
def test_family_ends_detached_children(manner: str, by_mark: bool) -> None:
    if by_mark and not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    if manner == "leave" and not by_mark:
        pytest.skip("a child that left before anybody looked is known by its mark only")
    mark = f"MCEPL_TEST_MARK={os.getpid()}-{manner}-{by_mark}"
    env = {**os.environ, **({"MCEPL_TEST_MARK": mark.partition("=")[2]} if by_mark else {})}
    command = [sys.executable, "-c", DETACHED, manner]
    family = ProcessFamily(mark)
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        if not by_mark:
            family.adopt(parent.pid)
        if manner == "leave":
            parent.wait()
        members = family.members()
        assert len(members) == (1 if manner == "leave" else 2)
        assert family.end(grace=0.3, busy=lambda: parent.poll() is None) == []
    for pid in members:
        with pytest.raises(ProcessLookupError):
            _alive(pid)


def test_family_leaves_others_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        family = ProcessFamily("MCEPL_TEST_MARK=nobody")
        assert family.members() == []
        assert family.end(grace=0.0) == []
        assert stranger.poll() is None
        stranger.communicate(b"\n")
        assert stranger.returncode == 0


def _alive(pid: int) -> None:
    """Raise ProcessLookupError when the process is gone or only waits to be buried."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists() and (
        not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    ):
        raise ProcessLookupError
    os.kill(pid, 0)
