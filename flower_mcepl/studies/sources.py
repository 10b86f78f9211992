"""Sources of run records: records, folders of them, and study files."""

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.record.layout import CONFIG
from flower_mcepl.record.pools import LABEL, find_records, varied
from flower_mcepl.record.reading import Run
from flower_mcepl.record.sources import Source
from flower_mcepl.studies.runner import STUDY_COPY, finished_runs, strangers, unfinished_notes
from flower_mcepl.studies.study import read_study
from flower_mcepl.studies.study_file import Combination, StudyFile


def read_source(path: Path) -> Source:
    """Read a run record, a folder of records, or the records of a study file's runs.

    Runs come in the order of their study where that is known: from the file itself, or
    from its copy in the folder.

    Raises
    ------
    RecordError
        If there is no record, or one is damaged.
    ConfigError
        If a study file is wrong.
    """
    if path.is_file():
        return _of_study_file(path)
    runs = tuple(find_records([path]))
    if (path / CONFIG).is_file():
        return Source(runs[0].name, path, runs)
    text = _text(path / STUDY_COPY)
    names = {run.study.get("name") for run in runs}
    name = str(names.pop() if len(names) == 1 and None not in names else path.resolve().name)
    target, notes = _target(text, runs)
    places, total = _places(runs, path / STUDY_COPY)
    done = {places[run.path] for run in runs if run.finished} - {total}
    notes = (*notes, *unfinished_notes(total, finished=len(done)))
    ordered = tuple(sorted(runs, key=lambda run: places[run.path]))
    return Source(name, path, ordered, text, target, notes)


def read_sources(paths: Sequence[Path]) -> Source:
    """Read several sources as one; of one alone all is kept."""
    sources = [read_source(path) for path in paths]
    if len(sources) == 1:
        return sources[0]
    runs = {run.path: run for source in sources for run in source.runs}  # each record once
    notes = tuple(note for source in sources for note in source.notes)
    name = " + ".join(source.name for source in sources)
    return Source(name, Path(), tuple(runs.values()), notes=notes)


def _of_study_file(path: Path) -> Source:
    study = read_study(path)
    runs = tuple(finished_runs(study))
    if not runs:
        others = len(strangers(study))
        raise RecordError(
            f"no run of {path}, as it and its app are now, is finished in {study.out}, which "
            f"holds {others} other records. Run the study "
            f"first{', or name the folder itself' if others else ''}."
        )
    notes = [
        f"left out: {other.name}, which is of no run of the study as it is now"
        for other in strangers(study)
    ]
    notes += unfinished_notes(len(study.runs), finished=len(runs))
    return Source(study.name, study.out, runs, _text(path), study.target, tuple(notes))


def _places(runs: tuple[Run, ...], file: Path) -> tuple[dict[Path, int], int]:
    """Place of each run in a study file, and how many there are; others come last.

    The file's app may be elsewhere by now, so nothing but the file itself is read: its
    defaults are not known. Where there is no such file it has no places.
    """
    try:
        combinations = StudyFile.read(file).combinations()
    except ConfigError:
        combinations = []
    keys = varied(one.settings for one in combinations)
    places = {run.path: _place(run, combinations, keys) for run in runs}
    return places, len(combinations)


def _place(run: Run, combinations: Sequence[Combination], keys: Collection[str]) -> int:
    """Number of the combination of a run: of those that fit, the most specific."""
    best, most = len(combinations), -1
    for place, one in enumerate(combinations):
        own = {key: value for key, value in one.settings.items() if key in keys}
        fits = one.label == run.study.get(LABEL) and own.items() <= run.settings.items()
        if fits and len(own) > most:
            best, most = place, len(own)
    return best


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _target(text: str | None, runs: Sequence[Run]) -> tuple[float | None, tuple[str, ...]]:
    """Target of a study's copy, or notes of why it is none of the folder's runs."""
    try:
        target = tomllib.loads(text or "").get("target")
    except tomllib.TOMLDecodeError:
        return None, ()
    if target is None:
        return None, ()
    if type(target) not in (int, float):
        problems = [f"target must be a number; got {target!r:.60}."]
    else:
        every = (run.metric.target_problem(target) for run in runs)
        problems = list(dict.fromkeys(problem for problem in every if problem is not None))
    if not problems:
        return float(target), ()
    return None, tuple(f"{STUDY_COPY}: {problem} It is left out." for problem in problems)
