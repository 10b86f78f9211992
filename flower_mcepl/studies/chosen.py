"""Evaluation of states that a run chose on validation splits: on the test splits."""

from pathlib import Path

from flower_mcepl.errors import RecordError
from flower_mcepl.record.reading import Run
from flower_mcepl.studies.flower_app import read_app


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
    # here, as who plans or compares runs loads no torch
    from flower_mcepl.agents import load_state
    from flower_mcepl.config.fields import read_fields
    from flower_mcepl.runs.settings import DeviceSettings
    from flower_mcepl.streams import torch_threads
    from flower_mcepl.studies.engines import agent_of_node

    if not run.best_agents:
        raise RecordError(
            f"best states are kept by a simulated run with keep-best = true; {run.path} has none. "
            "On devices they stay with the agents."
        )
    config = {**run.settings, "evaluate-on": "test", "keep-best": False, "patience": 0}
    threads = read_fields(DeviceSettings, config).threads
    metrics = {}
    for agent, state in run.best_agents.items():
        node = {"partition-id": agent, "num-partitions": run.num_agents}
        with agent_of_node(read_app(Path(app)), config, node) as built, torch_threads(threads):
            built.restore(load_state(state))
            metrics[agent] = built.evaluate()
    return metrics
