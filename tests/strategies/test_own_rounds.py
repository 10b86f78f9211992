"""Flower without a barrier: whoever answers gets its next parcel at once."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import (
    IncompleteRunError,
    RosterError,
    Topology,
    TopologyError,
    read_run,
    simulate,
)
from flower_mcepl.agents import load_state
from flower_mcepl.clients import app as client_app
from flower_mcepl.clients import memory
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.record.reading import Run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.book import RunBook, open_book
from flower_mcepl.runs.checkpoint import newest_checkpoint
from flower_mcepl.runs.fleet import Fleet
from flower_mcepl.runs.own_rounds import OwnRounds
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies import GossipStrategy, handover, own_rounds, rounds, waiting
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
    options = {**ASYNC, "checkpoint_every": 1, "takeover": True, "record": tmp_path}
    gossip(grid, rounds=9, wait_timeout=60.0, **options)
    run = recorded(tmp_path)
    assert {agent: row["round"] for agent, row in run.final().items()} == dict.fromkeys(range(4), 9)
    orders = [m for m in grid.log if "order" in m.content and m.metadata.dst_node_id == 2003]
    assert min(map(sent_round, orders)) > 2
    # its device is to keep the states before the parcels that were under way
    first = orders[0].content["order"]["checkpoints"]
    assert first[-1] == sent_round(orders[0]) - 1


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


def test_agents_that_never_answer_are_no_common_failure(clock: Clock, tmp_path: Path) -> None:
    """Two of ten devices are silent after the first round: the others go on."""

    def takes(node: int, round: int) -> float | None:
        return 40.0 if node < 1008 else (None if round > 1 else 5.0)

    grid = delayed_grid(10, clock, takes)
    gossip(
        grid, rounds=8, timeout=50.0, wait_timeout=60.0, record=tmp_path, incomplete=True, **ASYNC
    )
    run = recorded(tmp_path)
    assert run.status == "incomplete"
    closing = {row["agent"] for row in run.rounds if row.get("closing")}
    assert closing == set(range(8))
    assert {run.final()[agent]["round"] for agent in closing} == {8}


def test_a_message_that_was_given_up_fails_no_later_round(clock: Clock, tmp_path: Path) -> None:
    """A node is away for one look; its old message expires as it plays a later one."""

    def takes(node: int, round: int) -> float | None:
        return 5.0 if node != 1003 else {2: None, 3: 55.0}.get(round, 20.0)

    grid = delayed_grid(4, clock, takes)
    at(grid, {(1000, 4): lambda: grid.down.add(1003), (1000, 5): grid.down.clear})
    gossip(grid, rounds=30, timeout=60.0, wait_timeout=600.0, record=tmp_path, **ASYNC)
    run = recorded(tmp_path)
    assert [event["failed"] for event in run.events if event.get("failed")] == [[3]]
    assert [line["round"] for line in run.relay if line["failed"]] == [2]
    assert run.finished


def test_a_late_answer_is_none_to_the_closing(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="x", config={})
    agents = make_fleet(3)
    relay: Relay[bytes] = Relay(
        Topology.ring(3), schedule="async", open_frame=bytes, wrap_frame=bytes
    )
    fleet = Fleet(
        agents,
        engine="loop",
        max_staleness=5,
        age_decay=1.0,
        keep_best=False,
        tell_classes=True,
        on_reply=lambda round, agent, reply: None,
    )

    def play(book: RunBook[bytes]) -> None:
        own = OwnRounds(book, relay, num_agents=3)
        first = fleet.play(range(3), own.give(range(3), clock=0.0))
        own.take({agent: first[agent] for agent in (0, 1)}, clock=1.0)
        own.end()
        closing = fleet.play((0, 1), [own.closing_parcel(agent) for agent in (0, 1)])
        own.close({**closing, 2: replace(first[2], late_of=1)}, clock=2.0)

    def whole() -> None:
        with open_book(relay, {}, num_rounds=1, record=lambda _: record) as book:
            play(book)

    with pytest.raises(IncompleteRunError, match="no answer from these agents: 2"):
        whole()
    last = read_run(record.path).relay[-1]
    assert (last["missing"], last["late"]) == ([2], {"2": 1})


def test_a_graph_that_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="no rounds of all agents in which a graph could chang"):
        GossipStrategy(Topology.parse("random-neighbors:degree=2", num_agents=4, seed=0), **ASYNC)
    settings = {"schedule": "async", "checkpoint-every": 0, "topology": "random-neighbors:degree=2"}
    with pytest.raises(TopologyError, match="Use a graph that stays, or schedule rounds"):
        RunSettings.from_run_config(settings)


# --- runs that break off ---

PACES = [1.0, 2.3, 7.9, 1.4]


def fleet_of(clock: Clock, first: int = 1000) -> DelayedGrid:
    """Four nodes with nothing in memory, under ids from ``first`` on."""
    client_app._agents.clear()
    grid = delayed_grid(4, clock, lambda node, round: PACES[node % 1000] + round % 2)
    if first != 1000:
        for node in [*grid.get_node_ids()]:
            grid.down.add(node)
            grid.add_node(first + node - 1000, node - 1000)
    return grid


def stop() -> None:
    raise KeyboardInterrupt


def books(checkpoint: Bundle) -> dict[str, Any]:
    own: dict[str, Any] = json.loads(checkpoint.group("own-rounds")["json"].tobytes())
    return own


@pytest.fixture(params=["devices", "simulation"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where agents keep their states: on disks, or nowhere beyond their process."""
    if request.param == "simulation":
        for module in (client_app, memory, handover, rounds):
            monkeypatch.setattr(module, "in_simulation", lambda: True)
    return str(request.param)


