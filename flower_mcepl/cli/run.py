"""``flower-mcepl run``: all runs of a study."""

import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flower_mcepl.cli.compare import print_comparison
from flower_mcepl.cli.wide import print_table, wide_console
from flower_mcepl.launch.plan import parse_run_config
from flower_mcepl.record.figures import link_bytes
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.studies import Outcome, Study, read_study, run_study
from flower_mcepl.studies.runner import (
    CSV,
    MARKDOWN,
    Task,
    broken_off_strangers,
    comparison_of,
    finished_runs,
    strangers,
    tasks_of,
    unreadable,
    unreadable_line,
    waiting,
)


def run(
    study: Annotated[Path, typer.Argument(help="The study: a TOML file.", metavar="STUDY.toml")],
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at the same time (not with engine flower).")
    ] = 1,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings for every run, over those of [config], as in `flwr run`; may be "
            "repeated."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the study, list its runs, and stop.")
    ] = False,
) -> None:
    """Do all runs of a study, and compare them.

    \b
    A study names an app and what to vary:
    \b
      app = "../quickstart"        # a Flower app, relative to this file
      engine = "in-process"        # or "flower" (default): same bits, slower start;
                                   # or "batched": equal agents as stacks, other bits
      out = "runs/ablation"        # default: studies/NAME, where you start it
      target = 0.9                 # optional: accuracy, for the column of bytes
      [config]                     # run-config keys for every run
      num-rounds = 40
      [grid]                       # all combinations of these
      algorithm = ["mcepl", "local-masks"]
      seed = [1, 2, 3]
      [[runs]]                     # and further ones; a list is all its values
      label = "torus"
      topology = "torus"
      seed = [1, 2, 3]

    Every run is checked before the first one begins. Each leaves a run record in a
    folder of its own below `out`, and all together a table in compare.md and
    compare.csv.

    Ctrl-C, a crash or a power cut cost nothing but the rounds since the last checkpoint
    (checkpoint-every): start the same command again. What is finished is skipped, and
    the run that was going on goes on, unless the app's code or a version has changed.
    A run that fails is told and left for the next time; the exit code is then 1.

    \b
    Examples:
      flower-mcepl run examples/paper/2-ablation.toml --dry-run
      flower-mcepl run examples/paper/2-ablation.toml --jobs 2
      flower-mcepl run examples/paper/cifar10-methods.toml \\
        --run-config 'data="/path/to/cifar10"'
      flower-mcepl compare runs/ablation --target 0.9
    """  # noqa: D301 (click's sign for lines that stay as they are)
    plan = read_study(study, parse_run_config(run_config or []))
    console = wide_console()
    if dry_run:
        _list_runs(plan, console)
        return
    try:
        outcomes = _run(plan, jobs, console)
    except KeyboardInterrupt as stop:
        done = len(finished_runs(plan))
        console.print(
            f"stopped; {done} of {len(plan.runs)} runs are finished. The same command goes on "
            "from here."
        )
        _tell_what_goes_on(waiting(plan), console)
        raise typer.Exit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    _report(plan, outcomes, console)
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(1)


def _list_runs(plan: Study, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("run", *plan.varied, "state"):
        table.add_column(title)
    states, to_do = [], waiting(plan)
    for task in tasks_of(plan):
        states.append(_state(task) if task in to_do else "finished")
        values = [str(task.run.config[key]) for key in plan.varied]
        table.add_row(*map(Text, (task.run.slug, *values, states[-1])))
    print_table(table)
    _tell_what_begins_anew(to_do, console)
    console.print(
        f"{len(states)} runs, {len(to_do)} to do, engine {plan.engine}, records in {plan.out}"
    )


def _state(task: Task) -> str:
    """What is to be done of a run."""
    return f"to do, after round {after}" if (after := _after(task)) else "to do"


def _after(task: Task) -> int:
    """Round after which a run that broke off goes on; 0: it begins."""
    return max((attempt.after for attempt in task.broken_off()), default=0)


def _tell_what_goes_on(tasks: Iterable[Task], console: Console) -> None:
    for task in tasks:
        if after := _after(task):
            console.print(f"{task.run.slug} broke off; it goes on after round {after}.")


def _tell_what_begins_anew(tasks: Iterable[Task], console: Console) -> None:
    for task in tasks:
        if why := task.begins_anew():
            console.print(f"WARNING: {task.run.slug} broke off, and begins anew: {why}.")


def _run(plan: Study, jobs: int, console: Console) -> list[Outcome]:
    to_do = waiting(plan)
    done = len(plan.runs) - len(to_do)
    console.print(
        f"{plan.name}: {len(plan.runs)} runs, {done} finished, {len(to_do)} to do; records in "
        f"{plan.out}"
    )
    _tell_what_goes_on(to_do, console)
    _tell_what_begins_anew(to_do, console)
    for place, reason in unreadable(to_do):
        console.print(f"WARNING: {unreadable_line(place, reason)}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        teller = _Teller(console, progress, len(to_do), jobs)
        return run_study(plan, jobs=jobs, tell=teller.tell)


@final
class _Teller:
    """Says how each run ended, and how long the rest will take."""

    def __init__(self, console: Console, progress: Progress, waiting: int, jobs: int) -> None:
        self._console, self._progress, self._waiting, self._jobs = console, progress, waiting, jobs
        self._done = 0
        self._began = time.monotonic()
        self._bar = progress.add_task("running", total=waiting)

    def tell(self, outcome: Outcome) -> None:
        self._done += 1
        each = (time.monotonic() - self._began) / self._done
        left = f"{_duration(each * (self._waiting - self._done))} left"
        place = f"{self._done}/{self._waiting} {outcome.task.run.slug}"
        if outcome.error is None:
            self._console.print(f"{place}: {_reached(read_run(outcome.task.record))}, {left}")
        else:
            self._console.print(f"{place}: FAILED: {outcome.error} Its log: {outcome.task.log}")
        self._progress.update(self._bar, completed=self._done, description=left)


def _reached(run: Run) -> str:
    mean, seconds = run.result()["mean"], (run.summary or {}).get("seconds", 0.0)
    accuracy = "no agent evaluated" if mean is None else f"{run.metric.name} {mean:.4f}{_of(run)}"
    return f"{accuracy}, {human_bytes(link_bytes(run))} over the links, {seconds:.1f} s"


def _of(run: Run) -> str:
    """Of how many agents a mean is, where it is not of all."""
    return "" if len(run.last_evaluated()) == run.num_agents else f" of {run.coverage()}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _report(plan: Study, outcomes: list[Outcome], console: Console) -> None:
    if (comparison := comparison_of(plan)) is not None:
        console.print()
        print_comparison(comparison, console)
        console.print(f"the same as files: {plan.out / MARKDOWN}, {plan.out / CSV}")
    if others := strangers(plan):
        console.print(
            f"{len(others)} records in {plan.out} are of no run of this study as it is now (not "
            f"in the table): {', '.join(path.name for path in others)}"
        )
    if others := broken_off_strangers(plan):
        console.print(
            f"{len(others)} runs that broke off are of no run of this study as it is now; they "
            f"stay in {others[0].parent}: {', '.join(path.name for path in others)}"
        )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        console.print(
            f"failed: {len(failed)} of {len(outcomes)} runs; the same command tries them again:"
        )
        for outcome in failed:
            console.print(f"  {outcome.task.run.slug}: {outcome.error}")
