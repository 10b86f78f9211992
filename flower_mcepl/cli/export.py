"""``flower-mcepl export``: an agent's personal model as a file that runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flower_mcepl.cli.pixels import pixels_of
from flower_mcepl.cli.wide import wide_console
from flower_mcepl.errors import ConfigError
from flower_mcepl.launch.plan import app_settings
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.studies.chosen import BEST, LAST, STATES, config_of_test, node_of, restored_agent
from flower_mcepl.studies.flower_app import imported_client, read_app


def export(
    record: Annotated[Path, typer.Argument(help="A run record: the folder with config.json.")],
    agent: Annotated[int, typer.Option(min=0, help="Number of the agent.")],
    to: Annotated[Path, typer.Option(help="The file to write: .mask, .pt2 or .onnx.")],
    app: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run's Flower app (default: the one around the record, or this "
            "folder)."
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="The agent's last state, or the best that keep-best kept: last or best (default: "
            "best where there is one)."
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Keep filters that the mask has emptied in .pt2 and .onnx, too.",
        ),
    ] = False,
    mean: Annotated[
        str | None,
        typer.Option(
            help="For predict: what the app's data function subtracts from pixels in 0..1, one "
            "number or one a channel, separated by commas; goes into .mask."
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="For predict: what it then divides them by.")
    ] = None,
) -> None:
    """Write an agent's personal model as a file that runs.

    \b
      model.mask   the whole model in a bit a weight or less; flower_mcepl.load_personal
                   reads it, and flower-mcepl predict runs it
      model.pt2    a torch.export program, which torch.export.load reads
      model.onnx   ONNX, for onnxruntime and others (needs the extra "export")

    The agent is built from the app, as in the run, and gets the state that the run
    left. The model is evaluated on the agent's test split, and every file is read back
    and compared before it counts. Frozen weights that the run's seed does not draw
    again are stored in a .mask file: how many bytes they take is said. A .pt2 or .onnx
    is of the compact network: filters that the mask has emptied and inputs that nobody
    reads are gone, if the whole test split gets the same outputs.

    \b
    Examples:
      flower-mcepl export runs/20260131-141500-ring --agent 3 --to agent-3.mask
      flower-mcepl export runs/20260131-141500-ring --agent 3 --to agent-3.onnx \\
        --app examples/quickstart --state last
    """  # noqa: D301 (click's sign for lines that stay as they are)
    from flower_mcepl.personal.files import Exported, check_ending, export_model

    check_ending(to)
    if not to.parent.is_dir():
        raise ConfigError(f"the folder of {to} must be there. Make it, or name another.")
    replaces = to.exists()
    run = read_run(record)
    chosen = _checked_state(state) or (BEST if agent in run.best_agents else LAST)
    folder = _app_of(run, app)
    pixels = pixels_of(mean, std)
    console = wide_console()
    with restored_agent(run, folder, agent, state=chosen) as restored:
        metrics = restored.evaluate()
        named = _network(run, folder, agent)
        left = _round_of(run, agent, chosen)
        model = Exported(restored, left, metrics, named, whole=whole, pixels=pixels)
        for line in export_model(model, to):
            console.print(line)
    if replaces:
        console.print(f"it replaces the file that was there, {to}")
    value = metrics.get(run.metric.name)
    measured = "" if value is None else f", {run.metric.name} {value:.4f} on its test split"
    console.print(f"agent {agent}, {chosen} state{measured}")


def _checked_state(state: str | None) -> str | None:
    if state not in (None, *STATES):
        raise ConfigError(f"--state is {' or '.join(STATES)}; got {state!r}.")
    return state


def _round_of(run: Run, agent: int, state: str) -> int:
    if state == LAST:
        return run.num_rounds
    return int(next(row["round"] for row in run.best_states() if row["agent"] == agent))


def _app_of(run: Run, app: Path | None) -> Path:
    """Folder of the run's app: as given, or one that stands around the record."""
    if app is not None:
        return app.resolve()
    for folder in (*run.path.resolve().parents, Path.cwd()):
        try:
            app_settings(folder)
        except (ConfigError, OSError):
            continue
        return folder
    raise ConfigError(
        f"the agent is built from the run's app, and no folder around {run.path} is one. Name it: "
        "--app FOLDER, the one with its pyproject.toml."
    )


def _network(run: Run, app: Path, agent: int) -> dict[str, Any]:
    """Who builds the network, as a file can say it; empty: nobody with a name."""
    from flower_mcepl.personal import reference_to_app

    with imported_client(read_app(app)) as client:
        if client.model_fn is None:
            return {}
        return reference_to_app(client.model_fn, config_of_test(run), node_of(run, agent))
