"""Agents of unequal depth: what each holds, how layers are fused, frames, states."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import (
    Agent,
    AgentData,
    ConfigError,
    FingerprintError,
    MceplAgent,
    RunRecord,
    Staged,
    StateError,
    Topology,
    load_personal,
    read_run,
    shared_module,
    simulate,
)
from flower_mcepl.agents import find_algorithm, make_agent, make_server
from flower_mcepl.agents.handshake import KEPT_BY_LAYER, check_common_ground, common_ground
from flower_mcepl.agents.parts.averaging import DEGREE, metropolis_weight
from flower_mcepl.agents.parts.dense import DenseAgent
from flower_mcepl.agents.registry import read_config
from flower_mcepl.clients import make_client_app
from flower_mcepl.doctor.app_run import _weights
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.personal import save_agent
from flower_mcepl.report.table import agent_table
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import SEED, same_tensors, split
from tests.fleet.flower import state_of
from tests.fleet.flower_messages import data_fn
from tests.fleet.grid import InProcessGrid
from tests.oracles import gates as gate_oracles
from tests.oracles import masks as oracles

SIZE = 4
KEYS: dict[str, Any] = {
    "score-lr": 0.02,
    "score-gradient": "normalized",
    "weight-decay": 0.0,
    "batch-size": 8,
    "retention-conv": 0.5,
    "retention-linear": 0.5,
    "num-rounds": 6,
}
MIXED = {"depth": "1, 2, 3"}
STAGE_LAYERS = ["stages.0.0.weight", "stages.1.0.weight", "stages.2.1.weight"]
EXIT_LAYERS = ["exits.0.1.weight", "exits.1.1.weight", "exits.2.weight"]
GRAPH = Topology.complete(SIZE)


def stages() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU()),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 10), nn.ELU()),
    ]


def exits() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(24, 3)),
        nn.Linear(10, 3),
    ]


def net() -> Staged:
    return Staged(stages(), exits())


class PlainNet(nn.Module):
    """The same layers by the same names, and nobody knows that they are stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.exits = nn.ModuleList(stages()), nn.ModuleList(exits())

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        result: Tensor = self.exits[-1](x)
        return result


def make(
    index: int,
    algorithm: str = "mcepl",
    *,
    node: dict[str, Any] | None = None,
    model_fn: Any = net,
    **changes: Any,
) -> Any:
    keys = KEYS | {key.replace("_", "-"): value for key, value in changes.items()}
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    module = shared_module(model_fn, seed=SEED)
    return make_agent(algorithm, index, module, data, keys, node, seed=SEED)


def fleet(algorithm: str = "mcepl", **changes: Any) -> list[Any]:
    return [make(index, algorithm, **{**MIXED, **changes}) for index in range(SIZE)]


def run(agents: list[Any], rounds: int = 5, **options: Any) -> tuple[Any, list[str]]:
    """Result of a run of everyone with everyone, and what was refused."""
    refused: list[str] = []

    def look(round: int, agent: int, reply: Reply) -> None:
        refused.extend(reply.refused)

    return simulate(agents, GRAPH, num_rounds=rounds, on_reply=look, **options), refused


# --- settings ---


def test_depths_are_taken_in_turn_and_a_device_has_its_own() -> None:
    keys = {"depth": "1, 2, 3"}
    read = [read_config("mcepl", keys, agent=index).depth for index in range(4)]  # type: ignore[attr-defined]
    assert read == [1, 2, 3, 1]
    assert make(0, node={"depth": 2}, depth="1, 3").depth == 2
    assert make(0).depth == make(0, depth=0).depth == make(0, depth=3).depth == 3
    assert make(0, "dsgd", depth="2").depth == 2


