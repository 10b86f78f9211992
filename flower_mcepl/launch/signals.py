"""Stop signals as one exception, and none of them while we clean up."""

import signal
import threading
from types import FrameType
from typing import Any, final


class Interrupted(KeyboardInterrupt):
    """A signal asked us to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@final
class StopSignals:
    """Turn the first stop signal into ``Interrupted``, and ignore more while cleaning.

    Handlers that the caller installed, and signals that it ignores, stay as they are.
    """

    def __init__(self) -> None:
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)
                if signum and signal.getsignal(signum) in (
                    signal.SIG_DFL,
                    signal.default_int_handler,
                ):
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
