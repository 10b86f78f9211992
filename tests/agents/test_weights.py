"""Local weights, DSGD and DFedAvgM against their equations, and the mixing matrix that
their agents agree on.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import Topology, simulate
from flower_mcepl.agents.parts.averaging import DEGREE, metropolis_pull
from flower_mcepl.exchange.turn import Reply, open_mail
from tests.fleet.agents import Reader, same_tensors
from tests.oracles import weights as slow_weights
from tests.oracles.baselines import (
    CLOSE,
    NAMES,
    PAW,
    RING,
    agent_of,
    arrays,
    assert_same,
    data_of,
    fleet_of,
    play,
)

ALONE = ["local", "local-masks"]

# --- local weights ---


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.4, "weight_decay": 0.05},
        {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.01, "local_steps": 3},
        {"lr": 0.5, "lr_decay": 0.5, "weight_decay": 0.0},
        {"lr": 0.5, "clip_norm": 0.05, "momentum": 0.5, "weight_decay": 0.01},
    ],
    ids=["plain", "momentum", "decaying", "clipped"],
)
def test_local_training_by_the_equations(settings: dict[str, Any]) -> None:
    agent = agent_of("local", 2, **settings)
    x, (data,), velocity = arrays(agent), data_of([agent]), {}
    for round in (1, 2, 3):
        x = slow_weights.sgd(
            x,
            data,
            steps=settings.get("local_steps", 1),
            decay=settings["weight_decay"],
            lr=settings["lr"] * settings.get("lr_decay", 1.0) ** (round - 1),
            momentum=settings.get("momentum", 0.0),
            velocity=velocity,
            clip=settings.get("clip_norm", 0.0),
        )
        agent.train(round=round)
        agent.fuse({}, round=round)
        assert_same([agent], [x])


def test_a_cosine_halves_the_step_midway() -> None:
    late, plain = agent_of("local", lr_schedule="cosine", lr_rounds=4), agent_of("local")
    start = arrays(plain)
    late.train(round=3)
    plain.train(round=3)
    for name, value in arrays(plain).items():
        np.testing.assert_allclose(
            arrays(late)[name] - start[name], 0.5 * (value - start[name]), atol=1e-7
        )


@pytest.mark.parametrize("algorithm", ALONE)
def test_those_alone_say_and_hear_nothing(algorithm: str) -> None:
    agent, deaf = agent_of(algorithm, local_steps=2), agent_of(algorithm, local_steps=2)
    assert (agent.layers, agent.outgoing(), agent.first_payload()) == ({}, {}, None)
    noise = agent_of("dsgd").outgoing() if algorithm == "local" else agent_of("mcepl").outgoing()
    for each, inbox in ((agent, {1: noise}), (deaf, {})):
        each.train(round=1)
        each.fuse(inbox, round=1)
    assert same_tensors(agent.state().tensors, deaf.state().tensors)


# --- averaging of weights ---


@pytest.mark.parametrize("neighbors", [RING, PAW], ids=["ring", "paw"])
def test_dsgd_by_the_published_equation(neighbors: Any) -> None:
    agents = fleet_of("dsgd", lr=0.5, weight_decay=0.02)
    x, data, w = (
        [arrays(agent) for agent in agents],
        data_of(agents),
        slow_weights.metropolis(neighbors),
    )
    for round in (1, 2, 3, 4):  # from the first round on, for then all start equal
        x = slow_weights.dsgd(x, data, w, lr=0.5, decay=0.02)
        play(agents, neighbors, round)
        assert_same(agents, x)


def test_dsgd_sends_the_point_where_the_gradient_was_taken() -> None:
    agent = agent_of("dsgd")
    before = arrays(agent)
    agent.train(round=1)
    sent = agent.outgoing()
    for short, name in (("w1", "0.weight"), ("b2", "2.bias")):
        assert np.array_equal(sent[name].double().numpy(), before[short])
        assert not np.array_equal(arrays(agent)[short], before[short])
    agent.fuse({}, round=1)
    assert np.array_equal(agent.outgoing()["0.weight"].double().numpy(), arrays(agent)["w1"])


def test_dsgd_with_several_local_steps_moves_by_all_of_them() -> None:
    agents = fleet_of("dsgd", lr=0.3, weight_decay=0.0, local_steps=3)
    data, w = data_of(agents), slow_weights.metropolis(RING)
    play(agents, RING, 1)
    x = [arrays(agent) for agent in agents]
    options = {"steps": 3, "lr": 0.3, "decay": 0.0, "momentum": 0.0}
    after = [slow_weights.sgd(x[i], data[i], velocity={}, **options) for i in range(4)]
    mixed = slow_weights.mix(w, x)
    play(agents, RING, 2)
    assert_same(agents, [{n: mixed[i][n] + after[i][n] - x[i][n] for n in x[i]} for i in range(4)])


@pytest.mark.parametrize("neighbors", [RING, PAW], ids=["ring", "paw"])
def test_dfedavgm_by_the_published_equations(neighbors: Any) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.8}
    agents = fleet_of("dfedavgm", local_steps=3, **settings)
    x, data = [arrays(agent) for agent in agents], data_of(agents)
    for round in (1, 2, 3):
        w = slow_weights.metropolis(neighbors)
        if round == 1:  # nobody knows another's degree yet: each takes its own
            for i, others in enumerate(neighbors):
                w[i] = [1 / (1 + len(others)) if j == i or j in others else 0.0 for j in range(4)]
        x = slow_weights.dfedavgm(x, data, w, steps=3, lr=0.1, decay=0.02, momentum=0.8)
        play(agents, neighbors, round)
        assert_same(agents, x)


def graph_of(neighbors: Any) -> Topology:
    return Topology.from_edges(
        [(i, j) for i, others in enumerate(neighbors) for j in others if i < j], num_agents=4
    )


@pytest.mark.parametrize("key_interval", [0, 1])
@pytest.mark.parametrize("neighbors", [RING, PAW], ids=["ring", "paw"])
def test_dfedavgm_of_quantized_differences_by_the_equations(
    neighbors: Any, key_interval: int
) -> None:
    """Each round from the z that came out of the one before, so that no rounding to
    another step multiplies.
    """
    local: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.8}
    agents = fleet_of("dfedavgm", local_steps=3, precision="int8-differences", **local)
    x, data, replies = [arrays(agent) for agent in agents], data_of(agents), {}

    def keep(round: int, agent: int, reply: Reply) -> None:
        assert (reply.refused, reply.lacking) == ([], [])
        replies[round, agent] = reply

    simulate(agents, graph_of(neighbors), num_rounds=6, key_interval=key_interval, on_reply=keep)
    held = [{name: value.astype(np.float32) for name, value in model.items()} for model in x]
    for round in range(1, 7):
        w = slow_weights.metropolis(neighbors)
        if round == 1:  # nobody knows another's degree yet: each takes its own
            for i, others in enumerate(neighbors):
                w[i] = [1 / (1 + len(others)) if j == i or j in others else 0.0 for j in range(4)]
        z = []
        for i in range(4):
            sent = {short: replies[round, i].payload[name].numpy() for short, name in NAMES.items()}
            stepped = slow_weights.heavy_ball(
                x[i], data[i], steps=3, lr=0.1, decay=0.02, momentum=0.8
            )
            for short, value in sent.items():
                np.testing.assert_allclose(value, stepped[short], **CLOSE)
                held[i][short] = held[i][short] + slow_weights.in_127_steps(value - held[i][short])
                decoded = replies[round, i].frames[0].decoded[NAMES[short]]
                assert np.array_equal(decoded.numpy(), held[i][short])
            z.append({short: value.astype(np.float64) for short, value in sent.items()})
        x = slow_weights.mix_held(w, z, held)
    assert_same(agents, x)


def test_errors_of_differences_are_smaller_than_those_of_whole_weights() -> None:
    sent: list[dict[str, Tensor]] = []
    agents = fleet_of("dfedavgm")
    simulate(
        agents,
        graph_of(RING),
        num_rounds=12,
        on_reply=lambda round, agent, reply: (
            sent.append(dict(reply.payload)) if agent == 0 and reply.payload else None
        ),
    )
    errors: dict[str, list[float]] = {}
    for precision in ("int8", "int8-differences"):
        agent = agent_of("dfedavgm", precision=precision)
        outbox, reader = open_mail(agent, max_staleness=5).outbox, Reader(agent)
        for round, payload in enumerate(sent, start=1):
            (frame,) = outbox.write(payload, round=round, acknowledged=round - 1 or None)
            came = reader.read(frame.data).tensors
            error = torch.cat([(came[name] - payload[name]).flatten() for name in NAMES.values()])
            errors.setdefault(precision, []).append(float(error.square().mean().sqrt()))
            assert round < 2 or came[DEGREE].tolist() == [2.0]
    assert all(
        ours < theirs
        for ours, theirs in zip(errors["int8-differences"], errors["int8"], strict=True)
    )
    assert errors["int8-differences"][-1] < 0.1 * errors["int8"][-1]


def one_hot_payloads(degrees: list[int]) -> dict[int, dict[str, Tensor]]:
    """Payloads from which the mixing matrix can be read: agent j holds the j-th unit
    vector.
    """
    unit = torch.eye(len(degrees), dtype=torch.float64)
    return {
        j: {"x": unit[j], DEGREE: torch.tensor([float(degrees[j])])} for j in range(len(degrees))
    }


def row_of(i: int, others: list[int], degrees: list[int]) -> np.ndarray[Any, Any]:
    payloads = one_hot_payloads(degrees)
    degree = max(degrees[i], len(others))
    pull = metropolis_pull(payloads[i], {j: payloads[j] for j in others}, degree=degree)
    return (payloads[i]["x"] + pull["x"]).numpy()


@given(n=st.integers(2, 9), p=st.floats(0.1, 1.0), seed=st.integers(0, 999))
def test_where_all_are_heard_the_weights_are_the_metropolis_matrix(
    n: int, p: float, seed: int
) -> None:
    linked = np.triu(np.random.default_rng(seed).random((n, n)) < p, 1)
    neighbors = [list(np.flatnonzero(row)) for row in linked | linked.T]
    rows = [row_of(i, neighbors[i], [len(others) for others in neighbors]) for i in range(n)]
    np.testing.assert_allclose(rows, slow_weights.metropolis(neighbors), atol=1e-12)
    if linked.any():
        edges = [(int(i), int(j)) for i, j in np.argwhere(linked)]
        theirs = Topology.from_edges(edges, num_agents=n).mixing(kind="metropolis", round=1)
        np.testing.assert_allclose(rows, theirs, atol=1e-12)


@given(data=st.data(), n=st.integers(2, 9))
def test_whoever_is_missing_and_whatever_they_say_rows_sum_to_one(
    data: st.DataObject, n: int
) -> None:
    degrees = data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    others = sorted(data.draw(st.sets(st.integers(1, n - 1))))
    row = row_of(0, others, degrees)
    assert row.sum() == pytest.approx(1.0)
    assert (row >= -1e-12).all()
    assert {j for j in range(1, n) if row[j] > 0} == set(others)


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -3.0])
def test_a_nonsensical_degree_counts_as_unknown(nonsense: float) -> None:
    payload = agent_of("dfedavgm", 1).outgoing()
    agents = [agent_of("dfedavgm", 0, lr=0.5) for _ in range(2)]
    for agent, said in zip(agents, (nonsense, 0.0), strict=True):
        agent.train(round=1)
        agent.fuse({1: {**payload, DEGREE: torch.tensor([said])}}, round=1)
    assert same_tensors(agents[0].outgoing(), agents[1].outgoing())


@pytest.mark.parametrize("algorithm", ["dsgd", "dfedavgm"])
def test_every_payload_says_the_last_number_of_neighbors(algorithm: str) -> None:
    agent = agent_of(algorithm)
    heard = {j: agent_of(algorithm, j).outgoing() for j in (1, 2, 3)}
    assert agent.layers[DEGREE] == (1,)
    for inbox, degree in ((None, 0), (heard, 3), ({1: heard[1]}, 1), ({}, 0)):
        if inbox is not None:
            agent.fuse(inbox, round=1)
        assert agent.outgoing()[DEGREE].tolist() == [degree]


@pytest.mark.parametrize("algorithm", ["dsgd", "dfedavgm"])
def test_the_mean_of_all_agents_moves_only_by_their_steps(algorithm: str) -> None:
    agents = fleet_of(algorithm)
    play(agents, PAW, 1)
    for agent in agents:
        agent.train(round=2)
    sent = [agent.outgoing() for agent in agents]
    before = sum(arrays(agent)["w1"] for agent in agents)
    for agent in agents:
        agent.fuse({j: sent[j] for j in PAW[agent.index]}, round=2)
    np.testing.assert_allclose(sum(arrays(agent)["w1"] for agent in agents), before, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["dsgd", "dfedavgm"])
def test_without_any_frame_it_is_local_training(algorithm: str) -> None:
    settings = {"lr": 0.2, "momentum": 0.0, "local_steps": 2}
    agent, alone = agent_of(algorithm, **settings), agent_of("local", **settings)
    for round in (1, 2):
        for each in (agent, alone):
            each.train(round=round)
        agent.fuse({}, round=round)
    agent.train(round=3)  # a round whose parcel was lost: no fuse at all
    alone.train(round=3)
    agent.train(round=4)
    alone.train(round=4)
    assert_same([agent], [arrays(alone)])


def test_a_neighbor_never_heard_of_holds_the_common_start() -> None:
    for algorithm in ("dsgd", "dfedavgm"):
        agent, neighbor = agent_of(algorithm, 0), agent_of(algorithm, 1)
        assert same_tensors(agent.first_payload(), neighbor.outgoing())
        neighbor.train(round=1)
        assert same_tensors(agent.first_payload(), neighbor.first_payload())
        before = arrays(agent)
        agent.fuse({1: agent.first_payload()}, round=0)
        assert_same([agent], [before])


def test_the_order_of_the_inbox_does_not_matter() -> None:
    for algorithm in ("dsgd", "dfedavgm", "dispfl"):
        one, other = agent_of(algorithm), agent_of(algorithm)
        inbox = {}
        for j in (1, 2, 3):
            neighbor = agent_of(algorithm, j)
            neighbor.train(round=1)
            inbox[j] = neighbor.outgoing()
        one.fuse(inbox, round=1)
        other.fuse(dict(reversed(inbox.items())), round=1)
        assert same_tensors(one.state().tensors, other.state().tensors)
