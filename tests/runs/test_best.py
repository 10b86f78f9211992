"""Best states and early stopping in one process: what is kept, and when a run ends."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError, RunRecord, Topology, read_run, simulate
from flower_mcepl.agents import ALGORITHMS, AgentState, load_state
from flower_mcepl.exchange.turn import open_mail
from flower_mcepl.report.table import agent_table, headline
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import RunSettings
from tests.fleet.agents import make_agent, make_fleet, same_tensors
from tests.fleet.choosers import chooser_of, choosers
from tests.fleet.message_runs import ScriptedAgent
from tests.record.test_selection import slow_stop
from tests.runs.test_resumption import Interruption, assert_same_records, plain_rows

ROUNDS = 14
SELECTION = {"keep_best": True, "patience": 2}
OPTIONS = {"num_rounds": ROUNDS, "evaluate_every": 1, **SELECTION}


# --- which state is the best ---


class Rounds(ScriptedAgent):
    """Says which round it is in, and by what it is judged."""

    round = 0

    def __init__(self, main: str, higher: bool) -> None:
        super().__init__(0)
        self.main, self.higher = main, higher

    def state(self) -> AgentState:
        return AgentState({"round": self.round}, {})

    def describe(self) -> dict[str, Any]:
        return {"agent": 0, "main-metric": self.main, "higher-is-better": self.higher}


values = st.sampled_from([0.0, 0.25, 0.5, 0.75, None, math.nan, math.inf])


def slow_best(history: list[float | None], *, higher: bool) -> int | None:
    known = [v for v in history if v is not None and math.isfinite(v)]
    if not known:
        return None
    return 1 + history.index(max(known) if higher else min(known))


@given(history=st.lists(values, max_size=8), higher=st.booleans())
def test_the_best_state_is_the_earliest_with_the_best_value(
    history: list[float | None], higher: bool
) -> None:
    agent, keeper = Rounds("score", higher), BestState()
    told: dict[str, float] = {}
    for agent.round, value in enumerate(history, start=1):
        evaluation = {} if value is None else {"score": value}
        told = keeper.consider(agent, {"density": 1.0, **evaluation}, round=agent.round)
    best = slow_best(history, higher=higher)
    assert (keeper.state and keeper.state.facts["round"]) == best
    assert told == (
        {} if best is None else {"keep-best-round": best, "keep-best-value": history[best - 1]}
    )


@given(history=st.lists(st.tuples(values, values), max_size=6))
def test_a_loss_counts_until_there_is_a_value_of_the_main_metric(
    history: list[tuple[float | None, float | None]],
) -> None:
    agent, keeper = Rounds("accuracy", True), BestState()
    for agent.round, (accuracy, loss) in enumerate(history, start=1):
        evaluation = {"accuracy": accuracy, "loss": loss}
        told = {k: v for k, v in evaluation.items() if v is not None}
        keeper.consider(agent, told, round=agent.round)
    best = slow_best([a for a, _ in history], higher=True)
    best = best or slow_best([loss for _, loss in history], higher=False)
    assert (keeper.state and keeper.state.facts["round"]) == best


def test_a_best_state_stays_as_it_was_while_the_agent_trains_on() -> None:
    """Whether or not an algorithm's state shares the memory of its weights."""
    weights = np.zeros(3)

    class Sharing(Rounds):
        def state(self) -> AgentState:
            return AgentState({}, {"weights": weights})

    keeper = BestState()
    keeper.consider(Sharing("accuracy", True), {"accuracy": 0.5}, round=1)
    weights += 1
    assert keeper.state is not None
    assert not keeper.state.arrays["weights"].any()


def test_a_generation_carries_the_best_state() -> None:
    agent, keeper = make_agent(0), BestState()
    mail = open_mail(agent, max_staleness=5, keeper=keeper)
    without = Generation.of(agent, mail, run="0" * 16, round=1)
    assert Generation.decode(without.encode()).best is None
    keeper.consider(agent, {"accuracy": 0.5}, round=1)
    agent.train(round=2)
    generation = Generation.decode(Generation.of(agent, mail, run="0" * 16, round=2).encode())
    other = open_mail(agent, max_staleness=5, keeper=BestState())
    generation.restore(make_agent(0), other)
    assert other.keeper is not None
    assert keeper.state is not None
    assert other.keeper.state is not None
    assert other.keeper.state.facts == keeper.state.facts
    assert same_tensors(other.keeper.state.tensors, without.state.tensors)  # not those trained
    assert not same_tensors(generation.state.tensors, without.state.tensors)


