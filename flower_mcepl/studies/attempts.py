"""Attempts at a study's runs: one that broke off is gone on with.

::

    OUT/.unfinished/SLUG.RANDOM/
    ├── attempt.json   what it is an attempt at, see `subject_of`
    └── records/       where the engine leaves the run record

A name of its own for every attempt: a run that outlives a killed study writes nowhere
near another one.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import RecordError
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.launch.restarts import RESUME
from flower_mcepl.record.layout import CHECKPOINT, checkpoint_rounds
from flower_mcepl.record.parsing import read_raw
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.values import package_versions, to_json
from flower_mcepl.studies.flower_app import FLOWER, FlowerApp

UNFINISHED = ".unfinished"
ABOUT, RECORDS = "attempt.json", "records"
Subject = dict[str, Any]
"""What an attempt is at, JSON-able: nothing of it may change while a run goes on."""


@final
@dataclass(frozen=True)
class Attempt:
    """An attempt at a run, which broke off.

    Attributes
    ----------
    record : Path
        Its run record.
    after : int
        Round of the checkpoint that it goes on from; 0: none.
    finished : bool
        Whether the run has finished, and its record has yet to be put in its place.
    """

    record: Path
    after: int
    finished: bool


def subject_of(digest: str, engine: str, app: FlowerApp) -> Subject:
    """What an attempt at a run is at: its digest, engine, code and versions."""
    return {
        "digest": digest,
        "engine": engine,
        "code": code_digest(app.folder),
        "versions": _versions(),
    }


# A process imports a package and an app's modules once, so once it is looked what they
# are, and not for each of a study's runs.
_versions = functools.cache(package_versions)


@functools.cache
def code_digest(folder: Path) -> str:
    """SHA-256 over an app's Python files; none that is hidden, or of environments."""
    digest = hashlib.sha256()
    for path in sorted(_python_files(folder)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _python_files(folder: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(folder):
        inside = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in inside if not Path(top, name, "pyvenv.cfg").exists()]
        # an editor's lock, `.#task.py`, is a link to nowhere
        modules = (Path(top, name) for name in files if name.endswith(".py") and name[0] != ".")
        yield from (path for path in modules if path.is_file())


def begin_attempt(out: Path, slug: str, subject: Subject) -> Path:
    """Make the folder of a new attempt; return the one that its engine is given."""
    (out / UNFINISHED).mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{slug}.", dir=out / UNFINISHED))
    records = folder / RECORDS
    records.mkdir()
    replace_file(folder / ABOUT, to_json(subject).encode())
    return records


def find_attempts(out: Path, subject: Subject) -> list[Attempt]:
    """Attempts that can be gone on with, the one that came furthest first."""
    found = [one for folder in _folders(out) if _subject(folder) == subject for one in _in(folder)]
    return sorted(found, key=lambda one: (one.finished, one.after), reverse=True)


def clear_attempts(out: Path, *, digests: Collection[str], but: Collection[Subject]) -> None:
    """Remove attempts that nobody can go on with.

    These have come nowhere, or are at runs of these digests and at none of ``but``: of
    runs that have finished or begin anew. Those at other runs stay, as records do; the
    study may ask for them again.
    """
    for folder in _folders(out):
        subject = _subject(folder)
        ours = subject is not None and subject.get("digest") in digests
        if (ours and subject not in but) or subject is None or not any(_in(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def attempts_at_other_runs(out: Path, digests: Collection[str]) -> list[Path]:
    """Attempts that can be gone on with, at runs of none of these digests."""
    abouts = ((folder, _subject(folder)) for folder in _folders(out))
    others = [folder for folder, about in abouts if about and about.get("digest") not in digests]
    return [folder for folder in others if any(_in(folder))]


def outdated_attempts(out: Path, subject: Subject) -> Iterator[tuple[Attempt, list[str]]]:
    """Attempts at a run that begins anew, and what of it is no longer as it was."""
    for folder in _folders(out):
        about = _subject(folder)
        if about and about.get("digest") == subject["digest"] and about != subject:
            changed = [key for key, value in subject.items() if about.get(key) != value]
            yield from ((attempt, changed) for attempt in _in(folder))


def end_attempts(out: Path, subject: Subject) -> None:
    """Remove the attempts at a run that has finished."""
    for folder in _folders(out):
        if _subject(folder) == subject:
            shutil.rmtree(folder)


def can_resume(engine: str, app: FlowerApp) -> bool:
    """Whether an app's runs can be told to go on: Flower takes no key that it lacks."""
    return engine != FLOWER or RESUME in app.config


def _in(folder: Path) -> Iterator[Attempt]:
    """What there is to go on from in the folder of an attempt."""
    for record in sorted((folder / RECORDS).glob("*")):
        after = max(checkpoint_rounds(record / CHECKPOINT), default=0)
        if (finished := _is_finished(record)) or after:
            yield Attempt(record, after, finished)


def _subject(folder: Path) -> Subject | None:
    """What an attempt is at; None where its folder does not say so."""
    with contextlib.suppress(RecordError, OSError):
        return read_raw(folder / ABOUT)
    return None


def _is_finished(record: Path) -> bool:
    with contextlib.suppress(RecordError, OSError):
        return read_run(record).finished
    return False


def _folders(out: Path) -> list[Path]:
    unfinished = out / UNFINISHED
    return sorted(unfinished.iterdir()) if unfinished.is_dir() else []
