"""All commands of ``flower-mcepl`` together.

Each imports what loads torch when it is called, so that the others are at once there.
"""

import sys
from importlib import metadata
from typing import Annotated

import typer

from flower_mcepl.cli.compare import compare
from flower_mcepl.cli.data import data
from flower_mcepl.cli.doctor import doctor
from flower_mcepl.cli.export import export
from flower_mcepl.cli.frame import frame
from flower_mcepl.cli.plain_help import PlainCommand
from flower_mcepl.cli.plot import plot
from flower_mcepl.cli.predict import predict
from flower_mcepl.cli.report import report
from flower_mcepl.cli.run import run
from flower_mcepl.cli.show import show
from flower_mcepl.cli.tensorboard import tensorboard
from flower_mcepl.errors import FlowerMceplError, visible
from flower_mcepl.terminal import spell_unknown

app = typer.Typer(
    name="flower-mcepl",
    help="Personal models by mask gossip on Flower: do many runs, compare and draw them, look at "
    "what they sent.",
    epilog="A single run is started with `flwr run APP` or `python -m flower_mcepl.launch APP`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
_COMMANDS = (run, compare, data, doctor, plot, report, show, frame, export, predict, tensorboard)
for _command in _COMMANDS:
    app.command(cls=PlainCommand)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flower-mcepl {metadata.version('flower-mcepl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that are of no command."""


def main() -> None:
    """Run the command line; a wrong input ends it with one line and exit code 1."""
    spell_unknown()
    try:
        app()
    except (FlowerMceplError, OSError) as error:
        sys.stderr.write(f"error: {visible(str(error), lines=True)}\n")
        sys.exit(1)
