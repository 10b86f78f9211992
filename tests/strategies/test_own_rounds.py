"""Flower without a barrier: whoever answers gets its next parcel at once."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import RosterError, Topology, read_run, simulate
from flower_mcepl.record.reading import Run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.strategies import own_rounds, rounds, waiting
from tests.fleet.agents import make_fleet
from tests.fleet.flower import agent_grid, gossip, sent_round
from tests.strategies.test_late_answers import Clock, DelayedGrid, delayed_grid

ASYNC: dict[str, Any] = {"schedule": "async", "checkpoint_every": 0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (waiting, own_rounds, rounds):
        monkeypatch.setattr(module, "time", clock)
    return clock


def recorded(folder: Path) -> Run:
    (path,) = folder.glob("*-gossip*")
    return read_run(path)


def lines(run: Run) -> list[Any]:
    keys = ("round", "answered", "frames", "train_loss", "missing", "failed")
    return [{key: line[key] for key in keys} for line in run.relay]


def rows(run: Run) -> list[Any]:
    dropped = ("seconds",)
    return [{k: v for k, v in row.items() if k not in dropped} for row in run.rounds]


def replayed(folder: Path, run: Run, *, num_rounds: int, **options: Any) -> Run:
    record = RunRecord.create(folder, name="again", config={})
    agents = make_fleet(run.num_agents)
    simulate(
        agents,
        Topology.ring(run.num_agents),
        num_rounds=num_rounds,
        evaluate_every=2,
        schedule="async",
        events=run.path,
        record=record,
        **options,
    )
    return read_run(record.path)


def test_where_all_answer_at_once_it_is_a_run_by_rounds(tmp_path: Path) -> None:
    for name, options in (("own", ASYNC), ("rounds", {})):
        gossip(agent_grid(4), rounds=5, record=tmp_path / name, **options)
    own, by_rounds = recorded(tmp_path / "own"), recorded(tmp_path / "rounds")
    assert lines(own) == lines(by_rounds)
    values = ("round", "agent", "accuracy", "loss", "sent_bytes", "received_bytes")
    assert [[row[key] for key in values] for row in own.rounds] == [
        [row[key] for key in values] for row in by_rounds.rounds
    ]
    assert own.finished
    assert own.result()["mean"] == by_rounds.result()["mean"]


@pytest.mark.parametrize("options", [{}, {"age_decay": 0.6, "max_staleness": 2}])
def test_its_events_give_the_same_bits_in_a_simulation(
    options: dict[str, Any], clock: Clock, tmp_path: Path
) -> None:
    speeds = [1.0, 2.3, 7.9, 1.4]
    grid = delayed_grid(4, clock, lambda node, round: speeds[node - 1000] + round % 2)
    gossip(grid, rounds=7, record=tmp_path, **ASYNC, **options)
    run = recorded(tmp_path)
    assert len(run.events) > 9  # they did not go through rounds together
    again = replayed(tmp_path, run, num_rounds=7, **options)
    assert lines(again) == lines(run)
    assert rows(again) == rows(run)
    assert again.events == run.events
    assert run.finished
    # one message of each is under way at a time, each of its own next round
    for node in range(1000, 1004):
        sent = [sent_round(m) for m in grid.log if m.metadata.dst_node_id == node]
        assert sent == [*range(1, 9)]


def test_a_fast_agent_does_not_wait_for_a_slow_one(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(3, clock, lambda node, round: 25.0 if node == 1002 and round > 1 else 5.0)
    gossip(grid, rounds=99, time_budget=200.0, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    counts = {agent: row["round"] for agent, row in run.final().items()}
    assert counts[0] == counts[1]
    # the first round is one of all, in which this one is fast, too
    assert 4.8 * (counts[2] - 1) <= counts[0] - 1
    assert run.result()["agents"] == 3
    assert run.stopped_early == {"round": counts[0], "planned": 99, "fewest": counts[2]}
    assert all(row["round"] % 2 == 0 or row.get("closing") for row in run.rounds)
    assert replayed(tmp_path, run, num_rounds=99).result() == run.result()


def test_a_node_that_goes_away_and_comes_back(clock: Clock, tmp_path: Path) -> None:
    """The others go on; it goes on where it was, and the record says what was lost."""
    grid = delayed_grid(4, clock, lambda node, round: 2.0)
    away: Callable[[int], None] = grid.down.add
    at(grid, {(1000, 4): lambda: away(1003), (1000, 7): grid.down.clear})
    gossip(grid, rounds=9, wait_timeout=60.0, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    assert run.finished
    assert {agent: row["round"] for agent, row in run.final().items()} == dict.fromkeys(range(4), 9)
    assert [event["failed"] for event in run.events if event.get("failed")] == [[3]]
    assert any("went away" in str(line["failed"]) for line in run.relay)
    sent = [sent_round(m) for m in grid.log if m.metadata.dst_node_id == 1003]
    assert sent == [*range(1, 11)]  # no round comes twice, and it never started afresh
    assert [line["fresh"] for line in run.relay[1:]] == [[]] * 9


def test_a_node_that_comes_back_under_another_id_is_asked_who_it_is(
    clock: Clock, tmp_path: Path
) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 2.0)

    def leave() -> None:
        grid.down.add(1003)

    def come() -> None:
        grid.add_node(2003, 3)
        grid.contexts[2003].state = grid.contexts[1003].state

    at(grid, {(1000, 4): leave, (1000, 6): come})
    gossip(grid, rounds=9, wait_timeout=60.0, takeover=True, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    assert {agent: row["round"] for agent, row in run.final().items()} == dict.fromkeys(range(4), 9)
    orders = [m for m in grid.log if "order" in m.content]
    assert min(sent_round(m) for m in orders if m.metadata.dst_node_id == 2003) > 2


def test_a_node_that_does_not_say_who_it_is_is_not_asked_in_every_look(
    clock: Clock, tmp_path: Path
) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 2.0)

    def come() -> None:
        grid.add_node(2000, None)
        grid.unavailable.add(2000)

    at(grid, {(1000, 3): come})
    gossip(grid, rounds=9, record=tmp_path, **ASYNC)
    asked = [m for m in grid.log if m.metadata.dst_node_id == 2000]
    assert 1 <= len(asked) <= 2  # by a query, and a train message
    assert recorded(tmp_path).finished


def test_a_node_that_stays_away_has_left(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 2.0)
    at(grid, {(1000, 4): lambda: grid.down.add(1003)})
    gossip(grid, rounds=6, wait_timeout=30.0, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    assert run.finished
    assert {row["agent"] for row in run.rounds if row.get("closing")} == {0, 1, 2}
    assert clock.now < 100.0


def test_too_few_agents_end_the_run(clock: Clock, tmp_path: Path) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 2.0)
    at(grid, {(1000, 4): lambda: grid.down.update({1001, 1002, 1003})})
    with pytest.raises(RosterError, match=r"needs 3 agents, but 1 took part; missing: 1, 2, 3"):
        gossip(grid, rounds=9, wait_timeout=5.0, record=tmp_path, **ASYNC)
    assert recorded(tmp_path).status == "failed"


def test_an_agent_whose_messages_fail_is_tried_again_after_a_pause(
    clock: Clock, tmp_path: Path
) -> None:
    grid = delayed_grid(4, clock, lambda node, round: 2.0)
    tries: list[float] = []
    reply = grid._reply

    def failing(node: int, message: Any) -> Any:
        if node == 1003 and 2 <= len(tries) + sent_round(message) and len(tries) < 3:
            tries.append(clock.now)
            grid.unavailable.add(node)
            try:
                return reply(node, message)
            finally:
                grid.unavailable.discard(node)
        return reply(node, message)

    grid._reply = failing  # type: ignore[method-assign]
    gossip(grid, rounds=9, wait_timeout=30.0, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    assert len(tries) == 3
    pauses = [b - a for a, b in itertools.pairwise(tries)]
    assert pauses[0] >= 1.0
    assert pauses[1] >= 2.0
    assert run.finished
    assert [event["failed"] for event in run.events if event.get("failed")] == [[3]] * 3


def at(grid: DelayedGrid, steps: dict[tuple[int, int], Callable[[], None]]) -> None:
    """Let things happen when a node gets the message of a round."""
    todo, push = dict(steps), grid.push_messages

    def pushed(messages: Any) -> Any:
        for message in messages:
            if "order" in message.content:
                key = (message.metadata.dst_node_id, sent_round(message))
                todo.pop(key, lambda: None)()
        return push(messages)

    grid.push_messages = pushed  # type: ignore[method-assign]
