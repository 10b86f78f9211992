"""States that a run left, restored to the agents of its app."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flower_mcepl.errors import ConfigError, RecordError
from flower_mcepl.record.reading import Run
from flower_mcepl.studies.flower_app import read_app

if TYPE_CHECKING:
    from flower_mcepl.agents import Agent

LAST, BEST = "last", "best"
STATES = (LAST, BEST)


def evaluate_best(run: Run, app: str | Path) -> dict[int, dict[str, float]]:
    """Metrics of each agent's best state on its test split, once the choice is made.

    Parameters
    ----------
    run : Run
        The record of a simulated run with ``keep-best``.
    app : str or Path
        Folder of its Flower app, whose ClientApp `make_client_app` made. The agents are
        built anew from it, with the run's settings.

    Raises
    ------
    RecordError
        If the record holds no best states.
    ConfigError
        If no agent can be built from the app.
    StateError
        If a state is not of these agents.
    """
    if not run.best_agents:
        raise _no_state(run, BEST)
    metrics = {}
    for agent in run.best_agents:
        with restored_agent(run, app, agent, state=BEST) as built:
            metrics[agent] = built.evaluate()
    return metrics


@contextlib.contextmanager
def restored_agent(run: Run, app: str | Path, agent: int, *, state: str) -> Iterator["Agent"]:
    """An agent of a run with its last or its best state, evaluated on its test split.

    Parameters
    ----------
    run : Run
        The record of a simulated run.
    app : str or Path
        Folder of its Flower app, whose ClientApp `make_client_app` made.
    agent : int
        The agent's number.
    state : str
        ``"last"``, or ``"best"`` of a run with ``keep-best``.

    Raises
    ------
    RecordError
        If the record holds no such state.
    ConfigError
        If the agent cannot be built from the app, or has other parameters than it had.
    StateError
        If the state is not of this agent.
    """
    # here, as who plans or compares runs loads no torch
    from flower_mcepl.agents import load_state
    from flower_mcepl.config.fields import read_fields
    from flower_mcepl.runs.settings import DeviceSettings
    from flower_mcepl.streams import torch_threads
    from flower_mcepl.studies.engines import agent_of_node

    files = run.best_agents if state == BEST else run.agents
    if agent not in files:
        raise _no_state(run, state, agent)
    config = config_of_test(run)
    threads = read_fields(DeviceSettings, config).threads
    node = node_of(run, agent)
    with agent_of_node(read_app(Path(app)), config, node) as built, torch_threads(threads):
        _check_parameters(run, built, app)
        built.restore(load_state(files[agent]))
        yield built


# A state says nothing of most parameters: scores are ranked by any retention, and the
# model would be another one.
def _check_parameters(run: Run, built: "Agent", app: str | Path) -> None:
    """Refuse an agent of other parameters than its record's."""
    from flower_mcepl.agents.handshake import PARAMETERS
    from flower_mcepl.runs.introductions import as_recorded, parameter_differences, shown

    recorded = run.handshakes.get(built.index, {}).get(PARAMETERS, {})
    now = as_recorded({PARAMETERS: built.parameters()})[PARAMETERS]
    for name, was, has in parameter_differences(recorded, now):
        raise ConfigError(
            f"a state is for an agent of the parameters that it was trained with; {name} of agent "
            f"{built.index} was {shown(was)} in {run.path}, and {app} builds it with {shown(has)}. "
            "Use the app as it was for the run."
        )


def config_of_test(run: Run) -> dict[str, Any]:
    """Run config of a run, but on the test splits, as all choices are made."""
    return {**run.settings, "evaluate-on": "test", "keep-best": False, "patience": 0}


def node_of(run: Run, agent: int) -> dict[str, Any]:
    """Node config of an agent's SuperNode."""
    return {"partition-id": agent, "num-partitions": run.num_agents}


def _no_state(run: Run, state: str, agent: int | None = None) -> RecordError:
    files = run.best_agents if state == BEST else run.agents
    if agent is not None and files:
        known = ", ".join(map(str, files))
        return RecordError(
            f"{run.path} has {state} states of the agents {known}; got {agent}. Name one of them."
        )
    if state == BEST:
        return RecordError(
            f"best states are kept by a simulated run with keep-best = true; {run.path} has none. "
            "On devices they stay with the agents."
        )
    return RecordError(
        f"last states are left by a simulated run that has ended; {run.path} has none. On devices "
        "they stay with the agents."
    )
