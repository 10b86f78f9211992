"""The relay against an oracle that remembers everything, and the ledger."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError, Topology
from flower_mcepl.ledger import Ledger
from flower_mcepl.relay import Parcel, Relay


@dataclass
class Diary:
    """All that ever happened, searched from the start for every question."""

    topology: Topology
    max_staleness: int
    posts: list[tuple[int, int]] = field(default_factory=list)  # (sender, round)
    holds: set[tuple[int, int, int]] = field(default_factory=set)  # (receiver, sender, round)
    met: set[int] = field(default_factory=set)

    def due(self, agent: int, round: int) -> dict[int, tuple[int, int]] | None:
        if agent not in self.met:
            return None
        frames = {}
        for j in range(self.topology.num_agents):
            rounds = [sent for sender, sent in self.posts if sender == j]
            if j not in self.topology.in_neighbors(agent, round=round - 1) or not rounds:
                continue
            newest = max(rounds)
            if round - 1 - newest <= self.max_staleness and (agent, j, newest) not in self.holds:
                frames[j] = (j, newest)
        return frames


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    n = draw(st.integers(1, 6))
    if n > 1 and draw(st.booleans()):
        return Topology.random_neighbors(n, degree=draw(st.integers(0, n - 1)), seed=draw(st.integers(0, 99)))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] != pair[1])
    edges = draw(st.lists(pairs, max_size=12)) if n > 1 else []
    return Topology.from_edges(edges, num_agents=n, directed=draw(st.booleans()))


@given(topology=topologies(), max_staleness=st.integers(0, 3), num_rounds=st.integers(1, 9), data=st.data())
def test_everyone_gets_exactly_what_it_lacks(
    topology: Topology, max_staleness: int, num_rounds: int, data: st.DataObject
) -> None:
    """Agents are offline, fail, lose their memory; frames are (sender, round), and (sender, round) must fit."""
    relay = Relay[tuple[int, int]](topology, evaluate_every=3, max_staleness=max_staleness)
    diary = Diary(topology, max_staleness)
    some_agents = st.sets(st.integers(0, topology.num_agents - 1))
    sent: list[tuple[int, int]] = []  # (sender, receiver)
    for round in range(1, num_rounds + 1):
        online, failing, forgetful = data.draw(some_agents), data.draw(some_agents), data.draw(some_agents)
        parcels = {agent: relay.parcel(agent, round=round) for agent in sorted(online)}
        for agent, parcel in parcels.items():
            expected = diary.due(agent, round)
            sent += [(j, agent) for j in parcel.frames]
            if expected is None:
                assert parcel == Parcel(round, None)
            else:
                assert parcel.neighbors == topology.in_neighbors(agent, round=round - 1)
                assert parcel.frames == expected
                assert parcel.evaluate == ((round - 1) % 3 == 0)
            assert parcel.train
        for agent in sorted(online - failing):
            if agent in forgetful:  # it began afresh, then read this parcel
                relay.forget(agent)
                diary.holds = {held for held in diary.holds if held[0] != agent}
            diary.met.add(agent)
            diary.holds |= {(agent, j, sent_in) for j, sent_in in parcels[agent].frames.values()}
            relay.answered(agent, {})
            relay.post(agent, (agent, round), round=round, num_bytes=10)
            diary.posts.append((agent, round))
    assert relay.ledger.totals()["deliveries"] == len(sent)
    assert relay.ledger.totals()["uplink_total"] == 10 * len(diary.posts)
    assert {(row["sender"], row["receiver"]): row["frames"] for row in relay.ledger.link_rows()} == {
        link: sent.count(link) for link in sent
    }


def posted(relay: Relay[str], round: int, *agents: int) -> None:
    for agent in agents:
        relay.answered(agent, {"num-weights": 100, "kept-weights": 30})
        relay.post(agent, f"{agent}@{round}", round=round, num_bytes=14)


def test_a_ring_without_trouble() -> None:
    relay = Relay[str](Topology.ring(4), evaluate_every=2)
    for round in range(1, 4):
        frames = {agent: relay.parcel(agent, round=round).frames for agent in range(4)}
        if round > 1:
            assert frames[0] == {1: f"1@{round - 1}", 3: f"3@{round - 1}"}
            assert frames[2] == {1: f"1@{round - 1}", 3: f"3@{round - 1}"}
        posted(relay, round, *range(4))
    closing = relay.parcel(0, round=4, closing=True)
    assert closing == Parcel(4, (1, 3), {1: "1@3", 3: "3@3"}, evaluate=True, train=False)


def test_a_frame_that_may_not_have_arrived_is_handed_out_again() -> None:
    relay = Relay[str](Topology.path(2))
    posted(relay, 1, 0, 1)
    assert relay.parcel(0, round=2).frames == {1: "1@1"}  # agent 0 does not answer round 2, agent 1 is offline
    assert relay.parcel(0, round=3).frames == {1: "1@1"}
    posted(relay, 3, 0)
    assert relay.parcel(0, round=4).frames == {}
    relay.forget(0)
    assert relay.parcel(0, round=5).frames == {1: "1@1"}


def test_a_newcomer_in_an_agents_place_was_handed_nothing() -> None:
    relay = Relay[str](Topology.path(2))
    posted(relay, 1, 0, 1)
    assert relay.parcel(0, round=2).frames == {1: "1@1"}
    relay.forget(0, in_flight=True)  # the parcel went to the node that is gone
    relay.answered(0, {})
    assert relay.parcel(0, round=3).frames == {1: "1@1"}


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_frame_is_handed_out_until_it_is_too_old(max_staleness: int) -> None:
    relay = Relay[str](Topology.path(2), max_staleness=max_staleness)
    posted(relay, 1, 0, 1)
    for round in range(2, 8):
        assert relay.parcel(0, round=round).frames == ({1: "1@1"} if round - 1 - 1 <= max_staleness else {})


def test_the_time_varying_graph_of_the_frames_own_round_counts() -> None:
    topology = Topology.random_neighbors(6, degree=2, seed=1)
    relay = Relay[str](topology)
    for round in range(1, 6):
        for agent in range(6):
            parcel = relay.parcel(agent, round=round)
            if round > 1:
                assert set(parcel.frames) == set(topology.in_neighbors(agent, round=round - 1))
        posted(relay, round, *range(6))


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="evaluate-every is a number of rounds and must be >= 1; got 0"):
        Relay[str](Topology.ring(3), evaluate_every=0)
    with pytest.raises(ConfigError, match="max-staleness is a number of rounds and must be >= 0; got -1"):
        Relay[str](Topology.ring(3), max_staleness=-1)


# --- the ledger ---

deliveries = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99), st.integers(0, 9), st.integers(0, 9)),
    max_size=30,
)
uplinks = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), max_size=20)


@given(deliveries=deliveries, uplinks=uplinks)
def test_the_ledger_adds_up(deliveries: list[tuple[int, ...]], uplinks: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    for sender, receiver, num_bytes, weights, kept in deliveries:
        ledger.add_delivery(sender, receiver, num_bytes, num_weights=weights, kept_weights=kept)
    for agent, num_bytes in uplinks:
        ledger.add_uplink(agent, num_bytes)
    totals = ledger.totals()
    assert totals["links_total"] == sum(size for _, _, size, _, _ in deliveries)
    assert totals["uplink_total"] == sum(size for _, size in uplinks)
    assert totals["deliveries"] == len(deliveries)
    assert totals["fp32_total"] == sum(4 * weights for *_, weights, _ in deliveries)
    assert totals["paper_convention_bytes"] == sum(kept for *_, kept in deliveries) / 8
    for agent in range(5):
        assert ledger.sent[agent] == sum(d[2] for d in deliveries if d[0] == agent)
        assert ledger.received[agent] == sum(d[2] for d in deliveries if d[1] == agent)
        assert ledger.uplink[agent] == sum(size for a, size in uplinks if a == agent)
    rows = {(row["sender"], row["receiver"]): (row["frames"], row["bytes"]) for row in ledger.link_rows()}
    assert list(rows) == sorted({(d[0], d[1]) for d in deliveries})
    for link, (frames, num_bytes) in rows.items():
        sizes = [d[2] for d in deliveries if (d[0], d[1]) == link]
        assert (frames, num_bytes) == (len(sizes), sum(sizes))


def test_the_busiest_agent_counts_what_goes_up_and_comes_down() -> None:
    ledger = Ledger()
    assert (ledger.totals()["busiest_agent"], ledger.totals()["busiest_agent_total"]) == (None, 0)
    for agent in (0, 1, 2):
        ledger.add_uplink(agent, 10)
    for receiver in (0, 1, 1):
        ledger.add_delivery(2, receiver, 10)
    assert (ledger.totals()["busiest_agent"], ledger.totals()["busiest_agent_total"]) == (1, 30)


def test_both_figures_for_comparison_cover_the_same_deliveries() -> None:
    relay = Relay[str](Topology.ring(4))
    for round in (1, 2):
        for agent in range(4):
            relay.parcel(agent, round=round)
        posted(relay, round, *range(4))
    totals = relay.ledger.totals()
    assert (totals["deliveries"], totals["links_total"], totals["uplink_total"]) == (8, 8 * 14, 8 * 14)
    assert (totals["fp32_total"], totals["paper_convention_bytes"]) == (8 * 400, 8 * 30 / 8)
