"""``flower-mcepl plot``: run records as pictures."""

from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.cli.wide import wide_console
from flower_mcepl.errors import visible
from flower_mcepl.studies.sources import read_sources


def plot(
    records: Annotated[
        list[Path],
        typer.Argument(help="Run records, folders of them such as a study's, or STUDY.toml files."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the PNGs (default: plots in the record or folder; of several, plots "
            "here)."
        ),
    ] = None,
) -> None:
    """Draw run records: accuracy, cost, masks.

    \b
      accuracy-rounds.png    accuracy by round: a line for each combination of settings
      accuracy-bytes.png     accuracy by bytes over the links, on a logarithmic axis
      accuracy-by-KEY.png    accuracy against a setting with three values or more
      spread.png             every agent's accuracy at the end
      graph.png              who talks to whom, colored by accuracy
      holdings*.png          who holds what: each agent's examples by class and split
      agreement*.png         how far masks agree, beside the overlap of classes
      filters*.png           share of kept weights in every filter, layer by layer

    Of another task it is that task's main metric, by its own name.

    Runs that differ by their seed alone are one line: their mean, and a band of one
    standard deviation over the seeds. For one record alone the band is over its agents.
    The last two need the agents' final states, which simulations leave; they are drawn
    for the first seed of each combination.

    What a record does not hold is not drawn, and told. Needs the extra "report"
    (matplotlib).

    \b
    Examples:
      flower-mcepl plot runs/20260131-141500-ring
      flower-mcepl plot runs/ablation --out pictures
      flower-mcepl plot examples/paper/2-ablation.toml
    """  # noqa: D301 (click's sign for lines that stay as they are)
    from flower_mcepl.report.plots.gallery import draw_gallery, write_gallery  # loads torch

    source = read_sources(records)
    gallery = draw_gallery(source.runs)
    console = wide_console()
    for file in write_gallery(gallery, source.folder / "plots" if out is None else out):
        console.print(str(file))
    for line in gallery.missing:
        console.print(f"not drawn: {visible(line)}")
    for line in (*source.notes, *gallery.notes):
        console.print(line)
