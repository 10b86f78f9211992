"""Agents that are evaluated on validation splits, so that a run may choose by them."""

from typing import Any

from flower_mcepl import Agent, AgentData, Topology, shared_module
from flower_mcepl.agents import find_algorithm, make_agent
from tests.oracles.baselines import blobs, run_config, server_of, two_layers

SEED = 7


def chooser_of(algorithm: str, index: int, **settings: Any) -> Agent:
    """One agent of a few overlapping examples, evaluated on its validation split."""
    data = AgentData.of(
        blobs(index, size=6),
        blobs(1000 + index),
        agent=index,
        validation=blobs(2000 + index, size=30),
        evaluate_on="validation",
    )
    module = shared_module(two_layers, seed=SEED)
    return make_agent(algorithm, index, module, data, run_config(settings), seed=SEED)


def choosers(algorithm: str = "mcepl", size: int = 4, **settings: Any) -> dict[str, Any]:
    """What `simulate` takes of a fleet: agents, and a graph or a server."""
    agents = [chooser_of(algorithm, index, **settings) for index in range(size)]
    if find_algorithm(algorithm).server is None:
        return {"agents": agents, "topology": Topology.ring(size)}
    return {"agents": agents, "server": server_of(algorithm, size, **settings)}
