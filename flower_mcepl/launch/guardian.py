"""Guardian of a SuperLink: ends what is below it when the launcher is killed.

Nothing runs in a process that gets SIGKILL, so a second one watches: this program reads
a pipe whose other end the launcher alone holds. The operating system closes it with the
launcher, however that ends.
"""

import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from flower_mcepl.launch.processes import ProcessFamily

_LOOK = 2.0  # seconds between looks at the family: process groups while their parents still live
_GRACE = 4.0


def start_guardian(home: Path, mark: str) -> "subprocess.Popen[bytes]":
    """Start the guardian of the processes with this mark, whose files are in ``home``.

    It gets the number of each process that leads them as a line (`adopt`), and ends
    when its input does: after the launcher has cleaned up, or in its place.
    """
    name = mark.partition("=")[0]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(home), mark],
        env={key: value for key, value in os.environ.items() if key != name},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the launcher
    )


def watch(home: Path, mark: str, source: BinaryIO) -> None:
    """Wait for the end of ``source``; then end the family, and remove its files."""
    family = ProcessFamily(mark)
    while True:
        if not select.select([source], [], [], _LOOK)[0]:
            family.members()
            continue
        line = source.readline()
        if not line:
            break
        family.adopt(int(line))
    family.end(grace=_GRACE, patient=False)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), sys.argv[2], sys.stdin.buffer)
