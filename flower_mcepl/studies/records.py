"""Records in a study's folder: found by digest, whatever their folders' names.

::

    OUT/.replaced/DIGEST/NAME/   a record as its successor takes its place
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from flower_mcepl.errors import RecordError
from flower_mcepl.record.facts import engine_of_bits
from flower_mcepl.record.layout import CONFIG
from flower_mcepl.record.parsing import read_object
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.schema import CONFIG_FILE

REPLACED = ".replaced"


def finished_by_digest(out: Path, engine: str, digests: Collection[str]) -> dict[str, Run]:
    """Complete records with the bits of an engine; of one digest the newest."""
    finished: dict[str, Run] = {}
    for path, digest in _records(out):
        if digest is None or digest not in digests:
            continue
        if (run := _finished(path, engine)) is not None:
            other = finished.get(digest, run)
            finished[digest] = max(other, run, key=lambda one: one.started)
    return finished


def _finished(path: Path, engine: str) -> Run | None:
    with contextlib.suppress(RecordError, OSError):
        run = read_run(path)
        if run.finished and engine_of_bits(run.study.get("engine")) == engine_of_bits(engine):
            return run
    return None


def of_other_runs(out: Path, digests: Collection[str]) -> list[Path]:
    """Records with none of the digests, or with none that can be read."""
    return [path for path, digest in _records(out) if digest not in digests]


def why_unreadable(record: Path) -> str | None:
    """Reason why what lies in a record's place cannot be read; None where it can be."""
    try:
        read_run(record)
    except (RecordError, OSError) as error:
        return str(error) if record.exists() else None
    return None


def replace_record(new: Path, place: Path, digest: str) -> None:
    """Move a finished record to its place, and only then remove those it stands for.

    These are what lies there, and records of the same digest under any name, such as
    those of another engine.
    """
    out = place.parent
    aside = out / REPLACED / digest  # its own: several runs may end at the same time
    old = {path for path, other in _records(out) if other == digest}
    if place.exists():
        old.add(place)
    aside.mkdir(parents=True, exist_ok=True)
    try:
        for path in sorted(old):
            path.rename(aside / path.name)
        new.rename(place)
    except BaseException:
        _put_back(aside)
        raise
    shutil.rmtree(aside)


def restore_records(out: Path) -> None:
    """Put back what a replacement that was killed left aside."""
    replaced = out / REPLACED
    if replaced.is_dir():
        for aside in sorted(replaced.iterdir()):
            _put_back(aside)
        replaced.rmdir()


def _put_back(aside: Path) -> None:
    """Records back to where they were, unless a successor has come there."""
    for path in sorted(aside.iterdir()):
        place = aside.parent.parent / path.name
        if place.exists():
            shutil.rmtree(path)
        else:
            path.rename(place)
    aside.rmdir()


def _records(out: Path) -> Iterator[tuple[Path, str | None]]:
    """Folders with a record, and the digest of each, where it can be read."""
    for file in sorted(out.glob(f"*/{CONFIG}")):
        yield file.parent, _digest(file)


def _digest(config: Path) -> str | None:
    with contextlib.suppress(RecordError, OSError):
        study = read_object(config, CONFIG_FILE).get("study") or {}
        digest = study.get("digest")
        return digest if isinstance(digest, str) else None
    return None
