"""Server-based algorithms through Flower's messages: the same bits as `simulate`, the
same record.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import ConfigError, RosterError, Topology, shared_module, simulate
from flower_mcepl.agents import load_state, make_agent, make_server
from flower_mcepl.data.batches import AgentData
from flower_mcepl.record.reading import read_run
from flower_mcepl.strategies import GossipStrategy, ServerStrategy, make_strategy
from flower_mcepl.strategies.fedavg import FlowerFedavgServer
from tests.fleet.agents import SEED, same_tensors, small_net, split
from tests.fleet.flower import RUN_CONFIG, app_grid, model_fn

SERVED = ("fedavg", "ditto", "fedspa", "fedpm")
NUM_AGENTS = 3


def run_config(algorithm: str, **more: Any) -> dict[str, Any]:
    return {
        **RUN_CONFIG,
        "algorithm": algorithm,
        "num-agents": NUM_AGENTS,
        "num-rounds": 3,
        "evaluate-every": 2,
        **({} if algorithm == "fedpm" else {"lr": 0.05}),
        "local-epochs": 1,
        **more,
    }


def server_context(config: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_our_mean_is_that_of_flowers_fedavg_bit_for_bit(sizes: list[int], seed: int) -> None:
    app_grid(1)  # gives this process the identity that Flower's messages need
    module = shared_module(small_net, seed=SEED)
    ours = make_server("fedavg", module, len(sizes), {}, seed=SEED)
    flowers = make_server("fedavg", module, len(sizes), {}, seed=SEED, kind=FlowerFedavgServer)
    draw = torch.Generator().manual_seed(seed)
    inbox = {
        agent: {name: torch.randn(shape, generator=draw) for name, shape in ours.layers.items()}
        for agent in range(len(sizes))
    }
    for server in (ours, flowers):
        server.receive(inbox, round=1, num_examples=dict(enumerate(sizes)))
    theirs = flowers.payload_for(0, round=1)
    assert theirs is not None
    assert same_tensors(ours.payload_for(0, round=1), theirs)
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())


@pytest.mark.parametrize("algorithm", SERVED)
def test_flower_gives_the_rows_bytes_and_server_of_simulate(algorithm: str, tmp_path: Path) -> None:
    config = run_config(algorithm, **{"record-dir": str(tmp_path)})
    strategy = make_strategy(server_context(config), model_fn)
    assert isinstance(strategy, ServerStrategy)
    strategy.start(app_grid(NUM_AGENTS, **config))

    module = shared_module(small_net, seed=SEED)
    agents = [
        make_agent(
            algorithm,
            i,
            module,
            AgentData.of(split(i), split(1000 + i), agent=i),
            config,
            seed=SEED,
        )
        for i in range(NUM_AGENTS)
    ]
    server = make_server(algorithm, module, NUM_AGENTS, config, seed=SEED)
    result = simulate(agents, server=server, num_rounds=3, evaluate_every=2)
    assert isinstance(strategy.server, FlowerFedavgServer) == (algorithm == "fedavg")
    assert untimed(strategy.monitor.rows) == untimed(result.rows)
    assert same_tensors(strategy.server.state().tensors, server.state().tensors)
    assert strategy.exchange.ledger.totals() == result.summary["bytes"]

    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert run.config["server"]["number"] == NUM_AGENTS
    assert same_tensors(
        load_state(strategy.record.agents_dir / "server.safetensors").tensors,
        server.state().tensors,
    )
    digests = [
        json.loads(line)["frames"]
        for line in (strategy.record.path / "relay.jsonl").read_text().splitlines()
    ]
    assert all(len(found) == NUM_AGENTS for found in digests[:3])


def test_the_algorithm_decides_the_strategy() -> None:
    context = server_context(run_config("dsgd", topology="ring"))
    strategy = make_strategy(context, model_fn)
    assert isinstance(strategy, GossipStrategy)
    assert strategy.topology.links() == Topology.ring(NUM_AGENTS).links()


def test_gossip_refuses_an_algorithm_that_needs_a_server() -> None:
    with pytest.raises(ConfigError, match=r"'fedavg' hear a server.*make_strategy"):
        GossipStrategy.from_run_config(run_config("fedavg"))


def test_server_refuses_an_algorithm_without_one() -> None:
    with pytest.raises(ConfigError, match="dsgd"):
        ServerStrategy.from_run_config(run_config("dsgd"), small_net)


def test_an_agent_with_other_weights_than_the_server_is_refused(tmp_path: Path) -> None:
    config = run_config("fedavg", **{"record-dir": str(tmp_path), "wait-timeout": 0.01})
    strategy = make_strategy(server_context({**config, "seed": SEED + 1}), model_fn)
    with pytest.raises(RosterError, match="agent 0 and the server have different frozen weights"):
        strategy.start(app_grid(NUM_AGENTS, **config))
