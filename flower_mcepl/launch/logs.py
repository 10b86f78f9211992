"""Reading the logs of a run."""

import re
from typing import final

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OWN_ERROR = re.compile(r"flower_mcepl\.errors\.(\w+): (.*)")
_RAY_START = re.compile(r'File "[^"]*ray[/\\]_private[/\\]worker\.py", line \d+, in init$')
_LIMIT = 60  # lines of an excerpt; a third of them where nothing in the log says why


def without_colors(text: str) -> str:
    """Return the text without the codes that color it in a terminal."""
    return _ANSI.sub("", text)


def own_error(log: str) -> str | None:
    """Last error of flower_mcepl that ended a traceback, as ``Class: reason``."""
    errors = [match for line in log.splitlines() if (match := _OWN_ERROR.match(line))]
    return f"{errors[-1][1]}: {errors[-1][2]}" if errors else None


def why_ray_did_not_start(log: str) -> str | None:
    """Error of the first traceback in a log that goes through ``ray.init``."""
    lines = log.splitlines()
    for start, line in enumerate(lines):
        if _RAY_START.search(line):
            following = (text for text in lines[start:] if text.strip() and text[0] not in " \t")
            return next(following, None)
    return None


@final
class ShortTracebacks:
    """Lines of a log; of a traceback of flower_mcepl's own errors, the last one alone.

    Their text says what is wrong and what to do; where they were raised does not.
    """

    def __init__(self) -> None:
        self._held: list[str] = []  # a traceback whose last line has not come

    def feed(self, line: str) -> list[str]:
        """Take in a line; return those to show now."""
        plain = without_colors(line)
        if plain.startswith("Traceback (most recent call last)"):
            before, self._held = self._held, [line]
            return before
        if not self._held:
            return [line]
        self._held.append(line)
        if not plain.strip() or plain[0] in " \t|+":
            return []
        held, self._held = self._held, []
        match = _OWN_ERROR.match(plain)
        return held if match is None else [f"{match[1]}: {match[2]}"]


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
