"""A failed evaluation costs the evaluation, and nothing of what was learned."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_mcepl import MceplAgent, Topology, read_run, simulate
from flower_mcepl.clients import NeighborAverageMod, neighbor_average_mod
from flower_mcepl.exchange.turn import evaluate
from flower_mcepl.record.reading import Run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.table import agent_table
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import make_agent
from tests.fleet.flower import agent_grid, gossip
from tests.fleet.grid import InProcessGrid

Metrics = Callable[[], dict[str, Any]]


def fail() -> dict[str, Any]:
    raise ZeroDivisionError("no test images\nof any kind")


TOLD = {"accuracy": 0.5, "loss": 1.0, "num-examples": 4, "density": 1.0}


def agent_that(evaluates: Metrics, index: int) -> MceplAgent:
    agent = make_agent(index)
    agent.evaluate = evaluates  # type: ignore[method-assign]
    return agent


def only_run(folder: Path) -> Run:
    (path,) = folder.iterdir()
    return read_run(path)


def frames(run: Run) -> list[Any]:
    return [line["frames"] for line in run.relay]


@pytest.mark.parametrize(
    ("evaluates", "reason"),
    [
        (fail, "ZeroDivisionError: no test images"),
        (lambda: {"accuracy": 33.3, "loss": 1.0}, "is a fraction in 0..1; got 33.3. Divide it"),
        (lambda: {"accuracy": math.nan}, "is a fraction in 0..1; got nan"),
        (lambda: {"f1": 0.5}, "an evaluation needs an accuracy or a loss; got f1"),
        (lambda: {**TOLD, "num-examples": -1}, "num-examples must be a whole number in 0.."),
        (lambda: {**TOLD, "num-examples": 2.5}, "num-examples must be a whole number in 0.."),
        (lambda: {**TOLD, "perplexity": 1e200}, "metric perplexity must be a finite number up to"),
        (lambda: {**TOLD, "spread": math.inf}, "metric spread must be a finite number up to"),
        (lambda: {**TOLD, "loss": 1e200}, "metric loss must be a finite number up to"),
    ],
)
def test_an_evaluation_that_fails_costs_no_training(
    evaluates: Metrics, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    gossip(agent_grid(3), rounds=5, record=tmp_path / "whole")
    grid = agent_grid(3, lambda i: agent_that(evaluates, i) if i == 1 else make_agent(i))
    gossip(grid, rounds=5, record=tmp_path / "fenced")
    whole, fenced = only_run(tmp_path / "whole"), only_run(tmp_path / "fenced")
    assert fenced.status == "finished"
    assert frames(fenced) == frames(whole)  # every agent trained in every round, to the same bits
    assert all(line["answered"] == 3 for line in fenced.relay)
    assert {row["agent"] for row in fenced.rounds} == {0, 2}
    errors = {line["round"]: line.get("evaluation_errors") for line in fenced.relay}
    assert {round for round, error in errors.items() if error} == {3, 5, 6}
    assert reason in errors[3]["1"]
    lines = [message for message in caplog.messages if "could not evaluate" in message]
    assert len(lines) == 1  # of three evaluations
    assert lines[0].startswith("round 3: 1 of 3 agents could not evaluate, and went on; agent 1: ")
    assert reason in lines[0]
    assert fenced.coverage() == "2 of 3 agents"


def test_the_whole_reason_stands_once_in_the_record(tmp_path: Path) -> None:
    gossip(agent_grid(3, lambda i: agent_that(fail, i)), rounds=5, record=tmp_path)
    text = (only_run(tmp_path).path / "failures.txt").read_text()
    assert text == (
        "round 3, agent 0, evaluation: ZeroDivisionError: no test images\n    of any kind\n\n"
    )


def test_simulate_has_the_same_fence(tmp_path: Path) -> None:
    agents = [agent_that(fail, i) if i == 0 else make_agent(i) for i in range(3)]
    lines: list[str] = []
    record = RunRecord.create(tmp_path, name="x", config={})
    result = simulate(
        agents,
        Topology.ring(3),
        num_rounds=2,
        evaluate_every=1,
        record=record,
        log=lines.append,
    )
    assert result.summary["status"] == "finished"
    assert (result.summary["accuracy"]["agents"], result.summary["accuracy"]["of"]) == (2, 3)
    assert sum("ZeroDivisionError: no test images" in line for line in lines) == 1
    assert sorted(read_run(record.path).agents) == [0, 1, 2]  # final states are kept


def test_a_resumed_run_writes_no_failure_again(tmp_path: Path) -> None:
    def stop(round: int, agent: int, reply: object) -> None:
        if round == 4:
            raise KeyboardInterrupt

    def both() -> list[MceplAgent]:
        return [agent_that(fail, agent) for agent in range(2)]

    record = RunRecord.create(tmp_path, name="x", config={})
    options: dict[str, Any] = {"num_rounds": 4, "evaluate_every": 1, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        simulate(both(), Topology.ring(2), record=record, on_reply=stop, **options)
    written = (record.path / "failures.txt").read_bytes()
    assert written.count(b"no test images") == 1
    simulate(both(), Topology.ring(2), resume=record.path, **options)
    assert (record.path / "failures.txt").read_bytes() == written


def test_a_loss_alone_is_an_evaluation(tmp_path: Path) -> None:
    metrics = {"loss": 0.25, "num-examples": 4, "density": 1.0}
    strategy = gossip(agent_grid(2, lambda i: agent_that(lambda: metrics, i)), record=tmp_path)
    run = only_run(tmp_path)
    assert {(row["accuracy"], row["loss"]) for row in run.rounds} == {(None, 0.25)}
    of_round = strategy.monitor.evaluations()[4]
    assert (of_round["loss"], of_round["num-agents"]) == (0.25, 2)
    assert run.accuracy()["mean"] is None


def test_a_text_of_any_length_is_cut_for_the_wire(tmp_path: Path) -> None:
    def fail_at_length() -> dict[str, Any]:
        raise ValueError("x" * 10**6)

    gossip(agent_grid(2, lambda i: agent_that(fail_at_length, i)), record=tmp_path)
    run = only_run(tmp_path)
    assert run.status == "finished"
    assert len(run.relay[2]["evaluation_errors"]["0"]) == 200
    assert len((run.path / "failures.txt").read_text()) < 1100


def test_no_metrics_are_no_error() -> None:
    assert evaluate(agent_that(dict, 0)) == ({}, "")


# --- apps written for FedAvg


def fedavg_app(
    answer: Callable[[], dict[str, Any]] | None, mod: Any = neighbor_average_mod
) -> ClientApp:
    app = ClientApp(mods=[mod])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        new = {name: Array(x.numpy() + 1) for name, x in msg.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=msg)

    if answer is not None:

        @app.evaluate()
        def evaluate(msg: Message, context: Context) -> Message:
            return Message(RecordDict({"metrics": MetricRecord(answer())}), reply_to=msg)

    return app


def run_app(app: ClientApp, folder: Path) -> Run:
    strategy = GossipStrategy(Topology.ring(3), evaluate_every=1, record=folder, wait_timeout=0.01)
    initial = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    grid = InProcessGrid(app, 3)
    strategy.start(grid, initial_arrays=initial, num_rounds=3, timeout=30.0)
    return only_run(folder)


def no_answer() -> dict[str, Any]:
    raise KeyError("label")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (no_answer, "KeyError: 'label'"),
        (lambda: {"accuracy": 81.5, "num-examples": 4}, "the app's accuracy is 81.5. Divide it"),
        (lambda: {"rmse": 0.5, "num-examples": 4}, "needs an accuracy or a loss"),
        (lambda: {"accuracy": 0.5}, "need 'num-examples' among the metrics"),
        (lambda: {"accuracy": 0.5, "num-examples": -1}, "Add it, a number >= 0"),
        (lambda: {"accuracy": 0.5, "num-examples": math.nan}, "Add it, a number >= 0"),
        (lambda: {"accuracy": [0.5], "num-examples": 4}, "an accuracy or a loss, one number"),
        (lambda: {"loss": 1e200, "num-examples": 4}, "metric loss must be a finite number"),
    ],
)
def test_an_app_trains_whatever_its_evaluation_does(
    answer: Callable[[], dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    run = run_app(fedavg_app(answer), tmp_path / "fenced")
    assert run.status == "finished"
    assert all(line["answered"] == 3 for line in run.relay)
    assert all(reason in error for error in run.relay[1]["evaluation_errors"].values())
    whole = run_app(fedavg_app(lambda: {"accuracy": 0.5, "num-examples": 4}), tmp_path / "whole")
    assert frames(run) == frames(whole)


def test_an_app_with_a_loss_alone_is_evaluated(tmp_path: Path) -> None:
    run = run_app(fedavg_app(lambda: {"eval_loss": 0.5, "num-examples": 4}), tmp_path)
    assert [row["loss"] for row in run.rounds] == [0.5] * 9
    assert "evaluation_errors" not in run.relay[1]


@pytest.mark.parametrize("mod", [neighbor_average_mod, NeighborAverageMod(evaluate=False)])
def test_an_app_without_an_evaluate_function_answers_the_closing(mod: Any, tmp_path: Path) -> None:
    run = run_app(fedavg_app(None, mod), tmp_path)
    assert (run.status, run.rounds) == ("finished", [])
    assert [line["answered"] for line in run.relay] == [3] * 4


@pytest.mark.parametrize("schedule", ["rounds", "async"])
@pytest.mark.parametrize("failing", [(), (1,), (0, 1, 2)])
def test_a_result_of_no_closing_evaluation_says_so(
    schedule: str, failing: tuple[int, ...], tmp_path: Path
) -> None:
    def fails_at_last(agent: MceplAgent) -> MceplAgent:
        calls = iter((agent.evaluate, fail))
        agent.evaluate = lambda: next(calls)()  # type: ignore[method-assign]
        return agent

    agents = [fails_at_last(make_agent(i)) if i in failing else make_agent(i) for i in range(3)]
    record = RunRecord.create(tmp_path, name="x", config={})
    simulate(
        agents,
        Topology.ring(3),
        num_rounds=4,
        evaluate_every=2,
        schedule=schedule,
        record=record,
    )
    run = read_run(record.path)
    assert run.finished
    late = len(failing) == 3
    assert ("no evaluation came after the last round, 4: this" in agent_table(run)) == late
    assert run.result()["round"] == (2 if late else 4)