# --- whole runs ---


def run(path: Path, algorithm: str = "mcepl", **options: Any) -> Any:
    record = RunRecord.create(path, name=algorithm, config={})
    simulate(**choosers(algorithm), **{**OPTIONS, "record": record, **options})
    return read_run(record.path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("stopped"))


def test_a_run_stops_as_the_slow_rule_says(stopped: Any, tmp_path: Path) -> None:
    whole = run(tmp_path, patience=0)
    assert whole.summary["num_rounds"] == ROUNDS
    assert "stopped_early" not in whole.summary
    accuracies: list[dict[int, float]] = []
    for rows in whole.by_round().values():
        accuracies.append({row["agent"]: row["accuracy"] for row in rows})
    seen = next(n for n in range(1, ROUNDS) if slow_stop(accuracies[:n], whole.metric, 2))
    last = seen + 2  # the round that learned of it, and one more
    assert last < ROUNDS
    assert stopped.status == "finished"
    assert stopped.num_rounds == last
    assert stopped.config["num_rounds"] == ROUNDS
    means = [mean for _, mean, *_ in whole.curve()[:seen]]
    assert stopped.stopped_early == {
        "round": last,
        "planned": ROUNDS,
        "patience": 2,
        "best_round": 1 + means.index(max(means)),
        "best": max(means),
    }
    mine, other = (plain_rows(r.path, "rounds.jsonl") for r in (stopped, whole))
    assert mine == other[: len(mine)]  # schedules and all else are those of the whole run
    assert len(mine) == 4 * last
    told = f"finished (stopped early, of {ROUNDS} rounds: no better accuracy in the 2 evaluations"
    assert told in headline(stopped)
    assert "stopped" not in headline(whole)


def test_a_stop_that_saves_no_round_is_none(stopped: Any, tmp_path: Path) -> None:
    last = stopped.num_rounds
    for rounds in (last, last - 1):
        assert not run(tmp_path, num_rounds=rounds).stopped_early
    assert run(tmp_path, num_rounds=last + 1).stopped_early["round"] == last


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_best_state_is_the_one_that_was_evaluated(algorithm: str, tmp_path: Path) -> None:
    """A fresh agent that gets it evaluates to the value told, to the bit."""
    found = run(tmp_path, algorithm, num_rounds=5, patience=0)
    assert found.summary["best"] == found.best_states()
    assert [entry["agent"] for entry in found.best_states()] == [*found.best_agents] == [0, 1, 2, 3]
    for entry in found.best_states():
        agent = entry["agent"]
        own = [row for row in found.rounds if row["agent"] == agent]
        history = [row["accuracy"] for row in own]
        assert entry["value"] == max(history)
        assert entry["round"] == own[history.index(max(history))]["round"]
        fresh = chooser_of(algorithm, agent)
        fresh.restore(load_state(found.best_agents[agent]))
        told = own[history.index(max(history))]
        again = fresh.evaluate()
        assert (again["accuracy"], again["loss"]) == (told["accuracy"], told["loss"])
    assert "best states kept: accuracy" in agent_table(found)
    assert "on the validation split, by which they were chosen" in agent_table(found)


