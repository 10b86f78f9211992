"""Printing without losing anything: no line is cut, however narrow the terminal."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flower_mcepl.report.plots.holdings import Holdings

_WIDEST = 1000  # columns of a table
_SIZES = {  # of a handshake
    "num-examples": "training examples",
    "num-validation-examples": "validation examples",
    "num-test-examples": "test examples",
}


def wide_console() -> Console:
    """Console that breaks no line itself, and shows text as it is."""
    # The file is named, as runs in this process have their standard output sent to a
    # log.
    return Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table as wide as its cells; rich would fit it to the terminal."""
    Console(file=sys.stdout, width=_WIDEST).print(table, crop=False)


def print_holdings(holdings: Holdings, console: Console) -> None:
    """Print the table of who holds what."""
    _print_numbers(*holdings.table())
    console.print(holdings.legend())


def print_sizes(handshakes: Sequence[Mapping[str, Any]]) -> None:
    """Print how many examples each agent's splits have, from handshakes."""
    keys = [key for key in _SIZES if any(key in facts for facts in handshakes)]
    rows = [[str(facts.get(key, "-")) for key in ("agent", *keys)] for facts in handshakes]
    _print_numbers(["agent", *(_SIZES[key] for key in keys)], rows)


def _print_numbers(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    print_table(table)