BAD = [
    ({"depth": -1}, r"depth is a number of stages, a whole number >= 1, or 0 for all; got -1"),
    ({"depth": "1, 2.5"}, r"depth is a number of stages, .*; got 2\.5"),
    ({"depth": "two"}, "run-config key depth must be a number or numbers"),
    ({"depth": 4}, r"this network has 3, with exits of 1, 2, 3; got 4\. Use one"),
    ({"depth": 2, "model_fn": PlainNet}, r"needs a network with stages.* PlainNet.* got 2\..*Stag"),
    ({"depth": 1, "retention_layers": "stages.7*=0.5"}, r"'stages\.7\*' fits no layer"),
    ({"depth": 1, "filters": 0.5, "filters_layers": "stages.7*=0.5"}, "of filters-layers fits no"),
    ({"depth": 1, "score_lr_layers": "stages.7*=0.5"}, "of score-lr-layers fits no layer"),
    ({"depth": 1, "share": "stages.7*"}, "the pattern 'stages.7.' of share matches nothing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_depth_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(0, **changes)


def test_a_device_says_one_depth() -> None:
    with pytest.raises(ConfigError, match="node config's depth is one ratio"):
        make(0, node={"depth": "1, 2"})


def test_keys_of_deep_layers_are_keys_of_shallow_agents_too() -> None:
    agent = make(
        0,
        depth=1,
        retention_layers="stages.2*=0.25",
        score_lr_layers="exits.2*=0.5, stages.0*=0.1",
        share="stages.*, exits.2*",
        filters_layers="stages.1*=0.5",
    )
    assert [*agent.layers] == STAGE_LAYERS[:1]
    assert agent.lr["stages.0.0.weight"] == 0.1


@pytest.mark.parametrize("algorithm", ["fedavg", "dispfl", "fedpm", "fedspa", "ditto"])
def test_an_algorithm_without_depths_refuses_the_key(algorithm: str) -> None:
    config = {"algorithm": algorithm, "depth": "1, 2", "num-agents": 4}
    with pytest.raises(ConfigError, match=f"of algorithm {algorithm} all hold the whole network"):
        RunSettings.from_run_config(config)
    RunSettings.from_run_config({**config, "algorithm": "dsgd"})


def test_a_server_has_the_deepest_part() -> None:
    agent = make(0, "fedavg")
    server = make_server("fedavg", shared_module(net, seed=SEED), SIZE, KEYS, seed=SEED)
    check_common_ground("agent 0", agent.describe(), "the server", server.describe())
    assert "exits.0.1.weight" not in agent.layers


# --- what an agent holds ---


def test_an_agent_holds_its_stages_and_their_exit() -> None:
    for depth in (1, 2, 3):
        agent = make(0, depth=depth)
        assert [*agent.model.layers] == [*STAGE_LAYERS[:depth], EXIT_LAYERS[depth - 1]]
        assert [*agent.layers] == [*agent.model.layers]
        assert agent.layers_by_depth == make(1, depth=1).layers_by_depth
        names = dict(agent.personal_model().named_parameters())
        assert f"exits.{depth - 1}.{'bias' if depth == 3 else '1.bias'}" in names
        assert not [name for name in names if name.startswith(f"stages.{depth}")]


CHANGES: list[dict[str, Any]] = [
    {},
    {"weight_init": "signed-constant", "first_mask": "scores"},
    {"score_init": "magnitude", "retention_conv": "0.25, 0.5"},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_shallow_agent_is_the_first_part_of_a_deep_one(changes: dict[str, Any]) -> None:
    deep, shallow = make(0, depth=3, **changes), make(1, depth=2, **changes)
    assert deep.fingerprint == shallow.fingerprint
    common = STAGE_LAYERS[:2]
    for name in common:
        pair = (deep.model.module.get_parameter(name), shallow.model.module.get_parameter(name))
        assert torch.equal(*pair)
        assert torch.equal(deep.model.scores[name], shallow.model.scores[name])
    firsts = [agent.first_payload() for agent in (deep, shallow)]
    assert same_tensors(*firsts)
    assert {*firsts[0]} == {*STAGE_LAYERS, *EXIT_LAYERS}


ALGORITHMS = ["mcepl", "local-masks", "mask-averaging", "local", "dsgd", "dfedavgm", "choco"]


@pytest.mark.filterwarnings("ignore:no gradient of a batch reaches")
@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd"])
def test_equal_full_depths_give_the_bits_of_a_plain_network(algorithm: str) -> None:
    """All that is held is the same; the plain one drags along exits without a use."""
    plain = [make(index, algorithm, model_fn=PlainNet) for index in range(SIZE)]
    deep = fleet(algorithm, depth="3")
    rows = [run(agents, evaluate_every=1)[0].rows for agents in (plain, deep)]
    measures = [[(row["accuracy"], row["loss"]) for row in each] for each in rows]
    assert measures[0] == measures[1]
    for one, other in zip(plain, deep, strict=True):
        sent, less = one.outgoing(), other.outgoing()
        assert {*less} < {*sent}
        assert same_tensors({name: sent[name] for name in less}, dict(less))


# --- fusion ---


def slow_mean(masks: list[Tensor]) -> np.ndarray | None:
    return oracles.neighbor_mean([mask.numpy() for mask in masks]) if masks else None


@settings(deadline=None, max_examples=25)
@given(
    depths=st.lists(st.integers(1, 3), min_size=2, max_size=5),
    retention=st.lists(st.sampled_from([0.2, 0.5, 0.8, 1.0]), min_size=1, max_size=3),
    absent=st.sets(st.integers(1, 4)),
    share=st.sampled_from([None, "0.5", "0.4, 1.0"]),
    strength=st.sampled_from([1.0, 3.0]),
)
def test_a_layer_is_fused_over_those_who_hold_it(
    depths: list[int],
    retention: list[float],
    absent: set[int],
    share: str | None,
    strength: float,
) -> None:
    """Masks after an exchange, from scores and what was sent, in NumPy."""
    changes: dict[str, Any] = {} if share is None else {"filters": share, "num_rounds": 0}
    texts = {"depth": ", ".join(map(str, depths)), "retention_conv": ", ".join(map(str, retention))}
    agents = [
        make(index, **texts, **changes, fusion_strength=strength, finetune_lr=0.0)
        for index in range(len(depths))
    ]
    for agent in agents:
        agent.train(round=1)
    sent = {agent.index: agent.outgoing() for agent in agents}
    inbox = {index: payload for index, payload in sent.items() if index and index not in absent}
    hearer = agents[0]
    hearer.fuse(inbox, round=1)
    masks, scores, rules = hearer.model.masks(), hearer.model.all_scores, hearer.model.rules

    def fused(name: str) -> np.ndarray:
        z = scores[name].detach().numpy().astype(float)
        n = slow_mean([payload[name] for payload in inbox.values() if name in payload])
        return z if n is None else oracles.aggregation(z, strength * n)

    for name in hearer.model.layers:
        ratio = rules.retention[name]
        if name in rules.filters:
            q = gate_oracles.gates(fused(f"{name}:filters"), rules.filters[name])
            assert np.array_equal(masks[f"{name}:filters"].numpy(), q)
            due = gate_oracles.two_level_mask(fused(name), q, ratio)
        else:
            due = oracles.topk_mask(fused(name), ratio)
        assert np.array_equal(masks[name].numpy(), due), name


def test_what_nobody_else_holds_is_ranked_alone() -> None:
    agents = [make(index, depth="3, 1") for index in range(2)]
    for agent in agents:
        agent.train(round=1)
    deep = agents[0]
    deep.fuse({1: agents[1].outgoing()}, round=1)
    heard = {name for name, n in deep.model.neighbor_means.items() if n is not None}
    assert heard == {*STAGE_LAYERS[:1]}
    assert deep.model.num_holders(STAGE_LAYERS[2]) == 0
    own = deep.model.scores[STAGE_LAYERS[2]]
    assert torch.equal(deep.model.aggregation()[STAGE_LAYERS[2]], own)
    assert deep.state().facts["holders"] == {
        name: 0 for name in (*STAGE_LAYERS[1:], EXIT_LAYERS[2])
    }


def test_a_blend_counts_those_who_hold_the_layer() -> None:
    agents = fleet("mask-averaging")  # depths 1, 2, 3, 1
    for agent in agents:
        agent.train(round=1)
    sent = {agent.index: agent.outgoing() for agent in agents}
    deep = agents[2]
    deep.fuse({index: sent[index] for index in (0, 1, 3)}, round=1)
    own, live = deep.model.masks(), deep.model.live_masks()
    for name, holders in zip(STAGE_LAYERS, ((0, 1, 3), (1,), ()), strict=True):
        due = slow_mean([own[name], *(sent[index][name] for index in holders)])
        assert np.allclose(live[name].numpy(), due)


@settings(deadline=None, max_examples=15)
@given(depths=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_weights_are_averaged_over_those_who_hold_them(depths: list[int], seed: int) -> None:
    """What a layer's holders send sums to a row of W; the rest falls to the agent."""
    count = len(depths)
    agents = [
        make(index, "dfedavgm", depth=", ".join(map(str, depths)), local_steps=1)
        for index in range(count)
    ]
    generator = torch.Generator().manual_seed(seed)
    sent = {}
    for agent in agents:
        assert isinstance(agent, DenseAgent)
        with torch.no_grad():
            for weight in agent.weights.values():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        sent[agent.index] = agent.outgoing() | {DEGREE: torch.tensor([float(count - 1)])}
    inbox = {index: payload for index, payload in sent.items() if index}
    before = {name: weight.detach().double() for name, weight in agents[0].weights.items()}
    agents[0].fuse(inbox, round=1)
    for name, own in before.items():
        holders = [payload[name].double() for payload in inbox.values() if name in payload]
        weight = metropolis_weight(count - 1, count - 1)
        due = (1 - weight * len(holders)) * own + sum(weight * x for x in holders)
        assert torch.allclose(agents[0].weights[name].detach().double(), due, atol=1e-5)


# --- frames, runs and states ---


GATED = {"filters": "0.5, 1.0", "filters_rounds": 2}
RUNS: list[tuple[str, dict[str, Any]]] = [
    *((algorithm, {}) for algorithm in ALGORITHMS),
    ("mcepl", GATED),
    ("mcepl", {"first_mask": "scores", "share": "stages.*", "score_averaging": 0.9}),
    ("dfedavgm", {"precision": "int8-differences"}),
]


@pytest.mark.parametrize(("algorithm", "changes"), RUNS)
def test_a_fleet_of_unequal_depths_refuses_no_frame(
    algorithm: str, changes: dict[str, Any]
) -> None:
    agents = fleet(algorithm, **changes)
    result, refused = run(agents, key_interval=3, evaluate_every=5)
    assert refused == []
    assert len(result.rows) == SIZE * 1 or result.rows


def test_what_comes_out_of_the_frames_is_what_was_sent() -> None:
    agents = fleet(depth="3, 1, 2, 3")
    sent: dict[tuple[int, int], Mapping[str, Tensor]] = {}

    heard: dict[tuple[int, int, int], Mapping[str, Tensor]] = {}
    for agent in agents:
        fuse = agent.fuse

        def spy(inbox: Any, *, round: int, agent: Any = agent, fuse: Any = fuse) -> None:
            for sender, payload in inbox.items():
                heard[round, agent.index, sender] = dict(payload)
            fuse(inbox, round=round)

        agent.fuse = spy

    def note(round: int, agent: int, reply: Reply) -> None:
        assert reply.refused == []
        sent[round, agent] = dict(reply.payload)

    simulate(agents, GRAPH, num_rounds=4, on_reply=note)
    assert len(heard) == 4 * SIZE * (SIZE - 1)
    for (round, _, sender), payload in heard.items():
        assert same_tensors(dict(payload), dict(sent[round, sender]))
    assert len(sent[1, 1]) == 2


def test_flower_gives_the_rows_and_states_of_simulate(tmp_path: Path) -> None:
    app = make_client_app(lambda context: net(), data_fn)
    gated = {key.replace("_", "-"): value for key, value in GATED.items()}
    grid = InProcessGrid(app, SIZE, {**KEYS, **MIXED, **gated, "seed": SEED})
    strategy = GossipStrategy(topology=GRAPH, evaluate_every=2, record=tmp_path / "run")
    strategy.start(grid=grid, num_rounds=4)
    agents = fleet(**GATED)
    result, _ = run(agents, 4, evaluate_every=2)
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in (result.rows, strategy.monitor.rows)
    ]
    assert rows[0] == rows[1]
    for agent in agents:
        kept = state_of(grid.contexts[1000 + agent.index]).state
        assert same_tensors(kept.tensors, agent.state().tensors)
    record = read_run(next((tmp_path / "run").iterdir()))
    assert " depth " in agent_table(record)
    told = record.handshakes
    assert [told[index]["depth"] for index in range(SIZE)] == [1, 2, 3, 1]
    assert [told[index]["parameters"]["depth"] for index in range(SIZE)] == [1, 2, 3, 1]
    weights = [told[index]["num_weights"] for index in range(3)]
    assert weights == told[0]["weights_by_depth"] == [228, 324, 522]


@pytest.mark.parametrize(("algorithm", "changes"), RUNS)
def test_a_resumed_run_goes_on_bit_for_bit(
    algorithm: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    whole = fleet(algorithm, **changes)
    run(whole, 5)
    record = RunRecord.create(path=tmp_path / "run", name="run", config={})

    def stop(round: int, agent: int, reply: Reply) -> None:
        if round == 4 and agent == 2:
            raise KeyboardInterrupt

    halves = {"num_rounds": 5, "checkpoint_every": 1, "record": record, "on_reply": stop}
    with pytest.raises(KeyboardInterrupt):
        simulate(fleet(algorithm, **changes), GRAPH, **halves)
    again = fleet(algorithm, **changes)
    run(again, 5, resume=tmp_path / "run")
    for one, other in zip(whole, again, strict=True):
        assert one.state().facts == other.state().facts
        assert same_tensors(one.state().tensors, other.state().tensors)


def test_a_state_of_another_depth_is_refused() -> None:
    state = make(0, depth=2).state()
    with pytest.raises(StateError, match="saved state is of depth 2, but agent 0 has 3"):
        make(0, depth=3).restore(state)


@pytest.mark.parametrize(
    "holders", [7, {"stages.0.0.weight": 3}, {"fc": 0}, {"stages.0.0.weight": "1"}]
)
def test_a_state_with_nonsense_about_holders_is_refused(holders: Any) -> None:
    agent = make(0, depth=2)
    agent.fuse({1: make(1, depth=2).outgoing()}, round=1)
    state = agent.state()
    with pytest.raises(StateError, match="how many of them hold each layer"):
        make(0, depth=2).restore(replace(state, facts={**state.facts, "holders": holders}))


@pytest.mark.parametrize("changes", [{}, GATED, {"retention_layers": "stages.2*=0.25"}])
def test_final_masks_are_read_from_states_of_any_depth(changes: dict[str, Any]) -> None:
    agents = fleet(**changes)
    run(agents, 3)
    for agent in agents:
        masks = find_algorithm("mcepl").masks_of(
            agent.state(), json.loads(json.dumps(agent.parameters()))
        )
        assert isinstance(masks, dict)
        due = {name: agent.model.masks()[name] for name in agent.model.layers}
        assert same_tensors({name: torch.from_numpy(mask) for name, mask in masks.items()}, due)


@pytest.mark.parametrize("algorithm", ["mcepl", "dsgd", "fedavg"])
def test_a_model_file_is_of_the_agents_depth(algorithm: str, tmp_path: Path) -> None:
    depth = {} if algorithm == "fedavg" else {"depth": "2"}
    agent: Agent = make(1, algorithm, **depth)
    agent.train(round=1)
    file = tmp_path / "model.mask"
    save_agent(agent, file)
    network, inputs = load_personal(file, net), split(3)[0]
    assert isinstance(network, Staged)
    assert network.num_stages == (2 if depth else 3)
    with torch.no_grad():
        assert torch.equal(network(inputs), agent.personal_model().eval()(inputs))
    with pytest.raises(FingerprintError):
        load_personal(file, lambda: Staged(stages()[:1], exits()[:1]))


# --- handshake ---


def test_agents_of_unequal_depth_have_common_ground() -> None:
    for algorithm, changes in RUNS:
        agents = fleet(algorithm, **changes)
        told = [agent.describe() for agent in agents]
        assert len({common_ground(facts) for facts in told}) == 1, algorithm
        check_common_ground("agent 0", told[0], "agent 2", told[2])
        assert told[1]["depth"] == 2
        if KEPT_BY_LAYER in told[1]:
            assert len(told[1][KEPT_BY_LAYER]) == told[1]["layers-by-depth"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num-weights": 999}, r"numbers of maskable weights\): 999 and as of its depth"),
        ({"depth": 3}, "numbers of maskable weights"),
        ({"depth": 9}, "numbers of maskable weights"),
        ({"kept-by-layer": [1]}, r"numbers of layers\): 1 and as of its depth"),
        ({"weights-by-depth": [1, 324, 522]}, r"networks in stages \(weights-by-depth\)"),
        ({"layers-by-depth": [2, 3]}, r"networks in stages \(layers-by-depth\)"),
        ({"fingerprint": "0" * 32}, "frozen weights"),
    ],
)
def test_a_device_cannot_lie_about_its_depth(changes: dict[str, Any], message: str) -> None:
    honest, liar = make(0, depth=1).describe(), {**make(1, depth=2).describe(), **changes}
    with pytest.raises(FingerprintError, match=message):
        check_common_ground("agent 1", liar, "agent 0", honest)


def test_doctor_says_the_depth() -> None:
    finding = _weights(make(0, depth=2).describe())
    assert "depth 2 of 3 stages" in finding.found
    assert finding.values["depth"] == 2
    assert "depth" not in _weights(make(0, model_fn=PlainNet).describe()).found


def test_agents_with_and_without_stages_do_not_fit() -> None:
    plain = make(1, model_fn=PlainNet).describe()
    with pytest.raises(FingerprintError, match=r"stages \(weights-by-depth\): \[228, .* and None"):
        check_common_ground("agent 0", make(0).describe(), "agent 1", plain)


def test_a_shallow_mask_agent_trains_its_exit() -> None:
    agent = make(0, depth=1)
    assert isinstance(agent, MceplAgent)
    before = {name: z.detach().clone() for name, z in agent.model.scores.items()}
    agent.train(round=1)
    assert all(not torch.equal(before[name], z) for name, z in agent.model.scores.items())
