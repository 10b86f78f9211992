"""The command line: ``python -m flower_mcepl.launch APP``."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.launch.logs import excerpt, record_named_in, without_colors
from flower_mcepl.launch.plan import Plan, plan_run
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
        terminal.begin(plan)
        outcome = carry_out(plan, timeout=options.timeout, on_line=terminal.pass_on)
    except KeyboardInterrupt as stop:
        signum = signal.Signals(getattr(stop, "signum", signal.SIGINT))
        terminal.end(f"stopped by {signum.name}")
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
    add("--timeout", type=float, metavar="S", help="stop the run after S seconds (default: never)")
    add(
        "--keep-superlink-log",
        action="store_true",
        help="leave superlink-<run>.log in the current folder",
    )
    return parser


@final
class _Terminal:
    """Run's log to the standard output, own words to the standard error."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._record: str | None = None  # path of the run record, once the log has told it

    def begin(self, plan: Plan) -> None:
        settings = f" ({' '.join(plan.run_config)})" if plan.run_config else ""
        nodes = "1 node" if plan.num_supernodes == 1 else f"{plan.num_supernodes} nodes"
        self.say(f"running {plan.app}{settings} with {nodes}; Ctrl-C stops it cleanly")

    def pass_on(self, line: str) -> None:
        self._record = record_named_in(line) or self._record
        sys.stdout.write((line if sys.stdout.isatty() else without_colors(line)) + "\n")
        sys.stdout.flush()

    def explain(self, outcome: RunOutcome) -> None:
        self.say(f"{outcome.details}\n--- the run's log says ---\n{excerpt(outcome.log)}")
        if "Traceback" not in outcome.log:
            self.say(f"--- the SuperLink's log says ---\n{excerpt(outcome.superlink_log)}")

    def end(self, status: str) -> None:
        record = f"; run record: {self._record}" if self._record else ""
        self.say(f"{status} after {time.monotonic() - self._started:.1f} s{record}")

    def say(self, text: str) -> None:
        sys.stderr.write(f"flower_mcepl: {text}\n")
