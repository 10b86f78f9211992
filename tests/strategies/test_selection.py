"""Best states and early stopping through Flower's messages: as `simulate` has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_mcepl import (
    AgentData,
    RosterError,
    RunRecord,
    Topology,
    read_run,
    shared_module,
    simulate,
)
from flower_mcepl.agents import load_state, make_agent
from flower_mcepl.clients import app as client_module
from flower_mcepl.clients import make_agent_app, memory, neighbor_average_mod
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.record.reading import Run
from flower_mcepl.runs.store import device_store
from flower_mcepl.strategies import GossipStrategy, ServerStrategy, handover, waiting
from tests.fleet.agents import same_tensors
from tests.fleet.choosers import SEED, chooser_of, choosers
from tests.fleet.flower import agent_grid, gossip, state_of
from tests.fleet.grid import InProcessGrid
from tests.oracles.baselines import blobs, run_config, server_of, two_layers
from tests.runs.test_resumption import Interruption, plain_rows
from tests.strategies.test_late_answers import Clock

ROUNDS, SIZE = 14, 4
OPTIONS: dict[str, Any] = {"evaluate_every": 1, "keep_best": True, "patience": 2}
# of each algorithm the settings with which it soon has learned what it can
ALGORITHMS: dict[str, dict[str, Any]] = {"mcepl": {}, "fedavg": {"lr": 1.0}}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs of `simulate`."""
    runs: dict[str, Run] = {}

    def of(algorithm: str) -> Run:
        if algorithm not in runs:
            record = RunRecord.create(tmp_path_factory.mktemp("oracle"), name="oracle", config={})
            fleet = choosers(algorithm, **ALGORITHMS[algorithm])
            simulate(**fleet, **OPTIONS, num_rounds=ROUNDS, record=record)
            runs[algorithm] = read_run(record.path)
        return runs[algorithm]

    return of


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clients think that they are in Flower's simulation."""
    for module in (client_module, memory, handover):
        monkeypatch.setattr(module, "in_simulation", lambda: True)


def new_grid(algorithm: str = "mcepl", **node_config: Any) -> InProcessGrid:
    client_module._agents.clear()
    settings = ALGORITHMS[algorithm]
    app = make_agent_app(lambda context: chooser_of(algorithm, agent_index(context), **settings))
    grid = InProcessGrid(app, 0)
    for index in range(SIZE):
        grid.add_node(1000 + index, index, **node_config)
    return grid


def start(
    grid: InProcessGrid, algorithm: str = "mcepl", *, stop: int | None = None, **options: Any
) -> Run:
    options = {"wait_timeout": 0.01, **OPTIONS, **options}
    strategy: GossipStrategy | ServerStrategy = (
        GossipStrategy(Topology.ring(SIZE), **options)
        if algorithm == "mcepl"
        else ServerStrategy(server_of(algorithm, **ALGORITHMS[algorithm]), **options)
    )

    def look(round: int, _: object) -> None:
        if round == stop:
            raise Interruption

    if stop is None:
        strategy.start(grid, num_rounds=ROUNDS, timeout=30.0)
    else:
        with pytest.raises(Interruption):
            strategy.start(grid, num_rounds=ROUNDS, timeout=30.0, evaluate_fn=look)
    assert strategy.record is not None
    return read_run(strategy.record.path)


def assert_chosen_alike(run: Run, expected: Run) -> None:
    assert run.status == "finished"
    assert run.num_rounds == expected.num_rounds < ROUNDS
    assert run.stopped_early == expected.stopped_early
    assert run.best_states() == expected.best_states()
    assert run.summary is not None
    assert expected.summary is not None
    assert run.summary["best"] == expected.summary["best"]
    assert plain_rows(run.path, "rounds.jsonl") == plain_rows(expected.path, "rounds.jsonl")
    assert [line["frames"] for line in run.relay] == [line["frames"] for line in expected.relay]


def assert_same_states(found: dict[int, Path], expected: dict[int, Path]) -> None:
    assert [*found] == [*expected] == [*range(SIZE)]
    for agent, path in expected.items():
        mine, other = load_state(found[agent]), load_state(path)
        assert mine.facts == other.facts
        assert same_tensors(mine.tensors, other.tensors)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_of_flower_chooses_as_simulate(
    algorithm: str, expected: Callable[[str], Run], tmp_path: Path
) -> None:
    run = start(new_grid(algorithm), algorithm, record=tmp_path)
    assert_chosen_alike(run, expected(algorithm))
    assert_same_states(run.agents, expected(algorithm).agents)
    assert_same_states(run.best_agents, expected(algorithm).best_agents)


@pytest.mark.slow
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_of_flower_chooses_as_an_undisturbed_one(
    algorithm: str, expected: Callable[[str], Run], tmp_path: Path
) -> None:
    last = expected(algorithm).num_rounds
    for stop in {2, last - 2, last - 1, last}:
        broken = start(
            new_grid(algorithm), algorithm, stop=stop, record=tmp_path, checkpoint_every=2
        )
        run = start(new_grid(algorithm), algorithm, resume=broken.path, checkpoint_every=2)
        assert_chosen_alike(run, expected(algorithm))
        assert_same_states(run.agents, expected(algorithm).agents)
        assert_same_states(run.best_agents, expected(algorithm).best_agents)


