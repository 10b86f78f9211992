"""Runner of studies: what is finished stays, what is not is done, come what may.

::

    OUT/
    ├── mcepl_seed-1_5d41402a/   the record of a finished run, moved here in one step
    ├── logs/                    one log a run, of its last attempt
    ├── compare.md, compare.csv  the table over all finished runs
    ├── study.toml               the study file of the last start
    ├── .unfinished/             runs that go on or failed; the next start clears it
    ├── .replaced/               records as others take their places
    └── .lock                    held while a process is at work here
"""

import contextlib
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from flower_mcepl.errors import ConfigError, FlowerMceplError
from flower_mcepl.files.sealed import file_lock
from flower_mcepl.launch.plan import refuse_windows
from flower_mcepl.record.pools import LABEL
from flower_mcepl.record.reading import Run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.compare import compare
from flower_mcepl.report.tables import write_csv, write_markdown
from flower_mcepl.studies.flower_app import FLOWER, FlowerApp
from flower_mcepl.studies.processes import side_by_side
from flower_mcepl.studies.records import (
    finished_by_digest,
    of_other_runs,
    replace_record,
    restore_records,
    why_unreadable,
)
from flower_mcepl.studies.study import PlannedRun, Study

UNFINISHED, LOGS = ".unfinished", "logs"
Attempts = Generator[tuple["Task", str | None], None, None]
MARKDOWN, CSV, STUDY_COPY = "compare.md", "compare.csv", "study.toml"


@dataclass(frozen=True)
class Task:
    """All that another process needs to carry out one run."""

    study: str  # its name
    app: FlowerApp
    engine: str
    out: Path
    run: PlannedRun

    @property
    def record(self) -> Path:
        """Folder of the finished run's record."""
        return self.out / self.run.slug

    @property
    def log(self) -> Path:
        """Log of the run's last attempt."""
        return self.out / LOGS / f"{self.run.slug}.log"


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    task: Task
    error: str | None  # None: its record is in place


def tasks_of(study: Study) -> list[Task]:
    """Runs of the study as tasks."""
    return [Task(study.name, study.app, study.engine, study.out, run) for run in study.runs]


def waiting(study: Study) -> list[Task]:
    """Runs of the study that are not finished."""
    finished = _finished(study)
    return [task for task in tasks_of(study) if task.run.digest not in finished]


def _finished(study: Study) -> dict[str, Run]:
    return finished_by_digest(study.out, study.engine, _digests(study))


def _digests(study: Study) -> set[str]:
    return {run.digest for run in study.runs}


