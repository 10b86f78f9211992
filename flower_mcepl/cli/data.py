"""``flower-mcepl data``: who would hold what in a run."""

from pathlib import Path
from typing import Annotated

import typer

from flower_mcepl.cli.wide import print_holdings, print_sizes, wide_console
from flower_mcepl.config.checks import closest
from flower_mcepl.errors import ConfigError
from flower_mcepl.launch.plan import flat, parse_run_config
from flower_mcepl.report.plots.holdings import holdings_of
from flower_mcepl.studies.flower_app import read_app


def data(
    app: Annotated[
        Path, typer.Argument(help="Folder of a Flower app, the one with its pyproject.toml.")
    ],
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="Override settings of the app, as in `flwr run`; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help='Draw it into this PNG, too (needs the extra "report").')
    ] = None,
) -> None:
    """Show who holds which classes, before any run.

    Nothing is trained or sent. The app's agents are built as for a run, so an
    impossible division is told here, too. Classes are counted where an app's labels lie
    in tensors, or in a column of its data set; without classes, as in a regression, the
    sizes of the splits are shown.

    \b
    In the apps of examples/, the key partition says how the data are divided:
    \b
      iid                        equal parts, drawn at random
      pathological:classes=3     three classes an agent; assignment=random,
                                 deterministic or first-deterministic
      dirichlet:alpha=0.3        each class in shares drawn from Dirichlet(0.3);
                                 min-size=10: examples an agent has at least
      shards:per-agent=2         sorted by class and cut into equal shards,
                                 two for each agent
      linear                     unequal sizes: agent i gets i + 1 parts;
      square, exponential        the square of that, or its exponential
    \b
    and train-fraction, validation-fraction, test-fraction and stratify how each
    agent divides its part.

    \b
    Examples:
      flower-mcepl data examples/quickstart
      flower-mcepl data examples/quickstart --out who.png \\
        --run-config 'partition="dirichlet:alpha=0.3" num-agents=20'
    """  # noqa: D301 (click's sign for lines that stay as they are)
    # these load torch
    from flower_mcepl.studies.engines import introductions
    from flower_mcepl.studies.own_client import own_client

    flower_app = read_app(app.resolve())
    settings = flat(parse_run_config(run_config or []))
    for key in settings:
        if key not in flower_app.config:
            known = closest(key, flower_app.config)
            raise ConfigError(f"{key!r} is not in the app's config. {known}")
    if (own := own_client(flower_app)) is not None:
        raise ConfigError(
            f"{flower_app.client} of {flower_app.name} is {own.what}: its data are not known "
            "beforehand, as its own functions read them. A run tells how many examples each "
            "agent has: flower-mcepl show RUN."
        )
    entries = introductions(flower_app, {**flower_app.config, **settings})
    holdings = holdings_of(entries)
    if holdings is None:
        if out is not None:
            raise ConfigError(
                f"--out draws classes, and the data of {flower_app.name} tell none at little "
                "cost. Leave it out for the sizes alone."
            )
        print_sizes(entries)
        return
    console = wide_console()
    print_holdings(holdings, console)
    if out is not None:
        from flower_mcepl.report.plots.holding_charts import draw_holdings

        picture = draw_holdings(holdings)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
        console.print(f"picture: {out}")
