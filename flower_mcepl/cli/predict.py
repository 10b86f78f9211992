"""``flower-mcepl predict``: what a personal model says to files."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flower_mcepl.cli.pixels import pixels_of
from flower_mcepl.cli.wide import print_table

_SHOWN = 6  # outputs of a row


def predict(
    model: Annotated[Path, typer.Argument(help="A .mask file, as flower-mcepl export writes it.")],
    inputs: Annotated[
        list[Path], typer.Argument(help="Arrays (.npy, .npz), images, or folders of them.")
    ],
    app: Annotated[
        Path | None,
        typer.Option(
            help="Folder to import the network's code from, such as the run's app (default: this "
            "folder)."
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Images: subtracted from pixels in 0..1 (default: what MODEL says)."),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Images: what they are then divided by.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a list.")] = False,
) -> None:
    """Say what a personal model predicts for files.

    Arrays are taken as they are: prepared as the app's data function does, one input or
    a batch each. An image must have the network's size; its pixels, from 0 to 1, become
    (pixel - mean) / std.

    \b
    Examples:
      flower-mcepl predict agent-3.mask images.npy --app examples/quickstart
      flower-mcepl predict agent-3.mask photos/ --mean .5 --std .5 --json
    """  # noqa: D301 (click's sign for lines that stay as they are)
    from flower_mcepl.personal.predicting import predict as predictions

    pixels = pixels_of(mean, std)
    folder = str((app or Path.cwd()).resolve())
    sys.path.insert(0, folder)
    try:
        rows = list(predictions(model, inputs, pixels=pixels or None))
    finally:
        sys.path.remove(folder)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    _print(rows)


def _print(rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "input" else "right")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    print_table(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        more = " ..." if len(value) > _SHOWN else ""
        return " ".join(map(_cell, value[:_SHOWN])) + more
    return "" if value is None else str(value)
