"""``flower-mcepl compare``: run records side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flower_mcepl.cli.wide import print_table, wide_console
from flower_mcepl.report.tables import cells, footnotes, titles, write_csv, write_markdown
from flower_mcepl.studies import Comparison
from flower_mcepl.studies import compare as compare_runs
from flower_mcepl.studies.sources import read_sources


def compare(
    records: Annotated[
        list[Path],
        typer.Argument(help="Run records, folders of them such as a study's, or STUDY.toml files."),
    ],
    target: Annotated[
        float | None,
        typer.Option(help="Accuracy: show the bytes over the links until it was reached."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table to this Markdown file, too.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write its plain numbers to this CSV file, too.")
    ] = None,
) -> None:
    """Put run records side by side: accuracy and cost.

    A row is one combination of the settings in which the records differ; runs that
    differ by their seed alone are pooled. Runs that are not finished are left out, and
    named. A study's runs stand in the order of its file.

    \b
    Examples:
      flower-mcepl compare runs/ablation --target 0.9
      flower-mcepl compare runs/*-quickstart --csv table.csv --markdown table.md
    """  # noqa: D301 (click's sign for lines that stay as they are)
    source = read_sources(records)
    comparison = compare_runs(source.runs, target=target)
    comparison = replace(comparison, notes=(*comparison.notes, *source.notes))
    print_comparison(comparison, wide_console())
    if markdown is not None:
        write_markdown(comparison, markdown)
    if csv is not None:
        write_csv(comparison, csv)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table and what must be known of it."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    settings = len(comparison.keys)
    for number, title in enumerate(titles(comparison)):
        if number < settings:
            table.add_column(Text(title))
        else:  # the words of a measure's name below each other
            table.add_column(Text(title.replace(" ", "\n")), justify="right")
    for row in cells(comparison):
        table.add_row(*map(Text, row))
    print_table(table)
    for note in footnotes(comparison):
        console.print(note)