@pytest.mark.parametrize("algorithm", ["mcepl", "fedavg"])
def test_selection_changes_no_bit_of_what_is_learned(algorithm: str, tmp_path: Path) -> None:
    one = run(tmp_path, algorithm, num_rounds=4, patience=0)
    two = run(tmp_path, algorithm, num_rounds=4, patience=0, keep_best=False)
    assert [line["frames"] for line in one.relay] == [line["frames"] for line in two.relay]
    told = {"best_round", "best_value"}
    assert plain_rows(two.path, "rounds.jsonl") == [
        {key: value for key, value in row.items() if key not in told}
        for row in plain_rows(one.path, "rounds.jsonl")
    ]
    assert not two.best_agents
    assert "best" not in (two.summary or {})


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_chooses_as_one_that_was_never_interrupted(
    every: int, stopped: Any, tmp_path: Path
) -> None:
    """Broken off in every round, that of the decision, the last and the closing too."""
    for at in range(every + 1, stopped.num_rounds + 2):

        def stumble(round: int, agent: int, reply: object, at: int = at) -> None:
            if (round, agent) == (at, 2):
                raise Interruption

        record = RunRecord.create(tmp_path, name=f"at-{at}", config={})
        with pytest.raises(Interruption):
            simulate(
                **choosers(),
                **OPTIONS,
                checkpoint_every=every,
                record=record,
                on_reply=stumble,
            )
        simulate(**choosers(), **OPTIONS, checkpoint_every=every, resume=record.path)
        resumed = read_run(record.path)
        assert_same_records(record.path, stopped.path)
        assert resumed.stopped_early == stopped.stopped_early
        assert resumed.best_states() == stopped.best_states()


def test_more_rounds_do_not_undo_a_stop(stopped: Any, tmp_path: Path) -> None:
    def stumble(round: int, agent: int, reply: object) -> None:
        if round == stopped.num_rounds + 1:
            raise Interruption

    record = RunRecord.create(tmp_path, name="closing", config={})
    with pytest.raises(Interruption):
        simulate(**choosers(), **OPTIONS, checkpoint_every=1, record=record, on_reply=stumble)
    longer = {**OPTIONS, "num_rounds": ROUNDS + 9}
    simulate(**choosers(), **longer, resume=record.path)
    assert_same_records(record.path, stopped.path)


# --- what is refused ---


@pytest.mark.parametrize("setting", [{"keep_best": True}, {"patience": 3}])
def test_nothing_is_chosen_by_test_examples(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate-on must be \"validation\"; got 'test'"):
        RunSettings(**setting)
    RunSettings(**setting, evaluate_on="validation")
    record = RunRecord.create(tmp_path, name="test", config={})
    with pytest.raises(ConfigError, match="agent 0 is evaluated on its test split"):
        simulate(make_fleet(3), Topology.ring(3), num_rounds=2, record=record, **setting)
    assert (record.path / "rounds.jsonl").read_text() == ""


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best states are part of a run record"):
        simulate(**choosers(), num_rounds=2, keep_best=True)
    for make in (RunSettings, lambda **more: simulate(**choosers(), num_rounds=2, **more)):
        with pytest.raises(ConfigError, match=r"patience must be >= 0 evaluations .* got -1"):
            make(patience=-1)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"patience": 3}, "patience was 2 and is now 3"),
        ({"keep_best": False}, "keep_best was True and is now False"),
    ],
)
def test_a_run_is_resumed_with_the_selection_it_began_with(
    now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def stumble(round: int, agent: int, reply: object) -> None:
        if round == 2:
            raise Interruption

    record = RunRecord.create(tmp_path, name="broken", config={})
    with pytest.raises(Interruption):
        simulate(**choosers(), **OPTIONS, checkpoint_every=1, record=record, on_reply=stumble)
    with pytest.raises(ConfigError, match=message):
        simulate(**choosers(), **{**OPTIONS, **now}, resume=record.path)


def test_a_run_from_before_there_were_these_settings_is_resumed(tmp_path: Path) -> None:
    def stumble(round: int, agent: int, reply: object) -> None:
        if round == 2:
            raise Interruption

    record = RunRecord.create(tmp_path, name="old", config={})
    options: dict[str, Any] = {"num_rounds": 3, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        simulate(**choosers(), **options, record=record, on_reply=stumble)
    config = json.loads((record.path / "config.json").read_text())
    assert (config.pop("keep_best"), config.pop("patience")) == (False, 0)
    (record.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="patience was 0 and is now 2"):
        simulate(**choosers(), **options, patience=2, resume=record.path)
    simulate(**choosers(), **options, resume=record.path)
    assert read_run(record.path).status == "finished"
