"""The frozen reference trajectory (tests/vectors), once by the agents' own verbs and
once through `simulate`.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flower_mcepl import MceplAgent, Topology, simulate
from flower_mcepl.exchange.turn import Reply
from tests.fleet.agents import Reader, same_tensors
from tests.oracles.reference import (
    LAYERS,
    NUM_AGENTS,
    NUM_ROUNDS,
    VECTORS,
    FrozenBatches,
    recorded_masks,
    reference_agent,
)

FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}


def recorded(key: str) -> Tensor:
    return torch.from_numpy(VECTORS[key])


def assert_as_after(round: int, agent: MceplAgent) -> None:
    """Scores, mask and logits of the agent are those recorded after the exchange of
    ``round``.
    """
    for layer in LAYERS:
        assert_close(
            agent.model.scores[f"{layer}.weight"].detach(),
            recorded(f"scores.{round}.{agent.index}.{layer}"),
            **FLOAT32,
        )
    assert same_tensors(agent.model.masks(), recorded_masks("mask", round, agent.index))
    inputs, _ = FrozenBatches(agent.index).batch(round)
    with torch.no_grad():
        logits = agent.model.bake()(inputs)
    assert_close(logits, recorded(f"logits.{round}.{agent.index}"), **FLOAT32)


def assert_loss(round: int, agent: int, loss: float) -> None:
    assert loss == pytest.approx(float(VECTORS[f"loss.{round}.{agent}"]), rel=1e-5)


def test_the_recorded_graph_is_a_ring() -> None:
    ring = Topology.ring(NUM_AGENTS)
    neighbors = [tuple(np.flatnonzero(row)) for row in VECTORS["adjacency"]]
    assert neighbors == [ring.in_neighbors(agent) for agent in range(NUM_AGENTS)]


def test_agents_alone_reproduce_the_trajectory() -> None:
    agents = [reference_agent(index) for index in range(NUM_AGENTS)]
    ring = Topology.ring(NUM_AGENTS)
    for round in range(1, NUM_ROUNDS + 1):
        sent = []
        for agent in agents:
            assert_loss(round, agent.index, agent.train(round=round)["train-loss"])
            sent.append(agent.outgoing())
            assert same_tensors(sent[-1], recorded_masks("sent", round, agent.index))
        for agent in agents:
            agent.fuse({j: sent[j] for j in ring.in_neighbors(agent.index)}, round=round)
            assert_as_after(round, agent)


@pytest.mark.parametrize("num_rounds", [1, 3, NUM_ROUNDS])
def test_simulate_reproduces_the_trajectory(num_rounds: int) -> None:
    agents = [reference_agent(index) for index in range(NUM_AGENTS)]
    readers = [Reader(agent) for agent in agents]
    seen = set()

    def compare(round: int, agent: int, reply: Reply) -> None:
        assert (reply.refused, reply.lacking) == ([], [])
        if round > num_rounds:
            assert not reply.frames
            return
        assert [written.reference or 0 for written in reply.frames] in ([round - 1], [round - 1, 0])
        for written in reply.frames:
            frame = readers[agent].read(written.data)
            assert (frame.header.sender, frame.header.round, frame.header.reference) == (
                agent,
                round,
                written.reference,
            )
            assert frame.header.fingerprint == (
                None if written.reference else agents[agent].fingerprint
            )
            assert same_tensors(frame.tensors, recorded_masks("sent", round, agent))
        assert_loss(round, agent, reply.metrics["train-loss"])
        seen.add((round, agent))

    simulate(
        agents, Topology.ring(NUM_AGENTS), num_rounds=num_rounds, evaluate_every=2, on_reply=compare
    )
    assert seen == {
        (round, agent) for round in range(1, num_rounds + 1) for agent in range(NUM_AGENTS)
    }
    for agent in agents:
        assert_as_after(num_rounds, agent)


def test_the_trajectory_depends_on_the_neighbors() -> None:
    """Without the exchange the recorded masks are missed, so the tests above do compare
    something.
    """
    agents = [reference_agent(index) for index in range(NUM_AGENTS)]
    for round in (1, 2):
        for agent in agents:
            agent.train(round=round)
            agent.fuse({}, round=round)
    assert not any(
        same_tensors(agent.model.masks(), recorded_masks("mask", 2, agent.index))
        for agent in agents
    )
