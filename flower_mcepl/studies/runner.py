"""Runner of studies: what is finished stays, what is not is done, come what may.

::

    OUT/
    ├── mcepl_seed-1_5d41402a/   the record of a finished run, moved here in one step
    ├── logs/                    one log a run, of its last attempt
    ├── compare.md, compare.csv  the table over all finished runs
    ├── study.toml               the study file of the last start
    ├── .unfinished/             runs under way, broken off or failed, see `attempts`
    ├── .replaced/               records as others take their places
    └── .lock                    held while a process is at work here
"""

import contextlib
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flower_mcepl.errors import ConfigError, FlowerMceplError
from flower_mcepl.files.sealed import file_lock
from flower_mcepl.launch.plan import refuse_windows
from flower_mcepl.record.pools import LABEL
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.compare import Comparison, compare
from flower_mcepl.report.tables import write_csv, write_markdown
from flower_mcepl.studies.attempts import (
    Attempt,
    Subject,
    attempts_at_other_runs,
    begin_attempt,
    can_resume,
    clear_attempts,
    end_attempts,
    find_attempts,
    outdated_attempts,
    subject_of,
)
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

if TYPE_CHECKING:
    from flower_mcepl.studies.engines import Engine

LOGS = "logs"
Outcomes = Generator[tuple["Task", str | None], None, None]
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
    def subject(self) -> Subject:
        """What attempts at the run are at."""
        return subject_of(self.run.digest, self.engine, self.app)

    def broken_off(self) -> list[Attempt]:
        """Attempts that can be gone on with, the one that came furthest first."""
        return find_attempts(self.out, self.subject) if can_resume(self.engine, self.app) else []

    def begins_anew(self) -> str | None:
        """Why it begins anew though it broke off in a round; None where it does not."""
        if self.broken_off():
            return None
        outdated = [*outdated_attempts(self.out, self.subject)]
        after, changed = max(((one.after, what) for one, what in outdated), default=(0, []))
        return f"after round {after}; changed since: {', '.join(changed)}" if after else None

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
        restore_records(study.out)
        _label_records(study)
        (study.out / LOGS).mkdir(exist_ok=True)
        if study.file.resolve() != (study.out / STUDY_COPY).resolve():
            shutil.copyfile(study.file, study.out / STUDY_COPY)
        to_do = waiting(study)
        subjects = [task.subject for task in to_do]
        clear_attempts(study.out, digests=_digests(study), but=subjects)
        outcomes = []
        try:
            # whatever happens, nobody works on unheld
            with contextlib.closing(_carried_out(to_do, jobs)) as ended:
                for task, error in ended:
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


def broken_off_strangers(study: Study) -> list[Path]:
    """Attempts in the study's folder at none of its runs as it is now."""
    return attempts_at_other_runs(study.out, _digests(study))


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


def comparison_of(study: Study) -> Comparison | None:
    """Comparison of the study's finished runs; None where there are none."""
    if not (runs := finished_runs(study)):
        return None
    comparison = compare(runs, target=study.target)
    unfinished = unfinished_notes(len(study.runs), finished=len(runs))
    return replace(comparison, notes=(*comparison.notes, *unfinished))


def unfinished_notes(total: int, *, finished: int) -> list[str]:
    """Note of how many runs of a study are in no table, where some are not."""
    lacking = f"{total - finished} of the study's {total} runs are not finished"
    return [lacking] if finished < total else []


def _write_tables(study: Study) -> None:
    if (comparison := comparison_of(study)) is not None:
        write_markdown(comparison, study.out / MARKDOWN)
        write_csv(comparison, study.out / CSV)
        return
    for file in (MARKDOWN, CSV):  # of the study as it was
        (study.out / file).unlink(missing_ok=True)


def _carried_out(tasks: Sequence[Task], jobs: int) -> Outcomes:
    if jobs > 1:
        return side_by_side(attempt, tasks, jobs=jobs)
    return ((task, attempt(task)) for task in tasks)


def attempt(task: Task) -> str | None:
    """Carry out one run; return what went wrong (its log has the traceback)."""
    before = task.broken_off()
    mode = "a" if before else "w"  # one run, one log
    # what an app prints may hold names of files that are no text
    with open(task.log, mode, encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        interrupts: list[int] = []
        try:
            # An app that prints would disturb the progress shown.
            with (
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
                _noting(interrupts),
            ):
                _carry_out(task, before, lambda line: _write(log, line))
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


def _carry_out(task: Task, before: Sequence[Attempt], log: Callable[[str], None]) -> None:
    """Leave the finished record in its place, in one step at the very end.

    What lies there stays until then: a run that fails costs nothing.
    """
    for place, reason in unreadable([task]):
        log(unreadable_line(place, reason))
    record = _gone_on(task, before, log) or _begun(task, log)
    about = {
        "name": task.study,
        "app": task.app.name,
        "digest": task.run.digest,
        "label": task.run.label,
        "engine": task.engine,
    }
    RunRecord(record).amend_config(study=about)
    replace_record(record, task.record, task.run.digest)
    end_attempts(task.out, task.subject)


def _gone_on(task: Task, before: Sequence[Attempt], log: Callable[[str], None]) -> Path | None:
    """Record of a run that broke off and has finished now.

    None where none can go on: what may be no longer as it was, such as the agents'
    data, is found out as it does.
    """
    for attempt in before:
        if attempt.finished:
            return attempt.record
        log(f"the run broke off; it goes on after round {attempt.after}.")
        resumptions = _resumptions(attempt.record)
        try:
            return _engine(task)(
                task.app, task.run.config, attempt.record.parent, log, attempt.record
            )
        except FlowerMceplError as error:
            if _resumptions(attempt.record) > resumptions:
                raise
            log(f"it cannot: {error}")
    return None


def _begun(task: Task, log: Callable[[str], None]) -> Path:
    """Record of a run that was begun, and has finished."""
    folder = begin_attempt(task.out, task.run.slug, task.subject)
    return _engine(task)(task.app, task.run.config, folder, log, None)


def _engine(task: Task) -> "Engine":
    from flower_mcepl.studies.engines import ENGINES  # loads torch

    return ENGINES[task.engine]


def _resumptions(record: Path) -> int:
    """How often the run of a record has gone on."""
    return len(read_run(record).config.get("resumptions") or [])


def _only_runner(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold on the folder of a study: one process at a time runs it."""
    busy = (
        f"one process at a time runs a study; process {{process}} is at work in {folder}. "
        "Wait for it, or give this study another folder (out)."
    )
    return file_lock(folder / ".lock", wait=0, busy=busy, error=ConfigError)
