"""Last values against a setting that a study sweeps: its axis, and a line a method."""

import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flower_mcepl.record.pools import LABEL, Pool, Pooled, exact
from flower_mcepl.report.plots.curves import in_part
from flower_mcepl.report.plots.subjects import settings_label

FEWEST_VALUES = 3  # fewer make no line
# of methods and runs: no order that a line could follow
_NAMES = {LABEL, "algorithm", "app", "run"}


@dataclass(frozen=True)
class SweepLine:
    """Last values of one combination of the other settings."""

    label: str
    at: tuple[int, ...]  # places of its values on the axis, rising
    mean: tuple[float, ...]  # over the seeds of the mean over the agents
    sd: tuple[float | None, ...]  # sample standard deviation over the seeds, of several


@dataclass(frozen=True)
class Sweep:
    """A setting's values, and the last values of the main metric at each of them."""

    key: str
    values: tuple[str, ...]  # numbers rising, others as the study has them
    lines: tuple[SweepLine, ...]
    follows: tuple[str, ...] = ()  # settings that change with the key's values
    rising: bool = True  # whether the values are numbers: others have nothing between them

    @property
    def axis(self) -> str:
        """Name of the axis: the setting, and what changes with it."""
        return f"{self.key} (and with it {', '.join(self.follows)})" if self.follows else self.key


def sweeps_of(pooled: Pooled) -> list[Sweep]:
    """Sweeps that the records hold, none to several.

    An axis is a setting, no name of a method, with lines of at least `FEWEST_VALUES`
    values. Where its values are names, as of networks, others may follow from them, as
    the layers that a network shares. A grid of several has one sweep, that with the
    fewest lines, and of these that with the shortest values. Where no axis has all
    records, as in a star of settings that vary one at a time, each has its own, if
    every record stands in one of them.
    """
    follows = {key: _follows(key, pooled) for key in pooled.keys if key not in _NAMES}
    found = {
        key: lines for key in follows if (lines := _long_lines((key, *follows[key]), pooled.pools))
    }
    whole = [key for key in found if _count(found[key]) == len(pooled.pools)]
    if whole:
        axes = [min(whole, key=lambda key: (len(found[key]), _room(key, pooled.pools)))]
    else:
        drawn = {id(one) for lines in found.values() for line in lines for one in line}
        axes = list(found) if len(drawn) == len(pooled.pools) else []
    return [_sweep_over(key, found[key], follows[key]) for key in axes]


def _follows(key: str, pooled: Pooled) -> tuple[str, ...]:
    """Settings with one value for each value of a key, where these are names."""
    values = {exact(one.settings.get(key)) for one in pooled.pools}
    if any(_number(one.settings.get(key)) is not None for one in pooled.pools):
        return ()

    def is_one(name: str) -> bool:
        pairs = {
            (exact(one.settings.get(key)), exact(one.settings.get(name))) for one in pooled.pools
        }
        return len(pairs) == len(values)

    return tuple(name for name in pooled.keys if name not in {key, *_NAMES} and is_one(name))


def _room(key: str, pools: Iterable[Pool]) -> int:
    """Characters that a key's values take below an axis."""
    return sum(map(len, {str(one.settings.get(key)) for one in pools}))


def _count(lines: Iterable[Sequence[Pool]]) -> int:
    return sum(map(len, lines))


def _long_lines(axis: Collection[str], pools: Sequence[Pool]) -> list[list[Pool]]:
    lines: dict[Hashable, list[Pool]] = {}
    for one in pools:
        others = _others(axis, one.settings)
        lines.setdefault(tuple(map(exact, others.values())), []).append(one)
    return [line for line in lines.values() if len(line) >= FEWEST_VALUES]


def _sweep_over(key: str, lines: Sequence[Sequence[Pool]], follows: tuple[str, ...]) -> Sweep:
    values = _in_order(one.settings.get(key) for line in lines for one in line)
    places = {exact(value): place for place, value in enumerate(values)}
    drawn = [_line(key, line, places, follows) for line in lines]
    return Sweep(
        key,
        tuple(map(str, values)),
        tuple(line for line in drawn if line.at),
        follows,
        rising=None not in map(_number, values),
    )


def _line(
    key: str,
    pools: Sequence[Pool],
    places: Mapping[tuple[type, Any], int],
    follows: tuple[str, ...],
) -> SweepLine:
    points: dict[int, list[float]] = {}
    for one in pools:
        results = [run.result()["mean"] for run in one.runs]
        if None not in results:
            points[places[exact(one.settings.get(key))]] = results
    at = sorted(points)
    runs = [run for one in pools for run in one.runs]
    counts = [run.result()["agents"] or 0 for run in runs]
    few = [count for count, run in zip(counts, runs, strict=True) if 0 < count < run.num_agents]
    return SweepLine(
        (settings_label(_others((key, *follows), pools[0].settings)) or "all runs")
        + in_part(few, runs),
        tuple(at),
        tuple(statistics.fmean(points[place]) for place in at),
        tuple(statistics.stdev(points[place]) if len(points[place]) > 1 else None for place in at),
    )


def _others(axis: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in {*axis, LABEL}}


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once: rising if all read as numbers, else as they come."""
    different = list({exact(value): value for value in values}.values())
    numbers = [_number(value) for value in different]
    if None in numbers:
        return different
    return [value for _, value in sorted(zip(numbers, different, strict=True), key=_first)]


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
