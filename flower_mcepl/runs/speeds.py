"""Speeds of a simulated fleet: what a local step takes, agent by agent, over time.

A spec is one line of parts between semicolons, the first of which has to be there::

    1, 1, 5; 3@100=2; 3@250=1; noise=0.2; latency=0.5

* seconds of a local step, which the agents take in turn: agent i has number ``i mod
  k``;
* ``agent@time=factor``: from that virtual time on the agent's steps take the factor
  times its own seconds, until another part changes it;
* ``noise``: each round of each agent takes its seconds times a number drawn evenly from
  ``1 - noise`` to ``1 + noise``, from a stream of the run's seed;
* ``latency``: seconds that a message takes, each way.

``file:PATH`` reads the parts from a text file, a line each; ``#`` begins a comment. All
seconds are virtual ones: a round counts by the speed at which it begins.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, final

from flower_mcepl.config.checks import check
from flower_mcepl.errors import ConfigError
from flower_mcepl.streams import numpy_stream

_EXAMPLE = '"1, 1, 5; 3@100=2; noise=0.2; latency=0.5"'
_CHANGE = re.compile(r"(\d{1,7})\s*@\s*([^=]+)=(.+)")
_LINES = 100_000  # of a file: more is no list of speeds


@dataclass(frozen=True)
class Change:
    """From a virtual time on, an agent's steps take so many times its own seconds."""

    agent: int
    time: float
    factor: float


@final
@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What the rounds of a simulated fleet take, in virtual seconds.

    Parameters
    ----------
    step_seconds : tuple of float (default: 1 second)
        Seconds of a local step, > 0, taken in turn.
    changes : tuple of Change (default: none)
        Later ones of an agent replace earlier ones.
    noise : float (default: 0.0)
        In [0, 1), see above.
    latency : float (default: 0.0)
        Seconds of a message, >= 0, each way.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    step_seconds: tuple[float, ...] = (1.0,)
    changes: tuple[Change, ...] = ()
    noise: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        check(
            bool(self.step_seconds) and all(map(_is_positive, self.step_seconds)),
            "speeds are seconds of a local step, finite numbers > 0",
            self.step_seconds,
            f"Write them as {_EXAMPLE}.",
        )
        for change in self.changes:
            check(
                math.isfinite(change.time) and change.time >= 0 and _is_positive(change.factor),
                "a change of speeds is agent@time=factor, with a time >= 0 and a factor > 0",
                f"{change.agent}@{change.time:g}={change.factor:g}",
            )
        check(0 <= self.noise < 1, "the noise of speeds must be in [0, 1)", self.noise)
        check(
            math.isfinite(self.latency) and self.latency >= 0,
            "the latency of speeds must be >= 0 seconds",
            self.latency,
        )

    @classmethod
    def parse(cls, text: str) -> "Speeds":
        """Read a spec, or the file that it names.

        Raises
        ------
        ConfigError
            If it is none, or a value is out of range.
        """
        name, _, path = text.partition(":")
        parts = _parts_of_file(Path(path)) if name.strip() == "file" else _parts(text)
        first = next(parts, "")
        seconds = tuple(_number(number, text) for number in first.split(","))
        changes, others = [], dict[str, float]()
        for part in parts:
            key, _, value = part.partition("=")
            if change := _CHANGE.fullmatch(part):
                agent, time, factor = change.groups()
                changes.append(Change(int(agent), _number(time, text), _number(factor, text)))
            elif key.strip() in ("noise", "latency") and key.strip() not in others:
                others[key.strip()] = _number(value, text)
            else:
                _refuse(part, text)
        return cls(step_seconds=seconds, changes=tuple(changes), **others)

    def to_text(self) -> str:
        """The spec that `parse` reads back."""
        parts = [
            ", ".join(map(repr, self.step_seconds)),
            *(f"{c.agent}@{c.time!r}={c.factor!r}" for c in self.changes),
            *([f"noise={self.noise!r}"] if self.noise else []),
            *([f"latency={self.latency!r}"] if self.latency else []),
        ]
        return "; ".join(parts)

    def check_agents(self, num_agents: int) -> None:
        """Raise ConfigError if a change is of an agent that the fleet does not have."""
        for change in self.changes:
            check(
                change.agent < num_agents,
                f"a change of speeds is of one of the agents 0..{num_agents - 1}",
                f"{change.agent}@{change.time:g}={change.factor:g}",
                "Leave it out, or use a larger fleet.",
            )

    def step(self, agent: int, round: int, *, at: float, seed: int) -> float:
        """Seconds of a local step in a round of the agent that begins ``at`` a time."""
        seconds = self.step_seconds[agent % len(self.step_seconds)] * self._factor(agent, at)
        if not self.noise:
            return seconds
        stream = numpy_stream(seed, "speeds", agent=agent, round=round)
        return seconds * float(stream.uniform(1 - self.noise, 1 + self.noise))

    def _factor(self, agent: int, at: float) -> float:
        factor, since = 1.0, -1.0
        for change in self.changes:
            if change.agent == agent and since <= change.time <= at:
                factor, since = change.factor, change.time
        return factor


def _parts(text: str) -> Iterator[str]:
    yield from (part.strip() for part in text.split(";") if part.strip())


def _parts_of_file(path: Path) -> Iterator[str]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the speeds in {path}: {error}. Check the path.") from error
    check(len(lines) <= _LINES, f"a file of speeds has at most {_LINES} lines", len(lines))
    for line in lines:
        yield from _parts(line.partition("#")[0])


def _number(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError:
        _refuse(text, spec)


def _refuse(part: str, spec: str) -> NoReturn:
    raise ConfigError(
        f"speeds are seconds of a local step and, after semicolons, agent@time=factor, noise=... "
        f"and latency=..., each of the last two once; got {part.strip()!r} in {spec!r:.200}. "
        f"Write them as {_EXAMPLE}."
    )


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0
