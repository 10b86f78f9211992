"""Small agents of every algorithm, and whole rounds of them without a wire."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl import Agent, AgentData, shared_module
from flower_mcepl.agents import make_agent, make_server
from tests.oracles.weights import Data, Weights

SEED = 7
RING = ((1, 3), (0, 2), (1, 3), (2, 0))  # neighbors of each agent
PAW = ((1, 2, 3), (0, 2), (0, 1), (0,))  # of degrees 3, 2, 2, 1
NAMES = {"w1": "0.weight", "b1": "0.bias", "w2": "2.weight", "b2": "2.bias"}
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def blobs(agent: int, *, size: int = 18) -> tuple[Tensor, Tensor]:
    """Three clouds of points in four dimensions, in the same places for all agents."""
    generator = torch.Generator().manual_seed(100 + agent)
    labels = torch.arange(size) % 3
    centers = 2 * torch.eye(4)[:3] - 0.5
    return centers[labels] + 0.6 * torch.randn(size, 4, generator=generator), labels


def agent_of(
    algorithm: str,
    index: int = 0,
    *,
    model_fn: Callable[[], nn.Module] = two_layers,
    seed: int = SEED,
    split: Callable[[int], tuple[Tensor, Tensor]] = blobs,
    **settings: Any,
) -> Any:
    """One agent, its settings as run-config keys with underscores; it takes all its
    data in one batch.
    """
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    return make_agent(
        algorithm, index, shared_module(model_fn, seed=seed), data, run_config(settings), seed=seed
    )


def run_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", "-"): value
        for name, value in {"batch_size": 24, "num_rounds": 500, **settings}.items()
    }


def server_of(
    algorithm: str,
    size: int = 4,
    *,
    model_fn: Callable[[], nn.Module] = two_layers,
    seed: int = SEED,
    **settings: Any,
) -> Any:
    """The server of a fleet from `agent_of` with the same settings."""
    settings.pop("split", None)
    return make_server(
        algorithm, shared_module(model_fn, seed=seed), size, run_config(settings), seed=seed
    )


def fleet_of(algorithm: str, size: int = 4, **settings: Any) -> list[Any]:
    return [agent_of(algorithm, index, **settings) for index in range(size)]


def play(
    agents: Sequence[Agent], neighbors: Sequence[Sequence[int]], *rounds: int
) -> list[dict[str, float]]:
    """Whole rounds as under `simulate`: everyone trains, everyone sends, everyone
    fuses.
    """
    metrics = []
    for round in rounds:
        metrics += [agent.train(round=round) for agent in agents]
        sent = [agent.outgoing() for agent in agents]
        for agent in agents:
            agent.fuse({j: sent[j] for j in neighbors[agent.index] if sent[j]}, round=round)
    return metrics


def serve(
    server: Any, agents: Sequence[Agent], *rounds: int, absent: Collection[int] = ()
) -> list[dict[str, float]]:
    """Whole rounds as under `simulate`: everyone trains, the server aggregates,
    everyone gets its part.

    Who is absent does nothing in these rounds.
    """
    metrics = []
    present = [agent for agent in agents if agent.index not in absent]
    for round in rounds:
        metrics += [agent.train(round=round) for agent in present]
        sent = {agent.index: agent.outgoing() for agent in present}
        sizes = {agent.index: agent.describe()["num-examples"] for agent in present}
        server.receive(sent, round=round, num_examples=sizes)
        for agent in present:
            agent.fuse({server.index: server.payload_for(agent.index, round=round)}, round=round)
    return metrics


def arrays(agent: Any) -> Weights:
    """The weights of a two-layer agent, for `slow_weights`."""
    return {
        short: agent.weights[name].detach().double().numpy().copy() for short, name in NAMES.items()
    }


def data_of(agents: Sequence[Agent]) -> list[Data]:
    return [tuple(part.numpy() for part in blobs(agent.index)) for agent in agents]


def assert_same(agents: Sequence[Any], expected: Sequence[Weights]) -> None:
    for agent, model in zip(agents, expected, strict=True):
        for short, value in arrays(agent).items():
            np.testing.assert_allclose(
                value, model[short], **CLOSE, err_msg=f"agent {agent.index}, {short}"
            )
