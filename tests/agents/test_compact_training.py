"""Agents whose local steps calculate the filters that are on (`filters-training`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import (
    AgentData,
    ConfigError,
    MceplAgent,
    Topology,
    UnsupportedLayerError,
    shared_module,
    simulate,
)
from flower_mcepl.agents import make_agent
from flower_mcepl.agents import mcepl as mcepl_module
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.app import agent_index
from flower_mcepl.record import RunRecord, read_run
from flower_mcepl.strategies import GossipStrategy
from tests.agents.test_filters import GATES, KEYS, exchange, live, net
from tests.fleet.agents import SEED, same_tensors, split
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid

SIZE = 3
COMPACT: dict[str, Any] = {
    "filters_training": "compact",
    "filters_refresh": 4,
    "filters_rounds": 1,
    "filters_warmup": 1,
    "local_steps": 3,
}


def agent(index: int, build: Callable[[], nn.Module] = net, **changes: Any) -> MceplAgent:
    keys = KEYS | {key.replace("_", "-"): value for key, value in (COMPACT | changes).items()}
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    made = make_agent("mcepl", index, shared_module(build, seed=SEED), data, keys, seed=SEED)
    assert isinstance(made, MceplAgent)
    return made


def fleet(**changes: Any) -> list[MceplAgent]:
    return [agent(index, **changes) for index in range(SIZE)]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kind of every local step from here on."""
    seen: list[str] = []
    chosen = MceplAgent._compact_in

    def spy(self: MceplAgent, step: int) -> Any:
        compact = chosen(self, step)
        seen.append("full" if compact is None else "compact")
        return compact

    monkeypatch.setattr(MceplAgent, "_compact_in", spy)
    return seen


# --- settings ---

BAD = [
    ({"filters_training": "half"}, "filters-training must be one of full, compact; got 'half'"),
    ({"filters_refresh": 0}, "filters-refresh must be >= 1; got 0"),
    ({"filters": 1.0}, r"compact leaves out filters that are off and needs a share .* got 1\.0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_key_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent(0, **changes)


def test_an_agent_with_all_filters_among_others_may_be_compact(kinds: list[str]) -> None:
    agents = fleet(filters="0.5, 1.0")
    exchange(agents, 1, 2, 3)
    assert kinds.count("compact") == 2 * (3 - 1)  # agents 0 and 2, in round 3


# --- steps ---


def test_one_step_in_so_many_is_full_once_filters_are_off(kinds: list[str]) -> None:
    each = agent(0)
    for round in (1, 2, 3, 4):
        each.train(round=round)
    # round 1 warms up, in round 2 all are on at the schedule's beginning; then 8, 12
    assert kinds == ["full"] * 6 + ["compact", "full", "compact", "compact", "compact", "full"]


def test_gates_stand_still_in_a_compact_step() -> None:
    each = agent(0)
    for round in (1, 2, 3):
        each.train(round=round)
    scores = {name: each.model.all_scores[name].detach().clone() for name in GATES}
    velocity = {name: each.velocity[name].clone() for name in GATES}
    each.config = type(each.config)(**{**vars(each.config), "local_steps": 2})
    each.train(round=5)  # steps 9 and 10
    assert all(torch.equal(each.model.all_scores[name], scores[name]) for name in GATES)
    assert all(torch.equal(each.velocity[name], velocity[name]) for name in GATES)
    assert all(not each.gradient[name].any() for name in GATES)
    assert set(each.gradient) == set(each.model.all_scores)


def test_every_step_full_gives_the_bits_of_full_training() -> None:
    one, other = fleet(filters_refresh=1), fleet(filters_training="full")
    for agents in (one, other):
        exchange(agents, 1, 2, 3, 4)
    for a, b in zip(one, other, strict=True):
        assert same_tensors(a.state().tensors, b.state().tensors)


class _Held:
    """The whole network in the place of the compact one."""

    is_smaller = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_scores_are_those_of_full_steps_in_which_gates_stand_still() -> None:
    """Up to rounding, over rounds of exchange."""
    compact, whole = fleet(score_gradient="raw"), fleet(score_gradient="raw")
    for each in whole:
        smaller = each._compact
        assert smaller is not None
        held: Any = _Held(each.model)
        each._compact_in = (  # type: ignore[method-assign]
            lambda step, smaller=smaller, held=held: (
                held if step % 4 and smaller.is_smaller else None
            )
        )
    for agents in (compact, whole):
        exchange(agents, 1, 2, 3, 4)
    for one, other in zip(compact, whole, strict=True):
        assert live(one) == live(other) == [3, 5]
        for name, z in one.model.all_scores.items():
            assert torch.allclose(z, other.model.all_scores[name], rtol=1e-5, atol=1e-6)


# --- networks ---


class Branching(nn.Module):
    """Code that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.sum() > -1e9 else -x)


def test_a_network_that_cannot_be_traced_trains_whole_and_says_so(
    kinds: list[str], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"trains all of its filters .* cannot trace Branching"):
        agents = [agent(index, Branching) for index in range(SIZE)]
    record = RunRecord.create(tmp_path, name="whole", config={})
    simulate(agents, Topology.complete(SIZE), num_rounds=3, record=record)
    assert set(kinds) == {"full"}
    facts = read_run(record.path).handshakes[0]
    assert facts["filters_training_full"].startswith("torch.fx cannot trace Branching")
    assert facts["parameters"]["filters_training"] == "compact"


def test_a_compact_network_that_gives_something_else_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agents = fleet()

    def twice(compact: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * compact.model(*args, **kwargs)

    monkeypatch.setattr(mcepl_module.CompactNetwork, "__call__", twice)
    with pytest.raises(UnsupportedLayerError, match="must give what the whole one gives"):
        simulate(agents, Topology.complete(SIZE), num_rounds=1)


# --- runs ---


def test_a_state_after_a_first_compact_step_is_whole() -> None:
    one, other = (agent(0, filters_warmup=0, filters_rounds=0, num_rounds=1) for _ in range(2))
    one.config = other.config = type(one.config)(**{**vars(one.config), "local_steps": 1})
    one.train(round=1)
    assert set(one.velocity) == set(one.gradient) == set(one.model.all_scores)
    other.restore(one.state())
    for each in (one, other):
        for round in (2, 3, 4, 5):
            each.train(round=round)
    assert same_tensors(one.state().tensors, other.state().tensors)


def test_a_restored_fleet_goes_on_bit_for_bit() -> None:
    whole, first = fleet(), fleet()
    exchange(whole, 1, 2, 3, 4, 5)
    exchange(first, 1, 2, 3)
    second = fleet()
    for old, new in zip(first, second, strict=True):
        new.restore(old.state())
    exchange(second, 4, 5)
    for one, other in zip(whole, second, strict=True):
        assert same_tensors(one.state().tensors, other.state().tensors)


def test_flower_gives_the_states_of_simulate(tmp_path: Path) -> None:
    app = make_agent_app(lambda context: agent(agent_index(context)))
    grid = InProcessGrid(app, SIZE)
    strategy = GossipStrategy(topology=Topology.complete(SIZE), record=tmp_path)
    strategy.start(grid=grid, num_rounds=4)
    agents = fleet()
    simulate(agents, Topology.complete(SIZE), num_rounds=4)
    for each in agents:
        kept = state_of(grid.contexts[1000 + each.index]).state
        assert same_tensors(kept.tensors, each.state().tensors)
