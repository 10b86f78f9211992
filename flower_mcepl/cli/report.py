"""``flower-mcepl report``: a study as one HTML page."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.studies.sources import read_source


def report(
    source: Annotated[
        Path, typer.Argument(help="A study's folder, a run record, or a STUDY.toml.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write (default: report.html in the study's folder or record)."
        ),
    ] = None,
) -> None:
    """Write a study, or one run, as one HTML page.

    The page opens from disk in any browser, and can be mailed as it is: pictures are
    inside, and it loads nothing. It holds the table of `compare`, the pictures of
    `plot`, the study file, settings and versions, and what each run's agents reached.
    Needs the extra "report" (matplotlib).

    A folder holds a study file's text if `flower-mcepl run` has made it; given
    STUDY.toml itself, the page is of the finished runs of the study as it is now.

    \b
    Examples:
      flower-mcepl report runs/ablation
      flower-mcepl report examples/paper/2-ablation.toml --out ablation.html
      flower-mcepl report runs/20260131-141500-ring
    """  # noqa: D301 (click's sign for lines that stay as they are)
    from flower_mcepl.report.page.report_page import report_page  # loads torch

    records = read_source(source)
    target = records.folder / "report.html" if out is None else out
    page = report_page(records)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", newline="\n")
    sys.stdout.write(f"{target}\n")
