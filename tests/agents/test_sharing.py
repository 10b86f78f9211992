"""Weights of which a part is personal: neither sent nor fused."""

from typing import Any

import pytest
from torch import Tensor, nn

from flower_mcepl import AgentData, ConfigError, FingerprintError, Topology, simulate
from flower_mcepl import shared_module as build
from flower_mcepl.agents import make_agent, make_server
from flower_mcepl.agents.handshake import check_common_ground
from flower_mcepl.agents.parts.averaging import DEGREE
from flower_mcepl.agents.parts.dense import DenseAgent
from flower_mcepl.agents.parts.sharing import shared_names
from tests.fleet.agents import SEED, noisy_net, same_tensors, split

GOSSIP = ["dsgd", "dfedavgm", "choco", "dispfl"]
KEYS = {"batch-size": 8, "local-steps": 2, "local-epochs": 0, "num-rounds": 500}
BODY = {"0.weight", "0.bias", "1.weight", "1.bias"}
HEAD = {"5.weight", "5.bias"}


def agent_of(algorithm: str, index: int = 0, share: str = "0.*, 1.*", **keys: Any) -> DenseAgent:
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    run_config = {**KEYS, "share": share, **keys}
    agent = make_agent(algorithm, index, build(noisy_net, seed=SEED), data, run_config, seed=SEED)
    assert isinstance(agent, DenseAgent)
    return agent


def weights_of(agent: DenseAgent, names: set[str]) -> dict[str, Tensor]:
    return {name: agent.weights[name].detach().clone() for name in sorted(names)}


def exchange(agents: list[DenseAgent], round: int) -> None:
    sent = {agent.index: agent.outgoing() for agent in agents}
    for agent in agents:
        inbox = {index: payload for index, payload in sent.items() if index != agent.index}
        agent.fuse(inbox, round=round)


@pytest.mark.parametrize("algorithm", GOSSIP)
def test_the_head_stays_and_the_body_is_averaged(algorithm: str) -> None:
    personal = [agent_of(algorithm, i) for i in range(3)]
    common = [agent_of(algorithm, i, share="*") for i in range(3)]
    for agent in (*personal, *common):
        agent.train(round=1)
        agent.fuse({}, round=1)  # alone at first: from now on all differ
        agent.train(round=2)
    trained = [weights_of(agent, HEAD) for agent in personal]
    body = [weights_of(agent, BODY) for agent in personal]
    exchange(personal, 2)
    exchange(common, 2)
    for i in range(3):
        kept = weights_of(personal[i], HEAD)
        if algorithm == "dispfl":  # its own mask has moved on
            trained[i]["5.weight"] *= personal[i].masks["5.weight"]
        assert same_tensors(kept, trained[i])
        assert not same_tensors(kept, weights_of(common[i], HEAD))
        assert same_tensors(weights_of(personal[i], BODY), weights_of(common[i], BODY))
        assert not same_tensors(weights_of(personal[i], BODY), body[i])


@pytest.mark.parametrize("algorithm", GOSSIP)
def test_only_the_body_is_sent_known_and_counted(algorithm: str) -> None:
    agents = [agent_of(algorithm, i) for i in range(3)]
    extra = set() if algorithm == "dispfl" else {DEGREE}
    assert set(agents[0].layers) == BODY | extra
    first = agents[0].first_payload()
    assert first is None or set(first) == BODY | extra
    assert set(agents[0].outgoing()) == BODY | extra
    facts = agents[0].describe()
    assert facts["share"] == "0.*, 1.*"
    assert facts["num-weights"] == 36 + 4 + 4 + 4
    assert facts["kept-weights"] <= facts["num-weights"]
    result = simulate(agents, Topology.ring(3), num_rounds=3)
    assert result.summary["bytes"]["fp32_total"] == 4 * 48 * 6 * 3