def test_a_device_keeps_its_best_state_on_its_disk(
    expected: Callable[[str], Run], tmp_path: Path
) -> None:
    on_disk = {"state-dir": str(tmp_path / "states")}
    broken = start(new_grid(**on_disk), stop=3, record=tmp_path / "runs", checkpoint_every=2)
    # new processes on the same disks
    run = start(new_grid(**on_disk), resume=broken.path, checkpoint_every=2)
    assert_chosen_alike(run, expected("mcepl"))
    assert not run.best_agents
    name = run.config["run"]
    for agent, path in expected("mcepl").best_agents.items():
        store = device_store(tmp_path / "states", run=name, agent=agent)
        last = store.load(agent, run=name, before=ROUNDS + 2)
        assert last is not None
        assert last.best is not None
        assert last.best.facts == load_state(path).facts
        assert same_tensors(last.best.tensors, load_state(path).tensors)


def test_an_agent_that_began_afresh_tells_of_the_best_state_that_it_has(tmp_path: Path) -> None:
    """Not of one that it lost: the record must not speak of what is not there."""
    grid = new_grid()

    def forget(round: int, _: object) -> None:
        if round == 4:
            grid.contexts[1002].state.clear()

    strategy = GossipStrategy(
        Topology.ring(SIZE), record=tmp_path, wait_timeout=0.01, **{**OPTIONS, "patience": 0}
    )
    strategy.start(grid, num_rounds=6, timeout=30.0, evaluate_fn=forget)
    assert strategy.record is not None
    told = {entry["agent"]: entry for entry in read_run(strategy.record.path).best_states()}
    assert told[2]["round"] > 4
    for agent in range(SIZE):
        best = state_of(grid.contexts[1000 + agent]).best
        assert best is not None
        assert best.facts["best"] == {
            "metric": "accuracy",
            "round": told[agent]["round"],
            "value": told[agent]["value"],
        }


def test_an_agent_that_is_late_when_a_run_stops_takes_part_in_the_closing(
    expected: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is waited for in the last round, as in that of any run."""
    monkeypatch.setattr(waiting, "time", Clock())
    grid = new_grid()
    decided = expected("mcepl").num_rounds - 1

    def be_late(round: int, _: object) -> None:
        if round == decided - 1:
            grid.slow.add(1003)
        if round == decided:
            grid.slow.clear()
            grid.deliver()

    strategy = GossipStrategy(Topology.ring(SIZE), record=tmp_path, wait_timeout=0.01, **OPTIONS)
    strategy.start(grid, num_rounds=ROUNDS, timeout=60.0, evaluate_fn=be_late)
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert run.status == "finished"
    assert run.stopped_early
    assert [line["missing"] for line in run.relay][decided - 1 :] == [[3], [], []]
    assert run.relay[decided]["late"] == {"3": decided}
    assert len(run.last_evaluated()) == SIZE


def test_one_agent_that_is_evaluated_on_test_examples_is_turned_away(tmp_path: Path) -> None:
    data = AgentData.of(blobs(2), blobs(1002), agent=2)
    module = shared_module(two_layers, seed=SEED)
    odd = make_agent("mcepl", 2, module, data, run_config({}), seed=SEED)
    grid = agent_grid(SIZE, lambda index: odd if index == 2 else chooser_of("mcepl", index))
    gossip(grid, record=tmp_path, min_agents=3, patience=9, incomplete=None)
    (path,) = tmp_path.iterdir()
    run = read_run(path)
    assert "agent 2 is evaluated on its test split" in run.relay[0]["failed"]["node 1002"]
    assert {row["agent"] for row in run.rounds} == {0, 1, 3}


def counting_app() -> ClientApp:
    """An app of FedAvg whose one number is that of the round, and is best at 3."""
    app = ClientApp(mods=[neighbor_average_mod])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        arrays = {"w": Array(np.asarray(msg.content["arrays"]["w"].numpy() + 1))}
        metrics = MetricRecord({"train_loss": 0.0, "num-examples": 1})
        return Message(
            RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=msg
        )

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        loss = float((msg.content["arrays"]["w"].numpy() - 3) ** 2)
        metrics = MetricRecord({"eval_loss": loss, "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app


def test_an_app_of_ones_own_keeps_its_best_arrays(tmp_path: Path) -> None:
    """By the loss, as it tells no accuracy; the run knows in round 6."""
    grid = InProcessGrid(counting_app(), 3)
    strategy = GossipStrategy(Topology.ring(3), record=tmp_path, wait_timeout=0.01, **OPTIONS)
    initial = ArrayRecord({"w": Array(np.array(0, np.float32))})
    strategy.start(grid, initial, num_rounds=ROUNDS, timeout=30.0)
    assert strategy.record is not None
    run = read_run(strategy.record.path)
    assert (run.stopped_early["best_round"], run.stopped_early["round"]) == (3, 7)
    for agent in range(3):
        stored = state_of(grid.contexts[1000 + agent])
        assert stored.best is not None
        assert stored.best.facts["best"] == {"round": 3, "metric": "loss", "value": 0.0}
        assert float(stored.best.arrays["arrays/w"]) == 3
        assert float(stored.state.arrays["arrays/w"]) == 7


def test_a_run_that_keeps_nothing_sends_nothing_of_it(tmp_path: Path) -> None:
    grid = agent_grid(3)
    gossip(grid, record=tmp_path)
    (path,) = tmp_path.iterdir()
    assert not any("keep-best" in message.content["order"] for message in grid.log)
    assert not any("keep-best-round" in reply.content["metrics"] for reply in grid.answers)
    assert state_of(grid.contexts[1000]).best is None
    assert read_run(path).best_states() == []
    assert not any("best_round" in row for row in read_run(path).rounds)


@pytest.mark.parametrize("setting", [{"keep_best": True}, {"patience": 1}])
def test_agents_that_are_evaluated_on_test_examples_end_the_run_in_round_1(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RosterError, match="agent 0 is evaluated on its test split"):
        gossip(agent_grid(3), record=tmp_path, **setting)
    (path,) = tmp_path.iterdir()
    assert read_run(path).status == "failed"
    assert read_run(path).rounds == []
