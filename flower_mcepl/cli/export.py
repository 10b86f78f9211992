"""``flower-mcepl export``: an agent's personal model as a file that runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flower_mcepl.cli.pixels import pixels_of
from flower_mcepl.cli.wide import wide_console
from flower_mcepl.errors import ConfigError
from flower_mcepl.launch.plan import app_settings
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.studies.chosen import BEST, LAST, STATES, config_of_test, node_of, restored_agent
from flower_mcepl.studies.flower_app import imported_client, read_app

if TYPE_CHECKING:
    from flower_mcepl.agents import Agent

MASK, PROGRAM, ONNX = ".mask", ".pt2", ".onnx"
SIGNED_CONSTANT = "signed-constant"  # value of weight-init; its module loads torch


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
    write = _writers().get(to.suffix)
    if write is None:
        raise ConfigError(
            f"a model is exported to a file ending in {', '.join(_writers())}; got {to.name}. "
            "Name one."
        )
    if not to.parent.is_dir():
        raise ConfigError(f"the folder of {to} must be there. Make it, or name another.")
    run = read_run(record)
    chosen = _checked_state(state) or (BEST if agent in run.best_agents else LAST)
    folder = _app_of(run, app)
    pixels = pixels_of(mean, std)
    console = wide_console()
    with restored_agent(run, folder, agent, state=chosen) as restored:
        metrics = restored.evaluate()
        named = _network(run, folder, agent)
        model = Exported(restored, metrics, _round_of(run, agent, chosen), named, whole, pixels)
        for line in write(model, to):
            console.print(line)
    value = metrics.get(run.metric.name)
    measured = "" if value is None else f", {run.metric.name} {value:.4f} on its test split"
    console.print(f"agent {agent}, {chosen} state{measured}")


@dataclass(frozen=True)
class Exported:
    """A restored agent, and what is known of its model."""

    agent: "Agent"
    metrics: Mapping[str, float]
    round: int
    network: Mapping[str, Any]  # who builds it
    whole: bool
    pixels: Mapping[str, Any]  # how images become inputs; empty: nobody said


def _writers() -> dict[str, Callable[[Exported, Path], list[str]]]:
    return {MASK: _write_mask, PROGRAM: _write_graph, ONNX: _write_graph}


def _write_mask(model: Exported, to: Path) -> list[str]:
    from flower_mcepl.personal import read_personal, save_agent

    size = save_agent(
        model.agent,
        to,
        round=model.round,
        network=model.network,
        metrics=model.metrics,
        pixels=model.pixels,
    )
    file = read_personal(to)
    weights = sum(mask.numel() for mask in file.masks.values())
    whole = human_bytes(sum(x.numel() * x.element_size() for x in file.tensors.values()))
    lines = [f"{to}: {human_bytes(size)} for {weights:,} masked weights; without masks {whole}"]
    if file.stored:
        why = _why_stored(model.agent.parameters().get("weight_init"))
        lines.append(f"{human_bytes(file.stored)} of it are weights that are stored: {why}")
    if not model.network:
        lines.append(
            "its model function has no name that can be imported: load_personal needs one, "
            "load_personal(path, model_fn)"
        )
    return lines


def _why_stored(weight_init: object) -> str:
    if weight_init is None:
        return "the algorithm trains weights"
    if weight_init == SIGNED_CONSTANT:
        return "under its masks they are no signed constants any more"
    return (
        "the run's seed does not draw them again, as it does with PyTorch's own initialization and "
        'with weight-init = "signed-constant"'
    )


def _write_graph(model: Exported, to: Path) -> list[str]:
    from flower_mcepl.personal import compact_or_whole, personal_network
    from flower_mcepl.personal.exporting import export_onnx, export_program, tensor_batches

    batches = tensor_batches(_test_batches(model.agent))
    network, lines = personal_network(model.agent), []
    if not model.whole:
        network, line = compact_or_whole(network, batches)
        lines.append(line)
    write = export_onnx if to.suffix == ONNX else export_program
    agreed = write(network, to, batches)
    return [*lines, f"{to}: {human_bytes(to.stat().st_size)}; read back: {agreed}"]


def _test_batches(agent: "Agent") -> Any:
    data = getattr(agent, "data", None)
    if data is None:
        raise ConfigError(
            f"an exported graph is checked on the agent's test split, and agents of "
            f"{agent.algorithm} hold no data of their own. Export to .mask."
        )
    return data.test.evaluation_batches(batch_size=agent.config.eval_batch_size)  # type: ignore[attr-defined]


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
