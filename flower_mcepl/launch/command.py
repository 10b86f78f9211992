"""The command line: ``python -m flower_mcepl.launch APP``."""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.launch.checks import check_plan
from flower_mcepl.launch.logs import (
    ShortTracebacks,
    excerpt,
    own_error,
    why_ray_did_not_start,
    without_colors,
)
from flower_mcepl.launch.plan import Plan, format_run_config, plan_run
from flower_mcepl.launch.restarts import has_checkpoint, status_of, with_resume
from flower_mcepl.launch.run import RunOutcome, carry_out
from flower_mcepl.terminal import spell_unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 only for a run that finished well."""
    spell_unknown()
    options = _parser().parse_args(arguments)
    terminal = _Terminal()
    try:
        plan = plan_run(
            options.app,
            run_config=options.run_config,
            num_supernodes=options.num_supernodes,
            federation_config=" ".join(options.federation_config),
        )
        check_plan(plan)
        terminal.begin(plan)
        outcome = carry_out(
            plan,
            timeout=options.timeout,
            restarts=options.restarts,
            on_line=terminal.pass_on,
            tell=terminal.say,
            on_record=terminal.learn_record,
        )
    except KeyboardInterrupt as stop:
        signum = signal.Signals(getattr(stop, "signum", signal.SIGINT))
        terminal.end(f"stopped by {signum.name}")
        terminal.say_how_to_resume(options)
        return 128 + signum
    except FlowerMceplError as error:
        terminal.say(f"{type(error).__name__}: {error}")
        return 1
    except BrokenPipeError:  # whoever read our output left; there is nowhere to say more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if options.keep_superlink_log:
        kept = Path(f"superlink-{outcome.run_id}.log")
        kept.write_text(outcome.superlink_log, encoding="utf-8")
        terminal.say(f"the SuperLink's log is in {kept}")
    if not outcome.ok:
        terminal.explain(outcome)
    terminal.end(outcome.status)
    if not outcome.ok:
        terminal.say_how_to_resume(options)
    return 0 if outcome.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flower_mcepl.launch",
        description="Run a Flower app to its end in a private SuperLink; exit 0 only if it "
        "finished well.",
        allow_abbrev=False,
    )
    pairs: dict[str, Any] = {"action": "append", "default": [], "metavar": "'KEY=VALUE ...'"}
    add = parser.add_argument
    add("app", type=Path, metavar="APP", help="folder of the app, the one with its pyproject.toml")
    add(
        "--run-config",
        **pairs,
        help="override settings of the app, as in `flwr run`; may be repeated",
    )
    add(
        "--num-supernodes",
        type=int,
        metavar="N",
        help="nodes to simulate (default: the app's num-agents)",
    )
    add(
        "--federation-config",
        **pairs,
        help="more, as in `flwr run` (default: client-resources-num-cpus=1)",
    )
    add(
        "--restarts",
        type=_count,
        default=2,
        metavar="N",
        help="resume a run that lost a process of Flower's simulation so many times, in a new "
        "simulation and to the same bits (default: 2)",
    )
    add("--timeout", type=float, metavar="S", help="stop the run after S seconds (default: never)")
    add(
        "--keep-superlink-log",
        action="store_true",
        help="leave superlink-<run>.log in the current folder",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number >= 0 is needed; got {text!r}")
    return int(text)


@final
class _Terminal:
    """Run's log to the standard output, own words to the standard error."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._record: Path | None = None  # run record, once it is known
        self._tracebacks = ShortTracebacks()

    def begin(self, plan: Plan) -> None:
        settings = f" ({' '.join(plan.run_config)})" if plan.run_config else ""
        nodes = "1 node" if plan.num_supernodes == 1 else f"{plan.num_supernodes} nodes"
        self.say(f"running {plan.app}{settings} with {nodes}; Ctrl-C stops it cleanly")

    def pass_on(self, line: str) -> None:
        for shown in self._tracebacks.feed(line):
            sys.stdout.write((shown if sys.stdout.isatty() else without_colors(shown)) + "\n")
        sys.stdout.flush()

    def learn_record(self, record: Path) -> None:
        self._record = record

    def explain(self, outcome: RunOutcome) -> None:
        if (why := own_error(outcome.log)) is not None:
            self.say(why)
            return
        for log in (outcome.log, outcome.superlink_log):
            if (why := why_ray_did_not_start(log)) is not None:
                self.say(
                    f"Ray, which Flower simulates with, did not start ({why}). Too little memory "
                    "or time is the usual cause: end other work on this machine, or give each "
                    "client more (--federation-config client-resources-num-cpus=2)."
                )
                return
        self.say(f"{outcome.details}\n--- the run's log says ---\n{excerpt(outcome.log)}")
        if "Traceback" not in outcome.log:
            self.say(f"--- the SuperLink's log says ---\n{excerpt(outcome.superlink_log)}")

    def end(self, status: str) -> None:
        record = f"; run record: {self._record}" if self._record else ""
        self.say(f"{status} after {time.monotonic() - self._started:.1f} s{record}")

    def say_how_to_resume(self, options: argparse.Namespace) -> None:
        """Print the command that goes on with the run, if there is a checkpoint."""
        record = self._record
        if record is None or status_of(record) == "finished" or not has_checkpoint(record):
            return
        plan = Plan(options.app, 1, format_run_config(options.run_config), "")
        command = ["python", "-m", "flower_mcepl.launch", str(options.app)]
        for entry in with_resume(plan, record).run_config:
            command += ["--run-config", entry]
        if options.num_supernodes:
            command += ["--num-supernodes", str(options.num_supernodes)]
        for entry in options.federation_config:
            command += ["--federation-config", entry]
        self.say(f"go on with it by: {shlex.join(command)}")

    def say(self, text: str) -> None:
        sys.stderr.write(f"flower_mcepl: {text}\n")
