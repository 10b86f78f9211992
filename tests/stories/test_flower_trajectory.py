"""The frozen reference trajectory through frames, relay and client code, and equality
with `simulate`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from flower_mcepl import Topology, simulate
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import Reader, without_run
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid
from tests.oracles.reference import (
    LAYERS,
    NUM_AGENTS,
    NUM_ROUNDS,
    VECTORS,
    recorded_masks,
    reference_agent,
)


def context_tensors(grid: InProcessGrid, agent: int) -> dict[str, torch.Tensor]:
    return state_of(grid.contexts[1000 + agent]).state.tensors


@pytest.fixture(scope="module")
def gossip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the four reference agents as Flower nodes and keep every frame that the relay
    forwarded.
    """
    grid = InProcessGrid(
        make_agent_app(lambda context: reference_agent(agent_index(context))), NUM_AGENTS
    )
    root = tmp_path_factory.mktemp("runs")
    strategy = GossipStrategy(topology=Topology.ring(NUM_AGENTS), evaluate_every=2, record=root)
    result = strategy.start(grid=grid, num_rounds=NUM_ROUNDS)
    return {"grid": grid, "strategy": strategy, "result": result}


def forwarded(grid: InProcessGrid) -> list[tuple[int, int, int, bytes]]:
    """(round of the exchange, receiver, sender, frame) of everything that went down."""
    return [
        (
            int(message.content["order"]["server-round"]),
            message.metadata.dst_node_id - 1000,
            int(place.partition("/")[0]),
            array.numpy().tobytes(),
        )
        for message in grid.log
        for place, array in message.content["frames"].items()
    ]


def test_masks_on_the_wire_equal_the_recorded_ones(gossip: dict[str, Any]) -> None:
    links = forwarded(gossip["grid"])
    assert len(links) == NUM_ROUNDS * NUM_AGENTS * 2
    readers = {
        pair: Reader(reference_agent(pair[1])) for pair in {(link[1], link[2]) for link in links}
    }
    for round, receiver, sender, frame in links:
        assert VECTORS["adjacency"][receiver, sender]
        decoded = readers[receiver, sender].read(frame)
        assert (decoded.header.sender, decoded.header.round) == (sender, round - 1)
        for name, mask in recorded_masks("sent", round - 1, sender).items():
            assert torch.equal(decoded.tensors[name], mask)


def test_final_scores_and_masks_equal_the_recorded_ones(gossip: dict[str, Any]) -> None:
    for index in range(NUM_AGENTS):
        tensors = context_tensors(gossip["grid"], index)
        agent = reference_agent(index)
        state = agent.state()
        facts = {**state.facts, "num-neighbors": 2}
        agent.restore(state.of_tensors(facts, tensors))
        for layer in LAYERS:
            expected = torch.from_numpy(VECTORS[f"scores.{NUM_ROUNDS}.{index}.{layer}"])
            torch.testing.assert_close(
                tensors[f"scores/{layer}.weight"], expected, atol=1e-6, rtol=1e-5
            )
        for name, mask in recorded_masks("mask", NUM_ROUNDS, index).items():
            assert torch.equal(agent.model.masks()[name], mask)


def test_flower_gives_the_rows_and_frames_of_simulate(
    gossip: dict[str, Any], tmp_path: Path
) -> None:
    frames: dict[tuple[int, int], list[bytes]] = {}

    def keep(round: int, agent: int, reply: Any) -> None:
        frames[round, agent] = [frame.data for frame in reply.frames]

    agents = [reference_agent(index) for index in range(NUM_AGENTS)]
    result = simulate(
        agents, Topology.ring(NUM_AGENTS), num_rounds=NUM_ROUNDS, evaluate_every=2, on_reply=keep
    )
    for round, _, sender, frame in forwarded(gossip["grid"]):
        # what changed; the key beside it serves those who lack more
        assert without_run(frames[round - 1, sender][0]) == without_run(frame)
    flower_rows = gossip["strategy"].monitor.rows
    assert [row["round"] for row in flower_rows] == [2] * 4 + [4] * 4 + [6] * 4
    for ours, theirs in zip(result.rows, flower_rows, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }


def test_result_holds_every_evaluated_round(gossip: dict[str, Any]) -> None:
    result = gossip["result"]
    assert sorted(result.evaluate_metrics_clientapp) == [2, 4, 6]
    assert sorted(result.train_metrics_clientapp) == list(range(1, NUM_ROUNDS + 1))
    recorded = [float(VECTORS[f"loss.3.{agent}"]) for agent in range(NUM_AGENTS)]
    assert result.train_metrics_clientapp[3]["train-loss"] == pytest.approx(
        sum(recorded) / NUM_AGENTS, abs=1e-6
    )