def in_place(grid: DelayedGrid, place: str, folder: Path) -> DelayedGrid:
    if place == "devices":
        for context in grid.contexts.values():
            context.node_config["state-dir"] = str(folder / "devices")
    return grid


@pytest.mark.parametrize("at_message", [(1002, 4), (1000, 8), (1002, 7)])
def test_a_run_that_broke_off_goes_on_with_what_was_under_way(
    at_message: tuple[int, int], place: str, clock: Clock, tmp_path: Path
) -> None:
    """The log of both parts, played again in a simulation, gives the same bits."""
    options: dict[str, Any] = {**ASYNC, "checkpoint_every": 1, "takeover": True, "rounds": 8}
    options |= {"age_decay": 0.7, "max_staleness": 3, "record": tmp_path / "runs"}
    grid = in_place(fleet_of(clock), place, tmp_path)
    at(grid, {at_message: stop})
    with pytest.raises(KeyboardInterrupt):
        gossip(grid, **options)
    broken = recorded(tmp_path / "runs")
    assert broken.status == "interrupted"
    (*_, last) = sorted((broken.path / "checkpoint").iterdir())
    checkpoint = newest_checkpoint(last.parent)
    facts = checkpoint.facts
    assert facts["parcels"]  # somebody was in the middle of a round
    assert len(set(books(checkpoint)["rounds"])) > 1
    grid = in_place(fleet_of(clock, 2000), place, tmp_path)
    gossip(grid, resume=broken.path, **options)
    run = recorded(tmp_path / "runs")
    assert run.finished
    (noted,) = run.config["resumptions"]
    assert noted["after_round"] == facts["round"]
    assert not (run.path / "checkpoint").exists()
    assert [line["fresh"] for line in run.relay[1:]] == [[]] * 8
    clocks = [event["clock"] for event in run.events]
    assert clocks == sorted(clocks)
    again = replayed(tmp_path / "again", run, num_rounds=8, age_decay=0.7, max_staleness=3)
    assert lines(again) == lines(run)
    assert rows(again) == rows(run)
    assert again.result() == run.result()
    if place == "simulation":
        for agent, path in run.agents.items():
            assert load_state(path).encode() == load_state(again.agents[agent]).encode()
    # what was under way is sent again, in the same words
    first = {2000 + int(agent): parcel["round"] for agent, parcel in facts["parcels"].items()}
    for node, round in first.items():
        sent = [
            sent_round(m)
            for m in grid.log
            if m.metadata.dst_node_id == node and "order" in m.content
        ]
        assert sent == [*range(round, 10)]


def test_states_are_handed_over_for_checkpoints_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (client_app, memory, handover, rounds):
        monkeypatch.setattr(module, "in_simulation", lambda: True)
    grid = fleet_of(clock)
    gossip(grid, rounds=12, record=tmp_path, **{**ASYNC, "checkpoint_every": 6})
    stores = {
        (m.metadata.dst_node_id, sent_round(m))
        for m in grid.log
        if "order" in m.content and m.content["order"].get("store")
    }
    of_slow = sorted(round for node, round in stores if node == 1002)
    assert of_slow == [4, 12, 13]  # begun when the mean agent had played 6; last; closing
    assert len(stores) < 0.5 * sum("order" in m.content for m in grid.log)


@pytest.mark.parametrize("lose", [False, True])
def test_a_lost_last_answer_ends_no_checkpoints(
    lose: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its agent is not asked again, and so hands no state over any more."""
    for module in (client_app, memory, handover, rounds):
        monkeypatch.setattr(module, "in_simulation", lambda: True)
    client_app._agents.clear()
    grid = delayed_grid(3, clock, lambda node, round: 1.0 if node == 1000 else 6.0)
    written, keep = [], OwnRounds.keep

    def kept(own: OwnRounds[Any], round: int, more: Bundle) -> None:
        written.append(round)
        keep(own, round, more)

    monkeypatch.setattr(OwnRounds, "keep", kept)
    if lose:
        at(grid, {(1000, 12): lambda: grid.unavailable.add(1000)})
        at(grid, {(1001, 4): lambda: grid.unavailable.discard(1000)})
    gossip(grid, rounds=12, record=tmp_path, wait_timeout=30.0, **{**ASYNC, "checkpoint_every": 6})
    run = recorded(tmp_path)
    assert run.finished
    assert any(event.get("failed") for event in run.events) == lose
    assert written == [6, 12]
    stores = ["store" in m.content["order"] for m in grid.log if "order" in m.content]
    assert sum(bool(store) for store in stores) < len(stores)


def test_a_checkpoint_waits_for_no_agent_that_is_away(
    place: str, clock: Clock, tmp_path: Path
) -> None:
    grid = in_place(fleet_of(clock), place, tmp_path)
    at(grid, {(1000, 4): lambda: grid.down.add(1003), (1000, 30): stop})
    options: dict[str, Any] = {**ASYNC, "checkpoint_every": 1, "record": tmp_path / "runs"}
    with pytest.raises(KeyboardInterrupt):
        gossip(grid, rounds=30, timeout=60.0, wait_timeout=500.0, **options)
    broken = recorded(tmp_path / "runs")
    checkpoint = newest_checkpoint(broken.path / "checkpoint")
    played = books(checkpoint)["rounds"]
    assert played[3] < min(played[:3])
    assert played[3] + 5 < checkpoint.facts["round"] <= sum(played) / 4
