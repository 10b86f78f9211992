"""``flower-mcepl tensorboard``: run records as TensorBoard scalars."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.errors import ConfigError
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


def _names(folders: Sequence[Path]) -> list[str]:
    """Name of each folder, with as many of its parents as tell it from the others.

    Raises
    ------
    ConfigError
        If none does, as with one folder given twice.
    """
    parts = [1] * len(folders)
    while True:
        names = ["-".join(folder.parts[-n:]) for folder, n in zip(folders, parts, strict=True)]
        twins = [names.count(name) > 1 for name in names]
        if not any(twins):
            return names
        longer = [
            min(n + twin, len(folder.parts) - 1)  # the root is no name
            for folder, n, twin in zip(folders, parts, twins, strict=True)
        ]
        if longer == parts:
            same = names[twins.index(True)]
            who = " and ".join(
                str(folder) for folder, name in zip(folders, names, strict=True) if name == same
            )
            raise ConfigError(
                f"each record needs a folder of its own in --out; {same} would be that of {who}. "
                "Name each record once, or give them another --out, one by one."
            )
        parts = longer