def run_study(
    study: Study, *, jobs: int = 1, tell: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Do the runs that are not finished, and write the tables over all that are.

    A run that fails does not stop the others; the next call tries it again.

    Parameters
    ----------
    study : Study
        What to run.
    jobs : int (default: 1)
        Runs at the same time, each in a process of its own; more than one only with the
        engines of this process.
    tell : callable, optional
        Called with each run's outcome as it ends.

    Raises
    ------
    ConfigError
        If another process is at work on the same folder, or `jobs` does not fit.
    LaunchError
        If Flower's simulation is to carry it out, on Windows.
    """
    if study.engine == FLOWER:
        refuse_windows()
    if jobs < 1 or (jobs > 1 and study.engine == FLOWER):
        raise ConfigError(
            f'--jobs must be 1 with engine = "{FLOWER}", and >= 1 with any other; got '
            f"{jobs}. Flower spreads one run over all cores by itself."
        )
    study.out.mkdir(parents=True, exist_ok=True)
    with _only_runner(study.out):
        shutil.rmtree(study.out / UNFINISHED, ignore_errors=True)
        restore_records(study.out)
        _label_records(study)
        (study.out / LOGS).mkdir(exist_ok=True)
        if study.file.resolve() != (study.out / STUDY_COPY).resolve():
            shutil.copyfile(study.file, study.out / STUDY_COPY)
        to_do = waiting(study)
        outcomes = []
        try:
            # whatever happens, nobody works on unheld
            with contextlib.closing(_attempts(to_do, jobs)) as attempts:
                for task, error in attempts:
                    outcomes.append(Outcome(task, error))
                    tell(outcomes[-1])
        finally:
            restore_records(study.out)
            _write_tables(study)
    return outcomes


def finished_runs(study: Study) -> list[Run]:
    """Records of the study's finished runs, in its order, under its labels as now."""
    finished = _finished(study)
    return [
        _labeled(finished[run.digest], study, run) for run in study.runs if run.digest in finished
    ]


def _labeled(record: Run, study: Study, run: PlannedRun) -> Run:
    about = {**record.study, "name": study.name, LABEL: run.label}
    return replace(record, config={**record.config, "study": about})


def _label_records(study: Study) -> None:
    """Write the study's labels as they are now into records that have others."""
    finished = _finished(study)
    for run in study.runs:
        if (record := finished.get(run.digest)) is not None:
            labeled = _labeled(record, study, run)
            if labeled.study != record.study:
                RunRecord(record.path).amend_config(study=labeled.study)


def strangers(study: Study) -> list[Path]:
    """Records in the study's folder that are of none of its runs as it is now."""
    own = {task.record for task in tasks_of(study)}
    return [path for path in of_other_runs(study.out, _digests(study)) if path not in own]


def unreadable(tasks: Iterable[Task]) -> list[tuple[Path, str]]:
    """Records in the places of runs that nobody can read, and why."""
    places = ((task.record, why_unreadable(task.record)) for task in tasks)
    return [(place, reason) for place, reason in places if reason is not None]


def unreadable_line(place: Path, reason: str) -> str:
    """What becomes of a record that nobody can read."""
    return (
        f"{place.name} cannot be read, so its run is done again; when that has finished, its "
        f"record takes the place of this one. Move the folder away to keep it. {reason}"
    )


def _write_tables(study: Study) -> None:
    if runs := finished_runs(study):
        comparison = compare(runs, target=study.target)
        write_markdown(comparison, study.out / MARKDOWN)
        write_csv(comparison, study.out / CSV)


def _attempts(tasks: Sequence[Task], jobs: int) -> Attempts:
    if jobs > 1:
        return side_by_side(attempt, tasks, jobs=jobs)
    return ((task, attempt(task)) for task in tasks)


def attempt(task: Task) -> str | None:
    """Carry out one run; return what went wrong (its log has the traceback)."""
    # what an app prints may hold names of files that are no text
    with open(task.log, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        interrupts: list[int] = []
        try:
            # An app that prints would disturb the progress shown.
            with (
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
                _noting(interrupts),
            ):
                _carry_out(task, lambda line: _write(log, line))
        except Exception as error:  # a run may fail in any way; the study goes on with the others
            if interrupts:
                raise KeyboardInterrupt from error
            traceback.print_exc(file=log)
            return (
                str(error)
                if isinstance(error, FlowerMceplError)
                else f"{type(error).__name__}: {error}"
            )
    return None


@contextlib.contextmanager
def _noting(interrupts: list[int]) -> Iterator[None]:
    """Note each Ctrl-C of a block: a library may make another error of it."""

    def note(signum: int, frame: object) -> NoReturn:
        interrupts.append(signum)
        raise KeyboardInterrupt

    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _write(log: Any, line: str) -> None:
    log.write(line + "\n")


def _carry_out(task: Task, log: Callable[[str], None]) -> None:
    """Leave the finished record in its place, in one step at the very end.

    What lies there stays until then: a run that fails costs nothing.
    """
    from flower_mcepl.studies.engines import ENGINES  # loads torch

    for place, reason in unreadable([task]):
        log(unreadable_line(place, reason))
    unfinished = task.out / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    # A name of its own for every attempt: a run that outlives a killed study writes
    # nowhere near the next attempt.
    folder = Path(tempfile.mkdtemp(prefix=f"{task.run.slug}.", dir=unfinished))
    record = ENGINES[task.engine](task.app, task.run.config, folder, log)
    about = {
        "name": task.study,
        "app": task.app.name,
        "digest": task.run.digest,
        "label": task.run.label,
        "engine": task.engine,
    }
    RunRecord(record).amend_config(study=about)
    replace_record(record, task.record, task.run.digest)
    folder.rmdir()


def _only_runner(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold on the folder of a study: one process at a time runs it."""
    busy = (
        f"one process at a time runs a study; process {{process}} is at work in {folder}. "
        "Wait for it, or give this study another folder (out)."
    )
    return file_lock(folder / ".lock", wait=0, busy=busy, error=ConfigError)
