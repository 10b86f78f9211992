"""Agents of the quickstart's digits with the recipe, for benchmarks of whole runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flower_mcepl import AgentData, shared_module
from flower_mcepl.agents import make_agent
from flower_mcepl.data import DataSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

RECIPE: dict[str, Any] = {
    **{"score-form": "magnitude", "score-gradient": "normalized", "score-lr": 0.002},
    **{"momentum": 0.9, "weight-decay": 0.0, "finetune-lr": 0.0},
    **{"weight-init": "signed-constant", "first-mask": "scores", "fusion-strength": 3.0},
    **{"share": "layers.0.*, layers.4.*", "retention-conv": "0.5", "retention-linear": 0.5},
}


def make_fleet(
    num_agents: int, *, data: Mapping[str, Any], keys: Mapping[str, Any], seed: int
) -> list[Any]:
    """Agents of MCE-PL; ``data`` divides the digits among them."""
    return [_agent(i, num_agents, data=data, keys=keys, seed=seed) for i in range(num_agents)]


def _agent(
    index: int, num_agents: int, *, data: Mapping[str, Any], keys: Mapping[str, Any], seed: int
) -> Any:
    from mcepl_quickstart.task import load_data, model_fn

    context: Any = SimpleNamespace(run_config=data, node_config={})
    settings = DataSettings.from_run_config(data)
    train, _, test = load_data(index, num_agents=num_agents, settings=settings, seed=seed)
    return make_agent(
        "mcepl",
        index,
        shared_module(lambda: model_fn(context), seed=seed),
        AgentData.of(train, test, agent=index),
        keys,
        seed=seed,
    )
