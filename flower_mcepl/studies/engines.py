"""Engines of a run: Flower's simulation, this process to the same bits, or stacks."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flower_mcepl.agents import Agent
from flower_mcepl.agents.registry import find_algorithm, make_server
from flower_mcepl.agents.server import Server
from flower_mcepl.config.engines import BATCHED
from flower_mcepl.config.fields import read_fields
from flower_mcepl.errors import ConfigError, FlowerMceplError, RecordError
from flower_mcepl.launch import run_app
from flower_mcepl.launch.logs import excerpt
from flower_mcepl.launch.restarts import RESUME
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.settings import DeviceSettings, RunSettings, read_device
from flower_mcepl.runs.simulation import simulate
from flower_mcepl.streams import torch_threads
from flower_mcepl.studies.flower_app import (
    FLOWER,
    FlowerApp,
    imported_client,
    refuse_export,
    refuse_schedule,
)

if TYPE_CHECKING:
    from flwr.app import Context

    from flower_mcepl.clients.app import AgentApp

Log = Callable[[str], None]
Engine = Callable[[FlowerApp, Mapping[str, Any], Path, Log, Path | None], Path]
"""``engine(app, config, folder, log, resume)`` returns the run record that it leaves.

``resume`` is the record of a run that broke off, below the same folder.
"""

# a client keeps modules and data for as long as the run's number stays
_run_ids = itertools.count(1)


def run_in_flower(
    app: FlowerApp,
    config: Mapping[str, Any],
    folder: Path,
    log: Log,
    resume: Path | None = None,
) -> Path:
    """Run the app in a private SuperLink.

    Raises
    ------
    FlowerMceplError
        If the run does not end well, or leaves no record.
    """
    defaults = {(key, type(value), value) for key, value in app.config.items()}
    set_here = {
        key: value for key, value in config.items() if (key, type(value), value) not in defaults
    }
    outcome = run_app(
        app.folder,
        run_config={**set_here, "record-dir": folder, **({RESUME: resume} if resume else {})},
        on_line=log,
    )
    if not outcome.ok:
        raise FlowerMceplError(f"{outcome.status}: {outcome.details or excerpt(outcome.log)}")
    # an attempt that lost its simulation before the first checkpoint leaves one, too
    records = [path for path in folder.iterdir() if read_run(path).finished]
    if len(records) != 1:
        raise RecordError(
            f"a run leaves one record in its record-dir; {app.folder} left {len(records)}. Its "
            "ServerApp must build its strategy with from_run_config."
        )
    return records[0]


def run_in_process(
    app: FlowerApp,
    config: Mapping[str, Any],
    folder: Path,
    log: Log,
    resume: Path | None = None,
    *,
    engine: str = "",
) -> Path:
    """Run the app's agents with `simulate`, without Flower's messages.

    ``engine`` is used in place of the one in the run config.

    Raises
    ------
    FlowerMceplError
        If the agents cannot be built, or the run fails.
    """
    settings = RunSettings.from_run_config(config, app_keys=app.config)
    device = read_fields(DeviceSettings, config)
    refuse_export(config)
    refuse_schedule(config)
    contexts = _contexts(config, settings.num_agents)
    path = resume or folder / app.name
    record = None
    if resume is None:
        record = RunRecord.create(
            name=app.name,
            path=path,
            config={"run_config": dict(config), "seed": settings.seed},
            with_frames=settings.keep_frames,
        )
    with imported_client(app) as client:
        with torch_threads(device.threads):
            agents = [client.agent_fn(context) for context in contexts]
            server = _make_server(app, client, contexts[0])
        simulate(
            agents,
            settings.graph() if server is None else None,
            server=server,
            num_rounds=settings.num_rounds,
            evaluate_every=settings.evaluate_every,
            max_staleness=settings.max_staleness,
            key_interval=settings.key_interval,
            age_decay=settings.age_decay,
            agents_per_node=settings.agents_per_node,
            keep_best=settings.keep_best,
            patience=settings.patience,
            threads=device.threads,
            engine=engine or settings.engine,
            tell_classes=device.tell_classes,
            record=record,
            checkpoint_every=settings.checkpoint_every,
            resume=resume,
            decisions=read_run(device.decisions).decisions if device.decisions else None,
            log=log,
        )
    return path


def introductions(app: FlowerApp, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Handshakes of a run's agents (`Agent.describe`), without a run.

    Raises
    ------
    FlowerMceplError
        If the settings are wrong, or the agents cannot be built.
    """
    settings = RunSettings.from_run_config(config, app_keys=app.config)
    with imported_client(app) as client, torch_threads(read_fields(DeviceSettings, config).threads):
        return [
            client.agent_fn(context).describe()
            for context in _contexts(config, settings.num_agents)
        ]


@contextlib.contextmanager
def agent_of_node(
    app: FlowerApp, config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> Iterator[Agent]:
    """Agent that a SuperNode with this node config would play.

    Raises
    ------
    ConfigError
        If the settings are wrong, or the ClientApp is not made by `make_client_app` or
        `make_agent_app`.
    """
    with builder_of_node(app, config, node_config) as build:
        yield build()


@contextlib.contextmanager
def builder_of_node(
    app: FlowerApp, config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> Iterator[Callable[[], Agent]]:
    """Function that builds `agent_of_node`, with its data, anew at each call."""
    settings = read_device(config, node_config)
    with imported_client(app) as client:

        def build() -> Agent:
            with torch_threads(settings.threads):
                return client.agent_fn(_context(next(_run_ids), config, node_config))

        yield build


def _contexts(config: Mapping[str, Any], num_agents: int) -> "list[Context]":
    """Return a context for each agent of a new run."""
    number = next(_run_ids)
    return [
        _context(number, config, {"partition-id": agent, "num-partitions": num_agents})
        for agent in range(num_agents)
    ]


def _context(number: int, config: Mapping[str, Any], node_config: Mapping[str, Any]) -> "Context":
    from flwr.app import Context, RecordDict

    node = node_config.get("partition-id", 0)
    return Context(
        run_id=number,
        node_id=node,
        state=RecordDict(),
        run_config=dict(config),
        node_config=dict(node_config),
    )


def _make_server(app: FlowerApp, client: "AgentApp", context: "Context") -> Server | None:
    """Server of a server-based algorithm, from its agents' network."""
    settings = RunSettings.from_run_config(context.run_config, app_keys=app.config)
    if find_algorithm(settings.algorithm).server is None:
        return None
    if client.module_fn is None:
        raise ConfigError(
            f"an in-process run of {settings.algorithm} needs the network of its server; the "
            f"ClientApp {app.client} does not tell it. Make it with make_client_app, or give "
            "make_agent_app a module_fn."
        )
    module = client.module_fn(context)
    return make_server(
        settings.algorithm, module, settings.num_agents, context.run_config, seed=settings.seed
    )


ENGINES: dict[str, Engine] = {
    FLOWER: run_in_flower,
    "in-process": run_in_process,
    BATCHED: partial(run_in_process, engine=BATCHED),
}
