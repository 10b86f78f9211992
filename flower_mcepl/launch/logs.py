"""Reading the logs of a run."""

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RECORD = re.compile(r"Run record: (.+?)\s*$")
_LIMIT = 60  # lines of an excerpt; a third of them where nothing in the log says why


def without_colors(text: str) -> str:
    """Return the text without the codes that color it in a terminal."""
    return _ANSI.sub("", text)


def record_named_in(line: str) -> str | None:
    """Path of the run record, if this line of the relay's log names it."""
    match = _RECORD.search(without_colors(line))
    return match[1] if match else None


def excerpt(log: str) -> str:
    """Part of a log that says why: from the last traceback or error on."""
    lines = log.rstrip().splitlines()
    tracebacks = [
        at for at, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")
    ]
    errors = [at for at, line in enumerate(lines) if line.startswith("ERROR")]
    if tracebacks:
        before = [at for at in errors if at < tracebacks[-1]]
        start = before[-1] if before and tracebacks[-1] - before[-1] <= 2 else tracebacks[-1]
    else:
        start = errors[0] if errors else len(lines) - _LIMIT // 3
    return "\n".join(lines[max(start, 0) :][-_LIMIT:])
