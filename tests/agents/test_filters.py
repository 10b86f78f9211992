"""Agents with two-level masks: settings, exchange, states, frames; the lasso's step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import (
    AgentData,
    ConfigError,
    FingerprintError,
    MceplAgent,
    MceplConfig,
    Topology,
    shared_module,
    simulate,
)
from flower_mcepl.agents import find_algorithm, make_agent
from flower_mcepl.agents.handshake import KEPT_BY_LAYER, check_common_ground
from flower_mcepl.agents.registry import read_config
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import SEED, Reader, same_tensors, split
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid
from tests.oracles import gates as oracles
from tests.oracles import masks as mask_oracles

SIZE = 3
GATES = ("2.weight:filters", "5.weight:filters")
KEYS: dict[str, Any] = {
    "score-lr": 0.02,
    "score-gradient": "normalized",
    "momentum": 0.9,
    "weight-decay": 0.0,
    "batch-size": 8,
    "retention-conv": 0.5,
    "retention-linear": 0.5,
    "filters": 0.5,
    "num-rounds": 6,
    "filters-rounds": 2,
    "filters-warmup": 1,
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ELU(),
        nn.Conv2d(4, 6, 3),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ELU(),
        nn.Linear(10, 3),
    )


def agent(
    index: int, algorithm: str = "mcepl", node: dict[str, Any] | None = None, **changes: Any
) -> MceplAgent:
    keys = KEYS | {key.replace("_", "-"): value for key, value in changes.items()}
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    made = make_agent(algorithm, index, shared_module(net, seed=SEED), data, keys, node, seed=SEED)
    assert isinstance(made, MceplAgent)
    return made


def fleet(**changes: Any) -> list[MceplAgent]:
    return [agent(index, **changes) for index in range(SIZE)]


def exchange(agents: list[MceplAgent], *rounds: int) -> None:
    """Whole rounds in which everyone hears everyone."""
    for round in rounds:
        for each in agents:
            each.train(round=round)
        sent = {each.index: each.outgoing() for each in agents}
        for each in agents:
            inbox = {index: payload for index, payload in sent.items() if index != each.index}
            each.fuse(inbox, round=round)


def live(each: MceplAgent) -> list[int]:
    return [int(each.model.masks()[name].sum()) for name in GATES]


# --- settings ---


def test_shares_are_taken_in_turn_and_a_device_has_its_own() -> None:
    def config(index: int, node: dict[str, Any] | None = None) -> MceplConfig:
        keys = {"filters": "0.25, 0.5, 1.0", "num-rounds": 40}
        read = read_config("mcepl", keys, agent=index, node_config=node)
        assert isinstance(read, MceplConfig)
        return read

    assert [config(index).filters for index in range(4)] == [0.25, 0.5, 1.0, 0.25]
    assert config(0, {"filters": 0.75}).filters == 0.75
    assert all(config(index).has_gates for index in range(3))
    assert (config(0).filters_rounds, config(0).filters_warmup) == (20, 4)


def test_without_the_key_there_are_no_gates() -> None:
    config = read_config("mcepl", {"num-rounds": 40}, agent=0)
    assert isinstance(config, MceplConfig)
    assert not config.has_gates
    assert (config.filters_rounds, config.filters_warmup) == (0, 0)


def test_the_schedule_is_cubic_after_the_warm_up() -> None:
    config = MceplConfig(filters=0.5, filters_rounds=4, filters_warmup=2)
    expected = [1, 1, 1, 0.75**3, 0.5**3, 0.25**3, 0, 0]
    assert [config.opening(round) for round in range(1, 9)] == expected
    at_once = MceplConfig(filters=0.5, filters_warmup=1)
    assert [at_once.opening(round) for round in (1, 2)] == [1, 0]


BAD = [
    ({"filters": 0.0}, r"share of filters that stays on, key filters, .* got 0\.0"),
    ({"filters": "0.5, 2"}, r"share of filters that stays on, key filters, .* got 2\.0"),
    ({"filters": "half"}, 'filters must be a number or numbers separated by commas.*"half"|half'),
    ({"filters_layers": "2.weight"}, "filters-layers must be NAME=RATIO"),
    ({"filters_layers": "2.weight=3"}, r"key filters-layers, 2\.weight, .* got 3\.0"),
    ({"filters_layers": "head=0.5"}, "the key 'head' of filters-layers fits no layer"),
    ({"filters_rounds": -1}, "filters-rounds must be >= 0; got -1"),
    ({"filters_warmup": -2}, "filters-warmup must be >= 0; got -2"),
    ({"retention_budget": "agent"}, "retention-budget must be one of layer, network"),
    ({"lasso_step": "adam"}, "lasso-step must be one of gradient, proximal; got 'adam'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_key_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent(0, **changes)


def test_a_device_alone_cannot_turn_filters_off() -> None:
    with pytest.raises(ConfigError, match=r'Set filters in the run config, too, such as "1\.0, 0'):
        agent(0, filters=1.0, node={"filters": 0.5})


def test_a_blending_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="Use fusion mcepl"):
        agent(0, "mask-averaging")


# --- training and exchange ---


def test_filters_go_off_and_stay_within_the_share() -> None:
    agents = fleet()
    counts = []
    for round in range(1, 6):
        exchange(agents, round)
        counts.append([live(each) for each in agents])
    assert counts == [[[6, 10]] * 3] * 2 + [[[4, 6]] * 3] + [[[3, 5]] * 3] * 2
    metrics = agents[0].evaluate()
    assert metrics["live-filters"] <= 4 + 3 + 5 + 3
    assert metrics["density"] == pytest.approx((18 + 54 + 60 + 15) / 522)


def test_agents_of_unequal_shares_fuse_gates() -> None:
    agents = fleet(filters="0.25, 0.5, 1.0")
    exchange(agents, 1, 2, 3, 4, 5)
    assert [live(each) for each in agents] == [[2, 3], [3, 5], [6, 10]]
    heard = agents[2].model.neighbor_means[GATES[0]]
    assert heard is not None
    assert float(heard.sum()) == pytest.approx((2 + 3) / 2)


def test_gates_and_their_fusion_by_the_oracle() -> None:
    """Masks after an exchange, from scores and what was sent, in NumPy."""
    agents = fleet(filters="0.25, 0.5, 1.0", fusion_strength=1.0)
    exchange(agents, 1, 2, 3, 4)
    for each in agents:
        each.train(round=5)
    sent = [each.outgoing() for each in agents]
    agents[0].fuse({1: sent[1], 2: sent[2]}, round=5)
    masks, scores = agents[0].model.masks(), agents[0].model.all_scores

    def fused(name: str) -> np.ndarray:
        n = mask_oracles.neighbor_mean([sent[1][name].numpy(), sent[2][name].numpy()])
        return mask_oracles.aggregation(scores[name].detach().numpy().astype(float), n)

    for layer in ("2.weight", "5.weight"):
        q = oracles.gates(fused(f"{layer}:filters"), 0.25)
        assert np.array_equal(masks[f"{layer}:filters"].numpy(), q)
        due = oracles.two_level_mask(fused(layer), q, 0.5)
        assert np.array_equal(masks[layer].numpy(), due)


def test_masks_trained_alone_have_gates_too() -> None:
    agents = fleet()
    alone = agent(0, "local-masks")
    for round in range(1, 5):
        alone.train(round=round)
        alone.fuse({}, round=round)
    assert live(alone) == [3, 5]
    assert alone.outgoing() == {}
    assert alone.describe()["live-filters"] == agents[0].describe()["live-filters"]


def test_a_fleet_runs_in_frames() -> None:
    agents = fleet(filters="0.25, 0.5, 1.0")
    payloads: dict[tuple[int, int], dict[str, Tensor]] = {}
    readers = [Reader(each) for each in agents]

    def read(round: int, index: int, reply: Reply) -> None:
        for frame in reply.frames[:1]:
            payloads[round, index] = dict(readers[index].read(frame.data).tensors)

    result = simulate(
        agents, Topology.complete(SIZE), num_rounds=5, evaluate_every=5, on_reply=read
    )
    assert {*payloads[5, 0]} == {*agents[0].model.layers, *GATES}
    assert [int(payloads[5, index][GATES[0]].sum()) for index in range(3)] == [2, 3, 6]
    assert {row["metrics"]["live-filters"] for row in result.rows if row["round"] == 5}


def test_flower_gives_the_rows_and_states_of_simulate(tmp_path: Path) -> None:
    changes = {"filters": "0.25, 0.5, 1.0"}
    app = make_agent_app(lambda context: agent(agent_index(context), **changes))
    grid = InProcessGrid(app, SIZE)
    strategy = GossipStrategy(topology=Topology.complete(SIZE), evaluate_every=2, record=tmp_path)
    strategy.start(grid=grid, num_rounds=4)
    agents = fleet(**changes)
    result = simulate(agents, Topology.complete(SIZE), num_rounds=4, evaluate_every=2)
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in (result.rows, strategy.monitor.rows)
    ]
    assert rows[0] == rows[1]
    for each in agents:
        kept = state_of(grid.contexts[1000 + each.index]).state
        assert same_tensors(kept.tensors, each.state().tensors)


# --- handshake and state ---


def test_without_gates_the_handshake_is_as_ever() -> None:
    facts = agent(0, filters=1.0).describe()
    assert "live-filters" not in facts
    assert len(facts[KEPT_BY_LAYER]) == 4


def test_the_handshake_says_what_stays_in_the_end() -> None:
    facts = agent(0).describe()
    assert facts["live-filters"] == [3, 5]
    assert KEPT_BY_LAYER not in facts  # it changes from round to round
    assert facts["kept-weights"] == 18 + 54 + 60 + 15
    assert facts["num-weights"] == 36 + 216 + 240 + 30


def test_agents_with_and_without_gates_do_not_fit() -> None:
    one, other = agent(0), agent(1, filters=1.0)
    with pytest.raises(FingerprintError, match=r'as in "1\.0, 0\.5"'):
        check_common_ground("agent 0", one.describe(), "agent 1", other.describe())
    mixed = [agent(index, filters="0.5, 1.0") for index in range(2)]
    check_common_ground("agent 0", mixed[0].describe(), "agent 1", mixed[1].describe())


CHANGES: list[dict[str, Any]] = [
    {"filters": "0.25, 0.5, 1.0", "score_averaging": 0.9},
    {"filters_layers": "2.weight=1", "share": "0.*, 5.*", "finetune_lr": 0.1},
    {"filters": 1.0, "retention_budget": "network", "group_lasso": 0.3, "lasso_step": "proximal"},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_restored_fleet_goes_on_bit_for_bit(changes: dict[str, Any]) -> None:
    whole, first = fleet(**changes), fleet(**changes)
    exchange(whole, 1, 2, 3, 4, 5)
    exchange(first, 1, 2)
    second = fleet(**changes)
    for old, new in zip(first, second, strict=True):
        new.restore(old.state())
        assert new.evaluate() == old.evaluate()
    exchange(second, 3, 4, 5)
    for one, other in zip(whole, second, strict=True):
        assert one.state().facts == other.state().facts
        assert same_tensors(one.state().tensors, other.state().tensors)
        assert one.evaluate() == other.evaluate()


@pytest.mark.parametrize("changes", CHANGES)
def test_the_final_masks_are_read_from_the_state(changes: dict[str, Any]) -> None:
    agents = fleet(**changes)
    exchange(agents, 1, 2, 3)
    for each in agents:
        masks = find_algorithm("mcepl").masks_of(each.state(), each.parameters())
        assert isinstance(masks, dict)
        due = {n: m for n, m in each.model.masks().items() if n in each.model.layers}
        assert same_tensors({name: torch.from_numpy(mask) for name, mask in masks.items()}, due)


# --- the lasso's proximal step ---


@pytest.mark.parametrize("form", ["signed", "magnitude"])
def test_the_proximal_step_by_the_oracle(form: str) -> None:
    """It follows the step that is taken without a lasso."""
    changes = {"filters": 1.0, "score_form": form, "momentum": 0.0}
    plain = agent(0, **changes)
    shrinking = agent(0, **changes, group_lasso=2.0, lasso_step="proximal")
    for each in (plain, shrinking):
        each.train(round=1)
    for name, z in plain.model.scores.items():
        due = torch.from_numpy(oracles.proximal(z.detach().double().numpy(), 0.02 * 2.0))
        assert torch.allclose(shrinking.model.scores[name].detach().double(), due, atol=1e-6)


def test_a_budget_of_the_network_moves_what_the_lasso_frees() -> None:
    changes = {"filters": 1.0, "group_lasso": 4.0, "lasso_step": "proximal"}
    counts = {}
    for budget in ("layer", "network"):
        each = agent(0, **changes, retention_budget=budget)
        for round in range(1, 9):
            each.train(round=round)
        masks = {name: each.model.masks()[name] for name in each.model.layers}
        counts[budget] = [int(mask.sum()) for mask in masks.values()]
    assert sum(counts["layer"]) == sum(counts["network"])
    assert counts["layer"] == [18, 108, 120, 15]
    assert counts["network"] != counts["layer"]
    assert KEPT_BY_LAYER not in agent(0, **changes, retention_budget="network").describe()
