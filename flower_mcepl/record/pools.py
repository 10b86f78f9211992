"""Run records grouped by the settings in which they differ, their seeds pooled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.record.facts import facts_of
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

    Where records with the same settings are of different apps, algorithms, networks or
    the like (`facts`), the first such fact that tells them apart is a setting, too.
    Runs that are not finished are left out; of two runs that differ in nothing, the
    seed included, the newer one counts.

    Raises
    ------
    ConfigError
        If no run is finished.
    """
    finished, notes = _finished(runs)
    settings = {run.path: settings_of(run) for run in finished}
    keys = varied(settings.values())
    own = {path: [exact(one.get(key)) for key in keys] for path, one in settings.items()}
    groups, told_apart = _by_facts(_parts(finished, own))
    place = {run.path: number for number, run in enumerate(finished)}
    pools = []
    for group in sorted(groups, key=lambda group: place[group[0].path]):
        first = group[0]
        facts = {key: value for key, value in facts_of(first).items() if key in told_apart}
        kept, left_out = _one_a_seed(group)
        notes += [*left_out, *_unequal_graphs(kept)]
        both = {**settings[first.path], **facts}
        pools.append(Pool({key: both.get(key) for key in (*keys, *told_apart)}, kept))
    return Pooled((*keys, *told_apart), tuple(pools), tuple(notes))


def _by_facts(groups: list[list[Run]]) -> tuple[list[list[Run]], tuple[str, ...]]:
    """Divide groups by facts of their records, and say by which.

    A record that lacks a fact, as those of earlier releases do, stays with the others
    unless these contradict each other.
    """
    facts = {run.path: facts_of(run) for group in groups for run in group}
    told_apart = []
    for key in dict.fromkeys(key for one in facts.values() for key in one):
        parts = []
        for group in groups:
            known = {exact(facts[run.path][key]) for run in group if key in facts[run.path]}
            of_fact = {run.path: exact(facts[run.path].get(key)) for run in group}
            parts += _parts(group, of_fact) if len(known) > 1 else [group]
        if len(parts) > len(groups):
            told_apart.append(key)
        groups = parts
    return groups, tuple(told_apart)


def _parts(runs: Sequence[Run], keys: Mapping[Path, Any]) -> list[list[Run]]:
    """Runs of equal keys together, in the order in which they come."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(repr(keys[run.path]), []).append(run)
    return list(parts.values())


def _one_a_seed(group: Sequence[Run]) -> tuple[tuple[Run, ...], list[str]]:
    """Newest run of each seed, and notes of which others there are."""
    kept: dict[Any, Run] = {}
    notes = []
    for run in group:
        older, newer = sorted((kept.get(run.seed, run), run), key=lambda twin: twin.started)
        kept[run.seed] = newer
        if older is not newer:
            notes.append(
                f"left out: {older.path.name}, as a newer record has the same settings and seed"
            )
    return tuple(kept.values()), notes


def _unequal_graphs(runs: Sequence[Run]) -> list[str]:
    """Note of graphs with unequal numbers of links, where no setting tells of them."""
    graphs = [run.topology for run in runs if not run.setting("topology")]
    counts = {len(graph["edges"]) for graph in graphs if graph.get("edges") is not None}
    if len(counts) < 2:
        return []
    names = ", ".join(run.path.name for run in runs)
    links = ", ".join(map(str, sorted(counts)))
    return [f"pooled as seeds, though their graphs have {links} links: {names}"]


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
