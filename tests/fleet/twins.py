"""Processes of their own that begin as this one: with torch loaded, which takes
seconds.
"""

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

LONGEST = 120.0  # seconds


class Twin:
    """A process that does some work; its exit code is 0 where that raised nothing."""

    def __init__(self, work: Callable[[], object]) -> None:
        with warnings.catch_warnings():  # Python 3.12 warns where this one has threads
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _play(work)
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it is at work."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """The exit code, as soon as it has ended."""
        end = time.monotonic() + LONGEST
        while self.poll() is None:
            assert time.monotonic() < end, "the twin does not end"
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """End it, however far it is."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def _play(work: Callable[[], object]) -> None:
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of pytest's own ends twice


@contextlib.contextmanager
def twin(work: Callable[[], object]) -> Iterator[Twin]:
    """A twin at work, which does not outlive the block."""
    other = Twin(work)
    try:
        yield other
    finally:
        other.kill()