@pytest.mark.parametrize("algorithm", GOSSIP)
def test_a_restored_agent_goes_on_bit_for_bit(algorithm: str) -> None:
    agents = [agent_of(algorithm, i) for i in range(3)]
    for agent in agents:
        agent.train(round=1)
    again = [agent_of(algorithm, i) for i in range(3)]
    for agent, new in zip(agents, again, strict=True):
        new.restore(agent.state())
    for fleet in (agents, again):
        exchange(fleet, 1)
        for agent in fleet:
            agent.train(round=2)
        exchange(fleet, 2)
    for agent, new in zip(agents, again, strict=True):
        assert same_tensors(agent.state().tensors, new.state().tensors)


def test_fedavg_with_personal_heads() -> None:
    agents = [agent_of("fedavg", i) for i in range(3)]
    module = build(noisy_net, seed=SEED)
    server = make_server("fedavg", module, 3, {**KEYS, "share": "0.*, 1.*"}, seed=SEED)
    check_common_ground("agent 0", agents[0].describe(), "the server", server.describe())
    simulate(agents, server=server, num_rounds=2)
    bodies = [weights_of(agent, BODY) for agent in agents]
    heads = [weights_of(agent, HEAD) for agent in agents]
    assert set(server.layers_down) == BODY
    assert same_tensors(bodies[0], bodies[1])
    assert same_tensors(
        bodies[0], {n: w for n, w in sorted(server.payload_for(0, round=2).items())}
    )
    assert not same_tensors(heads[0], heads[1])


def test_agents_must_share_the_same() -> None:
    for other in ("*", "0.*", "1.*, 0.*"):
        with pytest.raises(FingerprintError, match="different layers that they share"):
            check_common_ground(
                "agent 0",
                agent_of("dsgd").describe(),
                "agent 1",
                agent_of("dsgd", 1, share=other).describe(),
            )
    server = make_server("fedavg", build(noisy_net, seed=SEED), 3, KEYS, seed=SEED)
    with pytest.raises(FingerprintError, match="Set the same share on all devices"):
        check_common_ground(
            "agent 0", agent_of("fedavg").describe(), "the server", server.describe()
        )


def test_ditto_with_heads_that_nobody_hears_of() -> None:
    agents = [agent_of("ditto", i) for i in range(3)]
    module = build(noisy_net, seed=SEED)
    server = make_server("ditto", module, 3, {**KEYS, "share": "0.*, 1.*"}, seed=SEED)
    simulate(agents, server=server, num_rounds=2)
    assert set(server.layers_down) == BODY
    assert same_tensors(weights_of(agents[0], BODY), weights_of(agents[1], BODY))
    assert not same_tensors(weights_of(agents[0], HEAD), weights_of(agents[1], HEAD))


@pytest.mark.parametrize("algorithm", [*GOSSIP, "fedavg"])
def test_a_pattern_that_matches_nothing_is_refused(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=r"pattern 'conv\*' of share matches nothing .*5\.bias"):
        agent_of(algorithm, share="0.*, conv*")
    with pytest.raises(ConfigError, match="share must be names or patterns"):
        agent_of(algorithm, share="0.*,,1.*")


def test_frozen_weights_cannot_be_shared() -> None:
    def frozen_body() -> nn.Module:
        net = noisy_net()
        net[0].requires_grad_(False)
        return net

    data = AgentData.of(split(0), split(1), agent=0)
    with pytest.raises(ConfigError, match=r"pattern '0\.\*' of share matches nothing"):
        make_agent("dsgd", 0, build(frozen_body, seed=SEED), data, {"share": "0.*"}, seed=SEED)


def test_names_come_once_and_in_their_own_order() -> None:
    assert shared_names("b*, a*, *1", ["a1", "b1", "c2", "b2"]) == ["a1", "b1", "b2"]


def test_what_is_shared_is_a_key_of_the_averaging_algorithms() -> None:
    for algorithm in ("local", "fedspa", "fedpm"):
        keys = {"share": "nothing*", "num-rounds": 9}  # of other algorithms, and so without effect
        data = AgentData.of(split(0), split(1), agent=0)
        agent = make_agent(algorithm, 0, build(noisy_net, seed=SEED), data, keys, seed=SEED)
        assert "share" not in agent.describe()
        assert "share" not in agent.parameters()
