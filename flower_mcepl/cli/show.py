"""``flower-mcepl show``: a run record in the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.cli.wide import print_holdings, wide_console
from flower_mcepl.record.reading import read_run
from flower_mcepl.report.plots.holdings import holdings_of
from flower_mcepl.report.table import agent_table


def show(
    run: Annotated[Path, typer.Argument(help="A run record: the folder with config.json.")],
) -> None:
    """Print a run record: accuracy, cost, who held what.

    Works on a run that was killed or is still going on, too. Every number is explained
    in docs/run-record.md.
    """
    record = read_run(run)
    sys.stdout.write(agent_table(record))
    holdings = holdings_of(record.handshakes.values())
    if holdings is not None:
        sys.stdout.write("\n")
        print_holdings(holdings, wide_console())
