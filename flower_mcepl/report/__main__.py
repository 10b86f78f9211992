"""``python -m flower_mcepl.report RECORD``: a table of the agents, and one picture.

Needs the extra ``report`` (matplotlib, rich), which is imported only when something is
shown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flower_mcepl.errors import FlowerMceplError, visible
from flower_mcepl.record.reading import read_run
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table
from flower_mcepl.terminal import spell_unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Print a run record's table and draw its picture; return the exit code."""
    spell_unknown()
    parser = argparse.ArgumentParser(
        prog="python -m flower_mcepl.report",
        description="Print what a run's agents reached and what it cost, and draw the run as one "
        "PNG.",
        epilog="Example: python -m flower_mcepl.report runs/20260131-141500-ring --out "
        "ring.png. Works on a run that was killed or is still going on, too. "
        "docs/run-record.md explains every number.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run record: the folder with config.json"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="picture to write (default: RUN_DIR/overview.png)"
    )
    arguments = parser.parse_args(argv)
    try:
        run = read_run(arguments.run_dir)
        sys.stdout.write(agent_table(run))
        sys.stdout.write(f"\npicture: {plot_run(run, arguments.out)}\n")
    except (FlowerMceplError, OSError) as error:
        sys.stderr.write(f"error: {visible(str(error), lines=True)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
