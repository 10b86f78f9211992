"""``flower-mcepl tensorboard``: run records as TensorBoard scalars."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.report.tensorboard import ScalarWriter
from flower_mcepl.studies import find_records


def tensorboard(
    records: Annotated[
        list[Path], typer.Argument(help="Run records, or folders of them such as a study's.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the event files, one folder a record below it.")
    ] = Path("tensorboard"),
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Go on while a run goes on: add its new rounds until all have ended."
        ),
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks with --follow.")
    ] = 5.0,
) -> None:
    """Write TensorBoard scalars of a run, by round.

    Needs the extra "tensorboard". Look at them with `tensorboard --logdir tensorboard`.

    \b
    Examples:
      flower-mcepl tensorboard runs/paper/2-ablation
      flower-mcepl tensorboard runs/20260131-141500-ring --follow
    """  # noqa: D301 (click's sign for lines that stay as they are)
    runs = find_records(records)
    folders = [run.path for run in runs]
    for run in runs:
        if run.damage:
            sys.stderr.write(f"WARNING: {run.path.name}: {run.damage}\n")
    writers = [
        ScalarWriter(folder, out / name)
        for folder, name in zip(folders, _names(folders), strict=True)
    ]
    try:
        going = writers
        while True:
            going = [writer for writer in going if writer.update().summary is None]
            if not follow or not going:
                break
            time.sleep(every)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what is written stays\n")
    finally:
        for writer in writers:
            writer.close()
    sys.stdout.write(f"{len(writers)} record(s) under {out}: tensorboard --logdir {out}\n")


def _names(folders: list[Path]) -> list[str]:
    """Name of each folder, its parent's in front where two are called the same."""
    names = [folder.name for folder in folders]
    return [
        f"{folder.parent.name}-{folder.name}" if names.count(folder.name) > 1 else folder.name
        for folder in folders
    ]
