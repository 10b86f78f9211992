"""What a run and its launcher say to each other, in files that the launcher names.

A launcher's Ctrl-C so reaches a run that has no terminal.
"""

import os
from pathlib import Path

from flower_mcepl.errors import RECORD_NOTE, STOP_REQUEST
from flower_mcepl.files.atomic import replace_file


def heed_stop_request() -> None:
    """Raise KeyboardInterrupt if the launcher asks the run to stop."""
    if (request := _request()) is not None and request.exists():
        raise KeyboardInterrupt


def confirm_stop() -> None:
    """Tell the launcher that the run's summary is written."""
    if (request := _request()) is not None:
        request.unlink(missing_ok=True)


def announce_record(path: Path) -> None:
    """Tell the launcher where the run record is: it does not believe the log."""
    if note := os.environ.get(RECORD_NOTE):
        replace_file(Path(note), str(path).encode())


def _request() -> Path | None:
    path = os.environ.get(STOP_REQUEST)
    return Path(path) if path else None
