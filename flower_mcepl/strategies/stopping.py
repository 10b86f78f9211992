"""Requests to stop: a launcher's Ctrl-C reaches a run that has no terminal."""

import os
from pathlib import Path

from flower_mcepl.errors import STOP_REQUEST


def heed_stop_request() -> None:
    """Raise KeyboardInterrupt if the launcher asks the run to stop."""
    if (request := _request()) is not None and request.exists():
        raise KeyboardInterrupt


def confirm_stop() -> None:
    """Tell the launcher that the run's summary is written."""
    if (request := _request()) is not None:
        request.unlink(missing_ok=True)


def _request() -> Path | None:
    path = os.environ.get(STOP_REQUEST)
    return Path(path) if path else None
