"""Which node is which agent: the roster on its own, and nodes that do not fit the
graph.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_mcepl import FingerprintError, MceplAgent, RosterError, Topology
from flower_mcepl.strategies.attendance import Attendance
from flower_mcepl.strategies.identities import Identities
from flower_mcepl.strategies.roster import Roster
from tests.fleet.agents import make_agent, small_net
from tests.fleet.flower import agent_grid, down_frames, gossip, state_facts
from tests.fleet.grid import InProcessGrid


def facts(agent: int, *, fingerprint: str = "a" * 32, num_weights: int = 100) -> dict[str, Any]:
    return {"agent": agent, "fingerprint": fingerprint, "num-weights": num_weights}


# --- the roster on its own ---


def test_nodes_become_the_agents_they_say_they_are() -> None:
    roster = Roster(3)
    assert roster.admit(77, facts(2), online=[77]) == 2
    assert roster.admit(77, facts(2), online=[77]) == 2
    assert (roster.agent_of(77), roster.agent_of(78), roster.absent(roster.node_of)) == (
        2,
        None,
        [0, 1],
    )


def test_a_node_takes_over_from_one_that_left_where_that_is_allowed() -> None:
    roster = Roster(2, Identities(takeover=True))
    roster.admit(77, facts(1), online=[77])
    assert roster.admit(78, facts(1), online=[78]) == 1
    assert (roster.agent_of(77), roster.agent_of(78)) == (None, 1)
    assert roster.admit(77, facts(1), online=[77]) == 1  # and back again


@pytest.mark.parametrize("agent", [-1, 3, 2**63])
def test_an_agent_that_the_graph_does_not_have(agent: int) -> None:
    with pytest.raises(
        RosterError, match=rf"node 77 says it is agent {agent}, but the graph has agents 0\.\.2"
    ):
        Roster(3).admit(77, facts(agent), online=[77])


def test_an_agent_that_another_online_node_plays_stays_with_it() -> None:
    roster = Roster(2)
    roster.admit(77, facts(1), online=[77, 78])
    with pytest.raises(
        RosterError, match=r"nodes 77 and 78 both say they are agent 1.*--node-config"
    ):
        roster.admit(78, facts(1), online=[77, 78])
    assert (roster.agent_of(77), roster.agent_of(78)) == (1, None)


def test_other_weights_are_refused_and_both_are_named() -> None:
    roster = Roster(2)
    roster.admit(77, facts(0), online=[77, 78])
    with pytest.raises(
        FingerprintError, match=r"agent 1 \(node 78\) and agent 0 \(node 77\).*Use the same seed"
    ):
        roster.admit(78, facts(1, fingerprint="b" * 32), online=[77, 78])
    with pytest.raises(
        FingerprintError, match=r"different models .*: 101 and 100\. Use the same model"
    ):
        roster.admit(78, facts(1, fingerprint="b" * 32, num_weights=101), online=[77, 78])
    assert (roster.absent(roster.node_of), roster.agent_of(78)) == ([1], None)


def test_a_node_plays_one_agent() -> None:
    roster = Roster(3)
    roster.admit(77, facts(0), online=[77])
    assert roster.admit(77, facts(0), online=[77]) == 0
    with pytest.raises(
        RosterError, match=r"node 77 is agent 0 and now says it is agent 2\. A node plays one agent"
    ):
        roster.admit(77, facts(2), online=[77])
    assert roster.absent(roster.node_of) == [1, 2]


def test_another_first_mask_is_refused() -> None:
    roster = Roster(2)
    roster.admit(77, {**facts(0), "first-mask": "aa"}, online=[77, 78])
    with pytest.raises(
        FingerprintError, match=r"different common first masks .*: bb and aa\..*first_retention"
    ):
        roster.admit(78, {**facts(1), "first-mask": "bb"}, online=[77, 78])


def test_masks_whose_sizes_only_some_tell() -> None:
    """Who leaves them out could else send any mask."""
    roster = Roster(2)
    roster.admit(77, {**facts(0), "kept-by-layer": [3, 4]}, online=[77, 78])
    for odd in ({}, {"kept-by-layer": [3]}):
        with pytest.raises(FingerprintError, match=r"different models \(numbers of layers\)"):
            roster.admit(78, {**facts(1), **odd}, online=[77, 78])
    roster.admit(78, {**facts(1), "kept-by-layer": [9, 9]}, online=[77, 78])


# --- nodes that do not fit the graph ---


def test_fewer_nodes_than_agents_names_who_is_missing() -> None:
    grid = agent_grid(5)
    grid.down = {1001, 1004}
    with pytest.raises(
        RosterError,
        match=r"the graph has 5 agents and 5 of them.*nodes of 3 agents; missing agents: 1, 4\.",
    ):
        gossip(grid)
    # nothing was trained
    assert all(message.metadata.message_type == "query" for message in grid.log)


def test_no_node_at_all() -> None:
    grid = agent_grid(2)
    grid.down = {1000, 1001}
    with pytest.raises(RosterError, match="there are nodes of 0 agents; missing agents: 0, 1"):
        gossip(grid)


def test_a_node_more_than_the_graph_has_agents_is_turned_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = agent_grid(4)
    with caplog.at_level("WARNING", logger="flwr"):
        strategy = gossip(grid, Topology.ring(3), incomplete=False)
    assert re.search(
        r"round 1: node 1003 failed\. node 1003 says it is agent 3, but the graph has agents "
        r"0\.\.2.*num-agents",
        caplog.text,
    )
    assert {row["agent"] for row in strategy.monitor.rows} == {0, 1, 2}
    assert [m.metadata.dst_node_id for m in grid.log].count(1003) == 1


def test_two_nodes_claim_one_agent() -> None:
    grid = agent_grid(3)
    grid.add_node(1003, 2)
    with pytest.raises(
        RosterError,
        match=r"round 1 needs 4 agents, but 3 took part; missing: 3\. node 1003: nodes 1002 and "
        r"1003 both say they are agent 2\. Give each SuperNode",
    ):
        gossip(grid, Topology.ring(4))


@pytest.mark.parametrize("wrong", [1, 7])
def test_a_wrong_number_in_round_1_is_turned_away_and_the_right_node_waited_for(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = agent_grid(3)
    grid.down.add(1002)
    grid.add_node(1005, wrong)
    looks = itertools.count()

    def node_ids(real: Callable[[], Iterable[int]] = grid.get_node_ids) -> Iterable[int]:
        if next(looks) == 5:  # it takes a while
            grid.down.clear()
        return real()

    monkeypatch.setattr(grid, "get_node_ids", node_ids)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    strategy = gossip(grid, Topology.ring(3), wait_timeout=60)
    assert strategy.roster.node_of == {0: 1000, 1: 1001, 2: 1002}
    others = gossip(agent_grid(3), Topology.ring(3))
    assert [without_times(row) for row in strategy.monitor.rows] == [
        without_times(row) for row in others.monitor.rows
    ]


def test_a_wrong_number_at_a_resumption_is_left_out_and_the_right_node_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(3)
    grid.down.add(1002)
    grid.add_node(1005, 1)
    roster = Roster(3)
    roster.restore({"facts": {agent: facts(agent) for agent in range(3)}, "founder": None})
    attendance = Attendance(roster, min_agents=0, wait_timeout=60)
    attendance.wait_for_nodes(grid, first=True)
    looks = itertools.count()

    def node_ids(real: Callable[[], Iterable[int]] = grid.get_node_ids) -> Iterable[int]:
        if next(looks) == 5:
            grid.down.clear()
        return real()

    monkeypatch.setattr(grid, "get_node_ids", node_ids)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with caplog.at_level("WARNING", logger="flwr"):
        attendance.identify(grid, timeout=1.0)
    assert roster.node_of == {0: 1000, 1: 1001, 2: 1002}
    assert "nodes 1001 and 1005 both say they are agent 1" in caplog.text


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_one_device_with_other_weights_does_not_speak_for_all() -> None:
    """Also if it has the lowest number, or answers first."""
    grid = agent_grid(4, lambda index: odd_one(index, 0, one_bit_off))
    strategy = gossip(grid, min_agents=3, incomplete=None)
    assert strategy.roster.absent(strategy.roster.node_of) == [0]
    assert {row["agent"] for row in strategy.monitor.rows} == {1, 2, 3}


@pytest.mark.parametrize("partition", [None, -1, "2", 1.0])
def test_a_node_that_does_not_say_which_agent_it_is(partition: Any) -> None:
    grid = agent_grid(3)
    grid.add_node(1003, partition)
    expected = (
        r"missing: 3\. node 1003: error 2: node 1003 must say which agent it is"
        ".*--node-config 'partition-id=0'"
    )
    with pytest.raises(RosterError, match=expected):
        gossip(grid, Topology.ring(4))


def one_bit_off() -> nn.Module:
    net = small_net()
    net[3].weight.data.view(torch.int32)[1, 2] ^= 1
    return net


def one_unit_more() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def odd_one(index: int, odd: int, model_fn: Any) -> MceplAgent:
    return make_agent(index, model_fn=model_fn if index == odd else small_net)


@pytest.mark.parametrize(
    ("model_fn", "expected"),
    [
        (
            one_bit_off,
            r"agent 2 \(node 1002\) and agent 0 \(node 1000\) have different frozen weights",
        ),
        (
            one_unit_more,
            r"agent 2 \(node 1002\) and agent 0 \(node 1000\) have different models .*"
            r": 292 and 228\.",
        ),
    ],
)
def test_other_weights_end_the_run_in_round_1(model_fn: Any, expected: str) -> None:
    with pytest.raises(RosterError, match=expected):
        gossip(agent_grid(3, lambda index: odd_one(index, 2, model_fn)))


@pytest.mark.parametrize("model_fn", [one_bit_off, one_unit_more])
def test_a_late_node_with_other_weights_is_turned_away(
    model_fn: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = agent_grid(4, lambda index: odd_one(index, 3, model_fn))
    grid.down = {1003}
    strategy = gossip(grid, rounds=4, min_agents=3, before={3: grid.down.clear})
    assert strategy.roster.absent(strategy.roster.node_of) == [3]
    # turned away once, then left alone
    assert [m.metadata.dst_node_id for m in grid.log].count(1003) == 1
    assert {row["agent"] for row in strategy.monitor.rows} == {0, 1, 2}


def test_a_second_node_of_one_agent_is_turned_away_until_the_first_has_left() -> None:
    grid = agent_grid(3)
    asked: dict[int, int] = {}

    def count(round: int) -> None:
        asked[round] = [m.metadata.dst_node_id for m in grid.log].count(2002)

    def agent_1_leaves_and_another_2_comes() -> None:
        grid.down.add(1001)
        grid.add_node(2002, 2)

    steps = {3: agent_1_leaves_and_another_2_comes, 5: lambda: grid.down.add(1002)}
    strategy = gossip(grid, rounds=6, before=steps, after=count, takeover=True)
    assert asked == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 4}  # asked in 3, 5 and 6, and at the end
    got = [sorted(down_frames(m)) for m in grid.log if m.metadata.dst_node_id == 2002]
    # what the first node had of agent 1, the second one has not
    assert got == [[], [], [0, 1], [0]]
    assert strategy.roster.node_of[2] == 2002
    assert state_facts(grid, 2002)["num-neighbors"] == 2


def test_a_node_with_another_app_is_named() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return Message(RecordDict({"metrics": ConfigRecord({"agent": 0})}), reply_to=message)

    with pytest.raises(
        RosterError, match=r"node 1000 does not answer as an agent .*make_client_app"
    ):
        gossip(InProcessGrid(app, 2))
