"""Checks of one agent before a run: settings, graph, data, weights, cost of a round."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import CLASS_FACTS, Agent, find_algorithm
from flower_mcepl.config.checks import closest
from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.doctor.frozen import check_frozen
from flower_mcepl.doctor.machine import existing
from flower_mcepl.doctor.own_client import examine_own
from flower_mcepl.doctor.pace import check_pace
from flower_mcepl.doctor.personal_file import check_personal_model
from flower_mcepl.doctor.restart import check_restart
from flower_mcepl.doctor.trial import Trial, try_rounds
from flower_mcepl.errors import ConfigError, first_line
from flower_mcepl.launch.plan import flat
from flower_mcepl.record.values import human_bytes
from flower_mcepl.runs.settings import DeviceSettings, RunSettings, read_device
from flower_mcepl.runs.store import KEPT
from flower_mcepl.streams import torch_threads
from flower_mcepl.studies.engines import builder_of_node
from flower_mcepl.studies.flower_app import FlowerApp, read_app
from flower_mcepl.studies.own_client import own_client
from flower_mcepl.topology import Topology

_SETTINGS = "Correct it in --run-config, or in [tool.flwr.app.config] of the app's pyproject.toml."
_APP = (
    "Mend the app's model and data functions, or what they read on this machine; a device's own "
    "settings go into --node-config."
)


@dataclass(frozen=True)
class AppRun:
    """A run of an app, on the device with a certain node config."""

    app: FlowerApp
    config: Mapping[str, Any]  # the run config as Flower would hand it out
    node_config: Mapping[str, Any]
    settings: RunSettings

    @property
    def agent(self) -> int:
        """Number of the agent that the device plays."""
        return int(self.node_config["partition-id"])


def examine_run(
    folder: Path, run_config: Mapping[str, Any], node_config: Mapping[str, Any], *, alone: bool
) -> Iterator[Finding]:
    """Check one agent of a run; what builds on a failed check is left out.

    Parameters
    ----------
    folder : Path
        The app.
    run_config : mapping
        Settings over those of the app.
    node_config : mapping
        The device's.
    alone : bool
        Whether this is all of the node config, as on a device; in simulation Flower
        adds ``num-partitions``.
    """
    with Examination("run-config", remedy=_SETTINGS) as check:
        app, config = _configured(folder, run_config)
    if check.failed:
        yield check.finding
        return
    own = None
    with Examination("client-app", remedy=_APP) as client:
        own = own_client(app)
        client.ok(f"{app.client} was imported")
    if own is not None:
        yield from examine_own(app, own, node_config)
        return
    with Examination("run-config", remedy=_SETTINGS) as check:
        run = _read(app, config, node_config, alone=alone)
        check.ok(
            _run_line(run),
            agent=run.agent,
            run_config=dict(run.config),
            node_config=dict(run.node_config),
        )
    yield check.finding
    if check.failed:
        return
    with Examination("graph", remedy="Correct topology and num-agents.") as check:
        graph = run.settings.graph()
        _judge_graph(check, run, graph)
    yield check.finding
    if check.failed:
        return
    yield client.finding
    if not client.failed:
        yield from _examine_agent(run, graph)


def _configured(folder: Path, run_config: Mapping[str, Any]) -> tuple[FlowerApp, dict[str, Any]]:
    """App, and its run config as Flower would hand it out."""
    app, given = read_app(folder.resolve()), flat(run_config)
    for key in given:
        if key not in app.config:
            raise ConfigError(f"{key!r} is not in the app's config. {closest(key, app.config)}")
    return app, {**app.config, **given}


def _read(
    app: FlowerApp, config: dict[str, Any], node_config: Mapping[str, Any], *, alone: bool
) -> AppRun:
    settings = RunSettings.from_run_config(config, app_keys=app.config)
    read_device(config, node_config)
    agent = node_config.get("partition-id")
    if type(agent) is not int or not 0 <= agent < settings.num_agents:
        raise ConfigError(
            f"partition-id is a number from 0 to {settings.num_agents - 1} (num-agents - 1); got "
            f"{agent!r}. Give each device one of its own, or raise num-agents."
        )
    added = {} if alone else {"num-partitions": settings.num_agents}
    return AppRun(app, config, {**added, **node_config}, settings)


def _run_line(run: AppRun) -> str:
    settings = run.settings
    return (
        f"{run.app.name}: {settings.algorithm}, agent {run.agent} of {settings.num_agents}, "
        f"{settings.num_rounds} rounds, seed {settings.seed}"
    )


def _judge_graph(check: Examination, run: AppRun, graph: Topology) -> None:
    if find_algorithm(run.settings.algorithm).agent.server_based:
        check.ok(f"none: agents of {run.settings.algorithm} hear a server")
        return
    heard, hearing = graph.in_neighbors(run.agent, round=1), graph.out_neighbors(run.agent, round=1)
    connected = _is_connected(graph, run.settings.num_rounds)
    degree = f"{len(heard)}" if heard == hearing else f"{len(heard)} in, {len(hearing)} out"
    state = f"{graph.describe()}; degree of agent {run.agent}: {degree}"
    values = {
        "connected": connected,
        "in_degree": len(heard),
        "out_degree": len(hearing),
        "neighbors": list(heard),
    }
    if connected:
        check.ok(state, **values)
    else:
        remedy = (
            "Agents of separate parts never learn from each other: add links, or change topology "
            "or seed."
        )
        check.warn(state, remedy, **values)


def _is_connected(graph: Topology, num_rounds: int) -> bool:
    """Whether everyone reaches everyone, over the links of all rounds so far."""
    if not graph.time_varying:
        return graph.is_connected()
    links: set[tuple[int, int]] = set()
    for number in range(1, min(num_rounds, graph.num_agents) + 1):
        links |= set(graph.links(round=number))
        if Topology.from_edges(links, num_agents=graph.num_agents, directed=True).is_connected():
            return True
    return False


def _examine_agent(run: AppRun, graph: Topology) -> Iterator[Finding]:
    device = read_device(run.config, run.node_config)
    with contextlib.ExitStack() as held:
        with Examination("agent", remedy=_APP) as check:
            rebuild = held.enter_context(builder_of_node(run.app, run.config, run.node_config))
            agent = rebuild()
            facts = agent.describe()
            check.ok(
                f"agent {agent.index} was built, algorithm {agent.algorithm}",
                algorithm=agent.algorithm,
            )
        yield check.finding
        if check.failed:
            return
        yield _data(facts, device)
        yield _weights(facts)
        yield from check_frozen(facts)
        yield from check_pace(agent, threads=device.threads)
        yield check_personal_model(agent, facts)
        heard = () if agent.server_based else graph.in_neighbors(run.agent, round=1)
        with Examination("local-step", remedy=_APP) as check:
            with torch_threads(device.threads):
                trial = try_rounds(agent, heard, run.settings)
            _tell_time(check, trial, agent, device)
        yield check.finding
        if check.failed:
            return
        with torch_threads(device.threads):
            restart = check_restart(agent, rebuild, heard, trial=trial, options=run.settings)
        yield restart
        yield _evaluation(trial)
        yield _frames(trial)
        yield _state(trial, device, len(heard), server=agent.server_based)
        yield _traffic(trial, len(heard), server=agent.server_based)


def _data(facts: Mapping[str, Any], device: DeviceSettings) -> Finding:
    with Examination("data", remedy=_APP) as check:
        sizes = {
            key: value
            for key, value in facts.items()
            if key.startswith("num-") and key.endswith("examples")
        }
        secret = not device.tell_classes
        classes = _classes(facts, secret=secret)
        values = {
            key.replace("-", "_"): facts[key]
            for key in (*sizes, *(() if secret else CLASS_FACTS))
            if key in facts
        }
        check.ok(f"{_sizes(sizes)}; {classes}" if sizes else "the agent does not tell", **values)
    return check.finding


def _classes(facts: Mapping[str, Any], *, secret: bool) -> str:
    if secret:
        return "its classes stay secret (tell-classes)"
    if "classes" in facts:
        return f"classes {facts['classes']}"
    return "its targets are no classes, or not counted at little cost"


def _sizes(sizes: Mapping[str, int]) -> str:
    names = {"num-examples": "training"}
    return ", ".join(
        f"{count} {names.get(key, key.split('-')[1])} examples" for key, count in sizes.items()
    )


_WEIGHTS = "fingerprint num-weights kept-weights retention depth first-mask prior".split()


def _weights(facts: Mapping[str, Any]) -> Finding:
    with Examination("weights", remedy=_APP) as check:
        values = {key.replace("-", "_"): facts[key] for key in _WEIGHTS if key in facts}
        parts = [f"fingerprint {facts['fingerprint']} (the same on all devices of a run)"]
        if "num-weights" in facts:
            parts.append(f"{facts['num-weights']:,} weights")
        if "kept-weights" in facts:
            parts.append(f"{facts['kept-weights']:,} kept")
        if "retention" in facts:
            parts.append(f"retention {facts['retention']}")
        if "depth" in facts:
            parts.append(f"depth {facts['depth']} of {len(facts['weights-by-depth'])} stages")
        check.ok(", ".join(parts), **values)
    return check.finding


def _tell_time(check: Examination, trial: Trial, agent: Agent, device: DeviceSettings) -> None:
    where = f"{getattr(agent, 'device', 'cpu')}, threads = {device.threads}"
    median = f"median of {len(trial.seconds)} rounds after a warm-up"
    measured = f"measured now on this machine: {where}, {median}"
    values = {"train_seconds": trial.train_seconds, "rounds": len(trial.seconds), "device": where}
    if trial.steps is None:
        check.ok(
            f"{_seconds(trial.train_seconds)} of training a round ({measured})",
            **values,
            step_seconds=None,
        )
        return
    step = trial.train_seconds / trial.steps
    check.ok(
        f"{_seconds(step)} a local step, {trial.steps} a round ({measured})",
        **values,
        step_seconds=step,
        steps=trial.steps,
    )


def _evaluation(trial: Trial) -> Finding:
    with Examination("evaluation", remedy=_APP) as check:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in trial.evaluation.items())
        if trial.evaluation_error:
            check.warn(
                f"{first_line(trial.evaluation_error)} A run trains all the same, but its agents "
                "stay without an evaluation.",
                _APP,
            )
        elif not trial.evaluation.keys() - {"num-examples", "density"}:
            check.ok("nothing is evaluated", **trial.evaluation)
        else:
            check.ok(f"{shown}, after the rounds above", **trial.evaluation)
    return check.finding


def _frames(trial: Trial) -> Finding:
    with Examination("frame", remedy=_APP) as check:
        if not trial.whole_bytes:
            check.ok("none: this algorithm sends nothing", whole_bytes=0, delta_bytes=0)
        else:
            whole, later = human_bytes(trial.whole_bytes), human_bytes(trial.later_bytes)
            last = trial.rounds
            check.ok(
                f"{whole} the first, whole one; {later} a later one (median of rounds 2 to "
                f"{last}, tried alone)",
                whole_bytes=trial.whole_bytes,
                delta_bytes=trial.later_bytes,
            )
    return check.finding


def _state(trial: Trial, device: DeviceSettings, neighbors: int, *, server: bool) -> Finding:
    """Compare what the agent's states take at most with what is free where they go."""
    with Examination("state", remedy=f"Choose another state-dir. {_APP}") as check:
        size, folder = trial.state_bytes(neighbors), device.state_folder()
        most = size * (KEPT * device.state_runs + 1)  # one more while it is written
        values = {"state_bytes": size, "most_bytes": most}
        held = "without what it holds of the server" if server else f"with {neighbors} neighbors"
        state = f"up to {human_bytes(size)} after a round, {held}"
        if folder is None:
            check.ok(f"{state}, in Flower's Context", **values)
            return check.finding
        free = shutil.disk_usage(existing(folder)).free
        state += (
            f", at most {human_bytes(most)} for {device.state_runs} runs; {human_bytes(free)} free"
        )
        if most > free:
            check.fail(
                state,
                "Free some, lower state-runs, or choose a state-dir on a larger disk.",
                **values,
            )
        else:
            check.ok(state, **values)
    return check.finding


def _traffic(trial: Trial, neighbors: int, *, server: bool) -> Finding:
    with Examination("traffic", remedy=_APP) as check:
        up = trial.later_bytes
        if server:
            check.ok(
                f"{human_bytes(up)} up a round; down what the server sends (not tried)", up_bytes=up
            )
        else:
            check.ok(
                f"about {human_bytes(up)} up and {human_bytes(neighbors * up)} down a round, if "
                f"its {neighbors} neighbors send as much as it does; "
                f"{human_bytes(trial.whole_bytes)} and "
                f"{human_bytes(neighbors * trial.whole_bytes)} in the first. Whole frames come "
                "now and then, too",
                up_bytes=up,
                down_bytes=neighbors * up,
                first_up_bytes=trial.whole_bytes,
                first_down_bytes=neighbors * trial.whole_bytes,
            )
    return check.finding


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
