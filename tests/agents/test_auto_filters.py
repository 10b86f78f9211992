"""Agents that choose their share of filters by the time of their steps."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flower_mcepl import (
    AgentData,
    AnswerError,
    ConfigError,
    MceplAgent,
    StateError,
    Topology,
    UnsupportedLayerError,
    shared_module,
    simulate,
)
from flower_mcepl.agents import find_algorithm, make_agent
from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.parts import pacing, step_times
from flower_mcepl.agents.parts.meters import find_meter
from flower_mcepl.agents.parts.pace import LEVELS
from flower_mcepl.agents.parts.strain import find_strain
from flower_mcepl.agents.registry import read_config
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.app import agent_index
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.messages.answer import from_records, to_records
from flower_mcepl.record import RunRecord, read_run
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.studies import engines
from flower_mcepl.studies.flower_app import read_app
from tests.agents.test_compact_training import Branching
from tests.agents.test_filters import GATES, KEYS, live, net
from tests.fleet.agents import SEED, same_tensors, split
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid
from tests.fleet.study_app import write_app

SIZE = 3
AUTO: dict[str, Any] = {
    **{"filters": "auto", "filters-training": "compact", "filters-refresh": 3},
    **{"step-budget": 1.0, "num-rounds": 40, "filters-rounds": 0, "filters-warmup": 0},
}
RING = Topology.complete(SIZE)


def agent(index: int, node: dict[str, Any] | None = None, **changes: Any) -> MceplAgent:
    keys = KEYS | AUTO | {key.replace("_", "-"): value for key, value in changes.items()}
    data = AgentData.of(split(index), split(1000 + index), agent=index)
    made = make_agent("mcepl", index, shared_module(net, seed=SEED), data, keys, node, seed=SEED)
    assert isinstance(made, MceplAgent)
    return made


def fleet(**changes: Any) -> list[MceplAgent]:
    return [agent(index, **changes) for index in range(SIZE)]


def speeds(agent: int, round: int, share: float) -> float:
    """Agent 0 becomes slow in round 4, agent 1 always was, agent 2 is fast."""
    whole = {0: 0.9 if round < 4 else 2.5, 1: 1.9, 2: 0.1}[agent]
    return whole * share


def shares(record: RunRecord, agent: int) -> list[float]:
    return [*read_run(record.path).decisions[agent].values()]


# --- settings ---


def config(run: Mapping[str, Any], node: Mapping[str, Any] | None = None) -> Any:
    return read_config("mcepl", KEYS | AUTO | dict(run), agent=0, node_config=node)


def test_auto_in_the_run_config_is_for_all_and_a_device_may_differ() -> None:
    assert (config({}).filters_auto, config({}).step_budget) == (True, 1.0)
    assert (config({}).filters, config({}).gated) == (1.0, True)
    assert (config({}).filters_rounds, config({}).filters_warmup) == (0, 0)
    assert config({}, {"step-budget": 2}).step_budget == 2.0
    fixed = config({}, {"filters": 0.5})
    assert (fixed.filters_auto, fixed.filters, fixed.step_budget) == (False, 0.5, 0.0)
    one = config({"filters": "0.5, 1.0", "step-budget": 0.0}, {"filters": "auto", "step-budget": 3})
    assert (one.filters_auto, one.gated, one.step_budget) == (True, True, 3.0)


BAD = [
    ({"step-budget": 0.0}, None, r'filters = "auto" needs a step-budget > 0, .* got 0\.0'),
    ({"step-budget": float("inf")}, None, "step-budget must be a finite number"),
    ({"step-budget": "1 s"}, None, "step-budget must be a number of seconds; got '1 s'"),
    ({"filters-training": "full"}, None, "only with filters-training compact; got 'full'"),
    ({"filters-rounds": 9}, None, "has no schedule; run-config key filters-rounds; got 9"),
    ({"filters": "0.5"}, None, r"step-budget is for filters = \"auto\""),
    (
        {"filters": 1.0, "step-budget": 0.0},
        {"filters": "auto"},
        "the run config leaves all filters",
    ),
    ({"filters": "auto, 0.5"}, None, "key filters must be a number"),
]


@pytest.mark.parametrize(("run", "node", "message"), BAD)
def test_settings_that_do_not_fit_are_refused(
    run: dict[str, Any], node: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(run, node)


def test_a_network_without_compact_steps_is_refused() -> None:
    data = AgentData.of(split(0), split(1000), agent=0)
    with pytest.raises(UnsupportedLayerError, match="cannot trace Branching"):
        make_agent("mcepl", 0, shared_module(Branching, seed=0), data, KEYS | AUTO, seed=0)


# --- decisions ---


def test_shares_follow_the_speed_of_each_device(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="auto", config={})
    agents = fleet()
    simulate(agents, RING, num_rounds=10, record=record, step_seconds=speeds)
    assert shares(record, 0) == [1.0] * 4 + [0.75, 0.5] + [0.375] * 4
    assert shares(record, 1) == [0.5] * 10
    assert shares(record, 2) == [1.0] * 10
    assert [live(each) for each in agents] == [[3, 4], [3, 5], [6, 10]]
    lines = read_run(record.path).relay
    first = lines[0]["decisions"][0]
    assert first == {"agent": 0, "round": 1, "share": 1.0, "spent": 0.9, "reason": "start"}
    assert [line["decisions"][0]["reason"] for line in lines[3:7]] == [
        "hold",
        "late",
        "late",
        "late",
    ]
    assert "decisions" not in lines[-1]  # of the closing exchange
    facts = read_run(record.path).handshakes[1]
    assert facts["live_filters"] == [6, 10]  # what it may come to have
    assert (facts["parameters"]["filters_auto"], facts["parameters"]["filters"]) == (True, 1.0)


def run(tmp_path: Path, name: str, **options: Any) -> tuple[list[MceplAgent], RunRecord, Any]:
    record = RunRecord.create(tmp_path, name=name, config={})
    agents = fleet()
    result = simulate(agents, RING, num_rounds=7, evaluate_every=2, record=record, **options)
    return agents, record, result


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_record_gives_the_same_bits_again(tmp_path: Path) -> None:
    agents, record, result = run(tmp_path, "first", step_seconds=speeds)
    decisions = read_run(record.path).decisions
    again, replayed, other = run(tmp_path, "again", decisions=decisions)
    assert without_seconds(result.rows) == without_seconds(other.rows)
    for one, two in zip(agents, again, strict=True):
        assert same_tensors(one.state().tensors, two.state().tensors)
    assert read_run(replayed.path).decisions == decisions
    reasons = {
        e["reason"] for line in read_run(replayed.path).relay for e in line.get("decisions", [])
    }
    assert reasons == {"replay"}
    contents = [[line["frames"] for line in read_run(r.path).relay] for r in (record, replayed)]
    assert contents[0] == contents[1]


def test_other_decisions_give_other_bits(tmp_path: Path) -> None:
    _, record, result = run(tmp_path, "first", step_seconds=speeds)
    decisions = read_run(record.path).decisions
    decisions[0][2] = 0.25
    _, _, other = run(tmp_path, "other", decisions=decisions)
    assert without_seconds(result.rows) != without_seconds(other.rows)


@pytest.mark.parametrize("decisions", [{}, {0: {1: 0.5}}, {i: {1: 0.3} for i in range(SIZE)}])
def test_decisions_that_lack_a_round_are_refused(decisions: Any) -> None:
    with pytest.raises(ConfigError, match=r"the decisions to replay must hold one of the shares"):
        simulate(fleet(), RING, num_rounds=2, decisions=decisions)


def test_decisions_of_agents_that_choose_nothing_are_refused() -> None:
    agents = fleet(filters="0.5", step_budget=0.0)
    with pytest.raises(ConfigError, match="none of these has it"):
        simulate(agents, RING, num_rounds=2, step_seconds=speeds)


def test_a_clock_that_gives_no_time_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"step_seconds must return a finite number > 0; got 0\.0"
    ):
        simulate(fleet(), RING, num_rounds=1, step_seconds=lambda agent, round, share: 0.0)


def test_a_share_that_never_changes_gives_the_bits_of_a_fixed_one(tmp_path: Path) -> None:
    """That is, of the key `filters` without a schedule, on the same layers."""
    always = {i: dict.fromkeys(range(1, 6), 0.5) for i in range(SIZE)}
    one, other = fleet(), fleet(filters="0.5", step_budget=0.0, num_rounds=1)
    assert other[0].config.filters_rounds == other[0].config.filters_warmup == 0
    simulate(one, RING, num_rounds=5, decisions=always)
    simulate(other, RING, num_rounds=5)
    for a, b in zip(one, other, strict=True):
        assert same_tensors(a.state().tensors, b.state().tensors)


def test_a_run_that_broke_off_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    agents, record, result = run(tmp_path, "whole", step_seconds=speeds)

    def killed(agent: int, round: int, share: float) -> float:
        if round == 6:
            raise KeyboardInterrupt
        return speeds(agent, round, share)

    broken = RunRecord.create(tmp_path, name="broken", config={})
    options: dict[str, Any] = {"num_rounds": 7, "evaluate_every": 2, "checkpoint_every": 5}
    with pytest.raises(KeyboardInterrupt):
        simulate(fleet(), RING, record=broken, step_seconds=killed, **options)
    second = fleet()
    last = simulate(second, RING, resume=broken.path, step_seconds=speeds, **options)
    assert without_seconds(last.rows) == without_seconds(result.rows)
    for one, two in zip(agents, second, strict=True):
        assert same_tensors(one.state().tensors, two.state().tensors)
        assert one.state().facts == two.state().facts
    assert read_run(broken.path).decisions == read_run(record.path).decisions


def test_the_final_masks_are_read_from_the_state(tmp_path: Path) -> None:
    agents, _, _ = run(tmp_path, "masks", step_seconds=speeds)
    for each in agents:
        masks = find_algorithm("mcepl").masks_of(each.state(), each.parameters())
        assert isinstance(masks, dict)
        due = {n: m for n, m in each.model.masks().items() if n in each.model.layers}
        assert same_tensors({name: torch.from_numpy(mask) for name, mask in masks.items()}, due)


@pytest.mark.parametrize(
    "pace",
    [7, {"level": 9}, {"level": 1, "window": [], "since": 0, "reason": "hold", "spent": -1.0}],
)
def test_a_damaged_pace_is_refused(pace: Any) -> None:
    one = agent(0)
    state = one.state()
    with pytest.raises(StateError, match="the saved"):
        one.restore(AgentState({**state.facts, "pace": pace}, state.arrays))


# --- Flower ---


def test_flower_gives_the_bits_of_simulate(tmp_path: Path) -> None:
    """By the same clock, which tells the decisions, and by the decisions alone."""
    agents, record, result = run(tmp_path, "simulated", step_seconds=speeds)
    decisions = read_run(record.path).decisions
    for options in ({"step_seconds": speeds}, {"decisions": decisions}):

        def make(context: Any, options: dict[str, Any] = options) -> MceplAgent:
            each = agent(agent_index(context))
            pacing.set_pace([each], **options)
            return each

        grid = InProcessGrid(make_agent_app(make), SIZE)
        strategy = GossipStrategy(topology=RING, evaluate_every=2, record=tmp_path)
        strategy.start(grid=grid, num_rounds=7)
        assert without_seconds(strategy.monitor.rows) == without_seconds(result.rows)
        for each in agents:
            kept = state_of(grid.contexts[1000 + each.index]).state
            assert same_tensors(kept.tensors, each.state().tensors)
        assert strategy.monitor.record is not None
        assert read_run(strategy.monitor.record.path).decisions == decisions


def test_the_key_decisions_replays_a_record(tmp_path: Path) -> None:
    agents, record, _ = run(tmp_path, "simulated", step_seconds=speeds)
    grid = InProcessGrid(make_agent_app(lambda context: agent(agent_index(context))), SIZE)
    keys = {"decisions": str(record.path)}
    for context in grid.contexts.values():
        context.run_config = {**context.run_config, **keys}
    strategy = GossipStrategy(topology=RING, evaluate_every=2, record=tmp_path)
    strategy.start(grid=grid, num_rounds=7)
    for each in agents:
        kept = state_of(grid.contexts[1000 + each.index]).state
        assert same_tensors(kept.tensors, each.state().tensors)


def test_a_study_in_one_process_replays_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord.create(tmp_path, name="told", config={})
    entry = {"agent": 2, "round": 1, "share": 0.5, "spent": None, "reason": "hold"}
    (record.path / "relay.jsonl").write_text(json.dumps({"round": 1, "decisions": [entry]}) + "\n")
    seen: list[Any] = []
    monkeypatch.setattr(engines, "simulate", lambda *args, **kwargs: seen.append(kwargs))
    app = read_app(write_app(tmp_path, "auto"))
    for more in ({}, {"decisions": str(record.path)}):
        engines.run_in_process(app, {**app.config, **more}, tmp_path / f"{len(seen)}", print)
    assert [kwargs["decisions"] for kwargs in seen] == [None, {2: {1: 0.5}}]


BROKEN = [
    ({"train-filters": 0.3, "train-filters-reason": 1.0}, "train-filters must be one of"),
    ({"train-filters": 0.5}, "train-filters-reason must be a whole number"),
    (
        {"train-filters": 0.5, "train-filters-reason": 1.0, "train-filters-step": -1.0},
        "train-filters-step must be > 0",
    ),
]


@pytest.mark.parametrize(("metrics", "message"), BROKEN)
def test_an_answer_with_a_decision_that_cannot_be_is_refused(
    metrics: dict[str, float], message: str
) -> None:
    answer: Answer[Any] = Answer(facts={"agent": 0}, metrics={"seconds": 1.0, **metrics})
    with pytest.raises(AnswerError, match=message):
        from_records(to_records(answer))


# --- measuring ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flower-mcepl" / "step-times"


def test_times_are_measured_once_for_a_device_and_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def told(self: MceplAgent, share: float) -> float:
        seen.append(share)
        return share * 0.01

    monkeypatch.setattr(MceplAgent, "_measure_step", told)
    for _ in range(2):
        assert [agent(0).step_cost(share) for share in (0.25, 1.0)] == [0.0025, 0.01]
    assert seen == [0.25, 1.0]
    agent(0, batch_size=4).step_cost(1.0)
    assert len(seen) == 3
    for path in folder.iterdir():
        path.write_text("[]" if path.stat().st_size % 2 else json.dumps({"of": "?"}))
    agent(0).step_cost(1.0)
    assert len(seen) == 4


def without_home() -> Path:
    raise RuntimeError("no home")


def test_where_nothing_can_be_kept_times_are_measured_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    assert [step_times.cached_cost({}, lambda: 2.5) for _ in range(2)] == [2.5, 2.5]
    assert caplog.text.count("each process measures anew") == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", without_home)
    assert step_times.cached_cost({}, lambda: 3.5) == 3.5
    assert "no home folder" in caplog.text


def test_measuring_changes_nothing(folder: Path) -> None:
    one, other = agent(0), agent(0)
    for share in LEVELS:
        assert one.step_cost(share) > 0
    for each in (one, other):
        pacing.set_pace([each], decisions={0: {1: 0.5}})
        each.train(round=1)
    assert same_tensors(one.state().tensors, other.state().tensors)
    assert one.model.rules == other.model.rules


def test_on_a_machine_of_its_own_an_agent_measures_itself(folder: Path, tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="real", config={})
    agents = fleet(step_budget=1000.0)
    simulate(agents, RING, num_rounds=4, record=record)
    entries = [e for line in read_run(record.path).relay for e in line.get("decisions", [])]
    assert {e["share"] for e in entries} == {1.0}
    spent = {e["round"]: e["spent"] for e in entries if e["agent"] == 0}
    assert spent[3] is None  # a whole step
    assert all(0 < spent[round] < 1000 for round in (1, 2, 4))


# --- energy ---


def counter(folder: Path, name: str, energy: int, most: int = 10_000_000) -> None:
    package = folder / name
    package.mkdir(exist_ok=True)
    (package / "energy_uj").write_text(f"{energy}\n")
    (package / "max_energy_range_uj").write_text(f"{most}\n")


def test_joules_are_those_of_all_packages_and_a_counter_may_begin_anew(tmp_path: Path) -> None:
    for name, energy in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000)):
        counter(tmp_path, name, energy)
    counter(tmp_path, "intel-rapl:0:0", 5)  # a part of a package
    meter = find_meter("joules", powercap=tmp_path)
    before = meter()
    counter(tmp_path, "intel-rapl:0", 1_500_000)
    counter(tmp_path, "intel-rapl:0:0", 900_000)
    assert meter() - before == pytest.approx(0.5)
    counter(tmp_path, "intel-rapl:1", 1_000_000)
    assert meter() - before == pytest.approx(2.5)


@pytest.mark.parametrize("energy", [None, "much"])
def test_a_machine_that_does_not_tell_joules_is_refused(energy: str | None, tmp_path: Path) -> None:
    if energy:
        counter(tmp_path, "intel-rapl:0", 1)
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(energy)
    with pytest.raises(ConfigError, match="needs energy counters that this user may read"):
        find_meter("joules", powercap=tmp_path)


def test_the_budget_may_be_in_joules(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    readings = iter(range(10**6))
    monkeypatch.setattr(pacing, "find_meter", lambda unit: lambda: float(next(readings)))
    one = agent(0, step_budget_unit="joules", step_budget=2.0)
    told = one.train(round=1)
    assert (told["train-filters"], told["train-filters-step"]) == (1.0, 1.0)
    assert one.step_cost(1.0) == 1.0
    with pytest.raises(ConfigError, match="step-budget-unit must be one of seconds, joules"):
        config({"step-budget-unit": "watts"})


# --- strain ---


def machine(**changes: Any) -> Any:
    parts: dict[str, Any] = {
        "virtual_memory": SimpleNamespace(available=50, total=100),
        "sensors_battery": None,
        "sensors_temperatures": {},
    }
    tools: dict[str, Callable[[], Any]] = {
        name: (lambda value=value: value) for name, value in (parts | changes).items()
    }
    return SimpleNamespace(**tools)


@pytest.mark.parametrize(
    ("changes", "strain"),
    [
        ({}, ""),
        ({"virtual_memory": SimpleNamespace(available=4, total=100)}, "memory"),
        ({"sensors_battery": SimpleNamespace(power_plugged=False, percent=19)}, "battery"),
        ({"sensors_battery": SimpleNamespace(power_plugged=True, percent=1)}, ""),
        ({"sensors_battery": SimpleNamespace(power_plugged=False, percent=21)}, ""),
        ({"sensors_temperatures": {"cpu": [SimpleNamespace(high=90, current=91)]}}, "temperature"),
        ({"sensors_temperatures": {"cpu": [SimpleNamespace(high=None, current=91)]}}, ""),
    ],
)
def test_what_a_device_is_short_of(changes: dict[str, Any], strain: str) -> None:
    assert find_strain(machine(**changes)) == strain


def test_a_machine_without_sensors_has_no_strain() -> None:
    bare = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=50, total=100))
    assert find_strain(bare) == ""


def test_a_strain_lowers_the_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "find_strain", lambda: "battery")
    one = agent(0, step_budget=1000.0, filters_refresh=1000)
    told = [one.train(round=round)["train-filters"] for round in range(1, 6)]
    assert told == [1.0, 1.0, 1.0, 0.75, 0.75]
    assert int(one.model.masks()[GATES[0]].sum()) == 5


# --- on the clock of a simulated fleet ---


def own_cost(index: int, round: int, share: float) -> float:
    return 0.2 + 0.3 * share


@pytest.mark.parametrize("schedule", ["rounds", "async"])
def test_devices_choose_by_the_clock_of_their_speeds(schedule: str, tmp_path: Path) -> None:
    options = {"speeds": "1, 1, 4", "schedule": schedule, "step_seconds": own_cost}
    agents, record, _ = run(tmp_path, "timed", **options)
    lines = read_run(record.path).relay[:-1]
    for line in lines:
        for entry in line["decisions"]:
            cost = own_cost(entry["agent"], entry["round"], entry["share"])
            assert entry["spent"] == pytest.approx((4.0 if entry["agent"] == 2 else 1.0) * cost)
    assert shares(record, 0) == [1.0] * 7
    assert max(shares(record, 2)) < 1.0
    steps = agents[0].config.num_steps(agents[0].data.train.num_examples)
    last = [steps * max(entry["spent"] for entry in line["decisions"]) for line in lines]
    assert lines[-1]["clock"] == pytest.approx(sum(last))  # the slowest is so in every round


def test_no_device_goes_by_the_machines_clock_beside_a_virtual_one() -> None:
    with pytest.raises(
        ConfigError, match=r"on a virtual clock they need step_seconds; .*Pass step_sec"
    ):
        simulate(fleet(), RING, num_rounds=1, speeds="1, 2")
