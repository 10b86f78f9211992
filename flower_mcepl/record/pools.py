"""Run records grouped by the settings in which they differ, their seeds pooled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.record.layout import CONFIG
from flower_mcepl.record.reading import Run, read_run

# columns for runs that a study has named, and for runs without a run config
LABEL, RUN = "label", "run"
# these change nothing in what a row stands for
_NO_SETTING = {"seed", "record-dir", "keep-frames"}


@dataclass(frozen=True)
class Pool:
    """The records of one combination of settings."""

    settings: dict[str, Any]  # by varied key
    runs: tuple[Run, ...]  # one a seed


@dataclass(frozen=True)
class Pooled:
    """Run records by the settings in which they differ."""

    keys: tuple[str, ...]  # settings that are not the same in all of them
    pools: tuple[Pool, ...]  # in the order of the records
    notes: tuple[str, ...] = ()  # which records were left out, and why


def find_records(paths: Iterable[Path]) -> list[Run]:
    """Read run records: each path is one, or a folder of them such as that of a study.

    Raises
    ------
    RecordError
        If a path is neither, or a record is damaged.
    """
    runs = []
    for path in paths:
        folders = (
            [path]
            if (path / CONFIG).is_file()
            else sorted(file.parent for file in path.glob(f"*/{CONFIG}"))
        )
        if not path.exists():
            raise RecordError(
                f"a run record is a folder with {CONFIG}; {path} does not exist. Check the path."
            )
        if not folders:
            raise RecordError(
                f"a run record is a folder with {CONFIG}; neither {path} nor a folder in it has "
                "one."
            )
        runs += [read_run(folder) for folder in folders]
    return runs


def pool(runs: Sequence[Run]) -> Pooled:
    """Group run records by the settings in which they differ, the seed left aside.

    Runs that are not finished are left out; of two runs with the same settings and seed
    the newer one counts.

    Raises
    ------
    ConfigError
        If no run is finished.
    """
    finished, notes = _finished(runs)
    keys = varied(settings_of(run) for run in finished)
    groups: dict[Any, dict[Any, Run]] = {}
    for run in finished:
        settings = settings_of(run)
        group = groups.setdefault(tuple(exact(settings.get(key)) for key in keys), {})
        older, newer = sorted((group.get(run.seed, run), run), key=lambda twin: twin.started)
        group[run.seed] = newer
        if older is not newer:
            notes.append(
                f"left out: {older.path.name}, as a newer record has the same settings and seed"
            )
    pools = []
    for group in groups.values():
        settings = settings_of(next(iter(group.values())))
        pools.append(Pool({key: settings.get(key) for key in keys}, tuple(group.values())))
    return Pooled(keys, tuple(pools), tuple(notes))


def _finished(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    finished = [run for run in runs if run.finished]
    notes = [f"WARNING: {run.path.name}: {run.damage}" for run in finished if run.damage]
    notes += [
        f"left out: {run.path.name}, which is {run.status or 'without a summary'}"
        for run in runs
        if not run.finished
    ]
    if not finished:
        raise ConfigError(
            "a comparison needs at least one finished run; "
            f"{'; '.join(notes) or 'no record was given'}."
        )
    return finished, notes


def settings_of(run: Run) -> dict[str, Any]:
    """Settings that tell a run from others; of one without a run config its name."""
    if not run.settings:
        return {RUN: run.name}
    label = run.study.get(LABEL)
    named = {} if label is None else {LABEL: label}
    return {**named, **{k: value for k, value in run.settings.items() if k not in _NO_SETTING}}


def varied(settings: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Keys whose values are not the same, and of the same type, in all settings."""
    settings = list(settings)
    keys = dict.fromkeys(key for one in settings for key in one)
    return tuple(key for key in keys if len({exact(one.get(key)) for one in settings}) > 1)


def exact(value: Any) -> tuple[type, Any]:
    """Value that equals no other of another type, as True, 1 and 1.0 do."""
    return type(value), value
