"""The relay against an oracle that remembers everything and tries every chain."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import ConfigError, Topology
from flower_mcepl.exchange.parcels import Answer, Parcel, Posted
from flower_mcepl.exchange.relay import Relay


@dataclass(frozen=True)
class Frame:
    """What a frame says: whose, when, how many bytes, and what it builds on."""

    sender: int
    round: int
    size: int
    builds_on: int | None


def posted(frame: Frame) -> Posted[Frame]:
    return Posted(frame, frame.size, min(frame.size, 3), frame.builds_on)


@dataclass
class Diary:
    """All that ever happened, searched from the start for every question."""

    topology: Topology
    max_staleness: int
    frames: list[Frame] = field(default_factory=list)
    # agent -> sender -> round, as it last answered
    told: dict[int, dict[int, int]] = field(default_factory=dict)

    def newest(self, sender: int) -> int | None:
        return max((frame.round for frame in self.frames if frame.sender == sender), default=None)

    def kept(self, sender: int) -> list[Frame]:
        """The last key, and the deltas since ``max_staleness`` rounds before it."""
        mine = [frame for frame in self.frames if frame.sender == sender]
        last_key = max((frame.round for frame in mine if not frame.builds_on), default=0)
        since = {False: last_key, True: last_key - self.max_staleness}
        return [frame for frame in mine if frame.round >= since[bool(frame.builds_on)]]

    def chains(self, sender: int, to: int, held: int | None) -> Iterator[list[Frame]]:
        """Every way to bring someone who holds the round ``held`` to the round ``to``
        with the frames that are kept.
        """
        if to == held:
            yield []
            return
        for frame in self.kept(sender):
            if frame.round == to:
                if not frame.builds_on:
                    yield [frame]
                else:
                    yield from (
                        [*chain, frame] for chain in self.chains(sender, frame.builds_on, held)
                    )

    def due(self, agent: int, round: int) -> dict[int, int]:
        """Return from whom the agent must hear, and the fewest bytes that do."""
        costs = {}
        for j in self.topology.in_neighbors(agent, round=round - 1):
            newest, held = self.newest(j), self.told[agent].get(j)
            if newest is not None and round - 1 - newest <= self.max_staleness and newest != held:
                costs[j] = min(size(chain) for chain in self.chains(j, newest, held))
        return costs


def size(chain: list[Frame]) -> int:
    return sum(frame.size for frame in chain)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    n = draw(st.integers(1, 6))
    if n > 1 and draw(st.booleans()):
        return Topology.random_neighbors(
            n, degree=draw(st.integers(0, n - 1)), seed=draw(st.integers(0, 99))
        )
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(
        lambda pair: pair[0] != pair[1]
    )
    edges = draw(st.lists(pairs, max_size=12)) if n > 1 else []
    return Topology.from_edges(edges, num_agents=n, directed=draw(st.booleans()))


@dataclass
class World:
    """Agents as they truly are, on the other side of messages that get lost."""

    relay: Relay[Frame]
    diary: Diary
    data: st.DataObject
    held: dict[int, dict[int, int]] = field(default_factory=dict)  # receiver -> sender -> round
    # sender -> rounds that it remembers sending
    sent: dict[int, set[int]] = field(default_factory=dict)
    delivered: list[tuple[int, int, list[Frame]]] = field(default_factory=list)

    def play(self, agent: int, parcel: Parcel[Frame], *, forgetful: bool) -> list[Frame]:
        """Let an agent read its parcel and write its frames."""
        if forgetful:
            self.held[agent], self.sent[agent] = {}, set()
        mine, remembered = self.held.setdefault(agent, {}), self.sent.setdefault(agent, set())
        for sender, chain in parcel.frames.items():
            at = mine.get(sender, 0)
            for frame in chain:
                if frame.round > at and (not frame.builds_on or frame.builds_on == at):
                    at = frame.round
                elif frame.round > at:
                    mine.pop(sender, None)  # it cannot be read: the agent names the sender no more
                    at = 0
                    break
            if at:
                mine[sender] = at
        stale = self.diary.max_staleness
        self.held[agent] = {j: r for j, r in mine.items() if parcel.round - 1 - r <= stale}
        builds_on = (
            parcel.acknowledged
            if parcel.acknowledged in remembered
            else self.data.draw(st.sampled_from([None, 0]))
        )
        sizes = st.integers(1, 12)
        frames = [Frame(agent, parcel.round, self.data.draw(sizes), builds_on)]
        if parcel.whole and builds_on:
            frames.append(Frame(agent, parcel.round, self.data.draw(sizes), None))
        self.sent[agent] = {parcel.round, *({builds_on} if builds_on else set())}
        return frames


@given(
    topology=topologies(),
    max_staleness=st.integers(0, 3),
    key_interval=st.integers(0, 4),
    num_rounds=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=150)
def test_everyone_gets_the_fewest_bytes_that_it_can_decode(
    topology: Topology, max_staleness: int, key_interval: int, num_rounds: int, data: st.DataObject
) -> None:
    """Agents are offline, do not answer or lose their memory; answers get lost; deltas
    and keys have any size.
    """
    relay = Relay[Frame](
        topology, evaluate_every=3, max_staleness=max_staleness, key_interval=key_interval
    )
    diary = Diary(topology, max_staleness)
    world = World(relay, diary, data)
    some_agents = st.sets(st.integers(0, topology.num_agents - 1))
    for round in range(1, num_rounds + 1):
        offline, deaf, mute, forgetful = (data.draw(some_agents) for _ in range(4))
        online = [agent for agent in range(topology.num_agents) if agent not in offline]
        parcels = {agent: relay.parcel(agent, round=round) for agent in online}
        for agent, parcel in parcels.items():
            assert parcel.train
            if agent not in diary.told:
                assert parcel == Parcel(round, None)
                continue
            assert parcel.neighbors == topology.in_neighbors(agent, round=round - 1)
            assert parcel.evaluate == ((round - 1) % 3 == 0)
            assert parcel.acknowledged == diary.newest(agent)
            assert parcel.whole == whole_is_due(diary, agent, round, key_interval)
            assert {j: size([*chain]) for j, chain in parcel.frames.items()} == diary.due(
                agent, round
            )
            for j, chain in parcel.frames.items():
                check_chain(chain, diary.told[agent].get(j), sender=j, newest=diary.newest(j))
                world.delivered.append((j, agent, [*chain]))
        for agent in online:
            if agent in deaf:
                continue
            frames = world.play(agent, parcels[agent], forgetful=agent in forgetful)
            if agent in mute:
                continue
            diary.told[agent] = dict(world.held[agent])
            diary.frames += frames
            posts = [posted(frame) for frame in frames]
            answer = Answer({}, {}, posts, held=dict(world.held[agent]))
            relay.take(agent, answer, round=round)
            assert [post.frame for _, post in relay._posted[agent]] == diary.kept(agent)
    totals = relay.ledger.totals()
    assert totals["deliveries"] == len(world.delivered)
    assert totals["links_total"] == sum(size(chain) for *_, chain in world.delivered)
    assert totals["link_frames"] == sum(len(chain) for *_, chain in world.delivered)
    assert totals["link_keys"] == sum(
        not frame.builds_on for *_, chain in world.delivered for frame in chain
    )
    assert totals["uplink_total"] == size(diary.frames)
    assert totals["uplink_frames"] == len(diary.frames)


def check_chain(chain: list[Frame], held: int | None, *, sender: int, newest: int | None) -> None:
    """It begins where the receiver stands or with a key, and each frame builds on the
    one before.
    """
    assert chain[-1].round == newest
    at = held
    for frame in chain:
        assert frame.sender == sender
        assert not frame.builds_on or frame.builds_on == at
        at = frame.round
    assert all(frame.builds_on for frame in chain[1:])  # what comes before a key would be wasted


def whole_is_due(diary: Diary, agent: int, round: int, key_interval: int) -> bool:
    mine = [frame for frame in diary.frames if frame.sender == agent]
    if not mine:
        return False
    last = max((frame for frame in mine if not frame.builds_on), key=lambda frame: frame.round)
    if key_interval and round - last.round >= key_interval:
        return True
    return size([frame for frame in mine if frame.round > last.round]) >= last.size


def take(
    relay: Relay[str],
    agent: int,
    round: int,
    *posts: Posted[str],
    held: Mapping[int, int] | None = None,
) -> None:
    """Let the relay take an answer; without ``held`` the agent holds what it held
    before.
    """
    facts = {"num-weights": 100, "kept-weights": 30}
    answer = Answer(facts, {}, posts, held=relay._held.get(agent, {}) if held is None else held)
    relay.take(agent, answer, round=round)


def post(
    relay: Relay[str], agent: int, round: int, size: int = 14, builds_on: int | None = None
) -> None:
    name = f"{agent}@{round}" + ("" if builds_on is None else f"<{builds_on}")
    take(relay, agent, round, Posted(name, size, 3, builds_on))


def all_post(
    relay: Relay[str], round: int, *agents: int, held: Mapping[int, Mapping[int, int]] | None = None
) -> None:
    for agent in agents:
        take(relay, agent, round, held=(held or {}).get(agent, {}))
        post(relay, agent, round)


def test_a_ring_without_trouble() -> None:
    relay = Relay[str](Topology.ring(4), evaluate_every=2)
    for round in range(1, 4):
        frames = {agent: relay.parcel(agent, round=round).frames for agent in range(4)}
        if round > 1:
            assert frames[0] == {1: [f"1@{round - 1}"], 3: [f"3@{round - 1}"]}
            assert frames[2] == {1: [f"1@{round - 1}"], 3: [f"3@{round - 1}"]}
        all_post(relay, round, *range(4))
    closing = relay.parcel(0, round=4, closing=True)
    assert closing == Parcel(
        4, (1, 3), {1: ["1@3"], 3: ["3@3"]}, evaluate=True, train=False, acknowledged=3
    )


def test_a_frame_that_may_not_have_arrived_is_handed_out_again() -> None:
    relay = Relay[str](Topology.path(2))
    all_post(relay, 1, 0, 1)
    # agent 0 does not answer round 2, agent 1 is offline
    assert relay.parcel(0, round=2).frames == {1: ["1@1"]}
    assert relay.parcel(0, round=3).frames == {1: ["1@1"]}
    all_post(relay, 3, 0, held={0: {1: 1}})
    assert relay.parcel(0, round=4).frames == {}
    all_post(relay, 4, 0)  # it has lost its memory
    assert relay.parcel(0, round=5).frames == {1: ["1@1"]}


def test_a_newcomer_in_an_agents_place_holds_nothing() -> None:
    relay = Relay[str](Topology.path(2))
    all_post(relay, 1, 0, 1)
    post(relay, 1, 2, builds_on=1)
    assert relay.parcel(0, round=3).frames == {1: ["1@1", "1@2<1"]}
    take(relay, 0, 2, held={})  # the parcel went to the node that is gone
    assert relay.parcel(0, round=3).frames == {1: ["1@1", "1@2<1"]}


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_frame_is_handed_out_until_it_is_too_old(max_staleness: int) -> None:
    relay = Relay[str](Topology.path(2), max_staleness=max_staleness)
    all_post(relay, 1, 0, 1)
    for round in range(2, 8):
        assert relay.parcel(0, round=round).frames == (
            {1: ["1@1"]} if round - 1 - 1 <= max_staleness else {}
        )


def test_the_time_varying_graph_of_the_frames_own_round_counts() -> None:
    topology = Topology.random_neighbors(6, degree=2, seed=1)
    relay = Relay[str](topology)
    for round in range(1, 6):
        for agent in range(6):
            parcel = relay.parcel(agent, round=round)
            if round > 1:
                assert set(parcel.frames) == set(topology.in_neighbors(agent, round=round - 1))
        all_post(relay, round, *range(6))


# --- chains ---


def chain_of(relay: Relay[str], held: int | None, round: int) -> list[str]:
    take(relay, 0, round - 1, held={} if held is None else {1: held})
    return [*relay.parcel(0, round=round).frames.get(1, [])]


def test_exactly_the_missing_chain() -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 1, 1, size=100)
    for round in (2, 3, 5):  # in round 4 it was away
        post(relay, 1, round, size=10, builds_on={2: 1, 3: 2, 5: 3}[round])
    assert chain_of(relay, None, 6) == ["1@1", "1@2<1", "1@3<2", "1@5<3"]
    assert chain_of(relay, 1, 6) == ["1@2<1", "1@3<2", "1@5<3"]
    assert chain_of(relay, 3, 6) == ["1@5<3"]
    assert chain_of(relay, 5, 6) == []
    assert chain_of(relay, 4, 6) == ["1@1", "1@2<1", "1@3<2", "1@5<3"]  # nobody knows of a round 4


@pytest.mark.parametrize("away", [6, 20])
def test_who_was_away_for_long_gets_a_key_and_what_came_after_it(away: int) -> None:
    relay = Relay[str](Topology.path(2), max_staleness=5)
    post(relay, 1, 1, size=100)
    for round in range(2, away + 2):
        frames = [Posted(f"delta {round}", 10, 3, round - 1)]
        if round == away - 1:
            frames.append(Posted(f"key {round}", 30, 3, None))
        take(relay, 1, round, *frames)
    assert chain_of(relay, 1, away + 2) == [f"key {away - 1}", f"delta {away}", f"delta {away + 1}"]
    assert chain_of(relay, away - 2, away + 2) == [f"delta {t}" for t in range(away - 1, away + 2)]


def test_the_key_is_taken_where_the_chain_has_more_bytes() -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 1, 1, size=100)
    for round in (2, 3):
        post(relay, 1, round, size=30, builds_on=round - 1)
    take(relay, 1, 4, Posted("delta", 30, 3, 3), Posted("key", 80, 3, None))
    assert chain_of(relay, 1, 5) == ["key"]  # 80 bytes, not 90
    assert chain_of(relay, 2, 5) == ["1@3<2", "delta"]
    assert chain_of(relay, None, 5) == ["key"]


@pytest.mark.parametrize("builds_on", [None, 0])
def test_a_frame_that_builds_on_the_common_first_payload_is_a_key(builds_on: int | None) -> None:
    relay = Relay[str](Topology.path(2))
    take(relay, 1, 4, Posted("key", 10, 3, builds_on))
    assert chain_of(relay, None, 5) == chain_of(relay, 3, 5) == ["key"]
    assert relay.ledger.uplinks[1].keys == 1


def test_a_sender_that_began_again_is_followed() -> None:
    """Its new key leads on from whatever was held, and older deltas stay for those who
    need them no more.
    """
    relay = Relay[str](Topology.path(2))
    post(relay, 1, 1, size=100)
    post(relay, 1, 2, size=10, builds_on=1)
    post(relay, 1, 3, size=100)  # it lost its memory
    post(relay, 1, 4, size=10, builds_on=3)
    for held in (None, 1, 2):
        assert chain_of(relay, held, 5) == ["1@3", "1@4<3"]
    assert chain_of(relay, 3, 5) == ["1@4<3"]


def test_a_delta_without_a_key_leads_nowhere_and_a_key_is_asked_for() -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 1, 3, builds_on=2)
    assert chain_of(relay, None, 4) == []
    take(relay, 1, 1, held={})
    assert relay.parcel(1, round=4).whole


@pytest.mark.parametrize("held", [-3, 99])
def test_a_round_that_nobody_sent_is_not_believed(held: int) -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 1, 1)
    assert chain_of(relay, held, 2) == ["1@1"]


# --- asking for a whole frame ---


def asked(relay: Relay[str], round: int) -> bool:
    take(relay, 0, 1, held={})
    return relay.parcel(0, round=round).whole


def test_a_whole_frame_is_asked_for_when_the_deltas_have_as_many_bytes() -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 0, 1, size=100)
    assert not asked(relay, 2)
    for round, due in ((2, False), (3, False), (4, False), (5, True)):
        post(relay, 0, round, size=24 + (round == 5) * 4, builds_on=round - 1)
        assert asked(relay, round + 1) == due
    take(relay, 0, 6, Posted("delta", 24, 3, 5), Posted("key", 90, 3, 0))
    assert not asked(relay, 7)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_key_interval_counts_from_the_last_key(interval: int) -> None:
    relay = Relay[str](Topology.path(2), key_interval=interval)
    post(relay, 0, 1, size=1000)
    keys = [1]
    for round in range(2, 12):
        frames = [Posted(f"{round}", 1, 1, round - 1)]
        if asked(relay, round):
            frames.append(Posted(f"key {round}", 1000, 1, None))
            keys.append(round)
        take(relay, 0, round, *frames)
    assert keys == [*range(1, 12, interval)]


def test_without_an_interval_cheap_deltas_go_on_for_ever() -> None:
    relay = Relay[str](Topology.path(2))
    post(relay, 0, 1, size=1000)
    for round in range(2, 40):
        assert not asked(relay, round)
        post(relay, 0, round, size=1, builds_on=round - 1)


def test_no_whole_frame_is_asked_for_at_the_end() -> None:
    relay = Relay[str](Topology.path(2), key_interval=1)
    all_post(relay, 1, 0, 1)
    assert relay.parcel(0, round=2).whole
    assert not relay.parcel(0, round=2, closing=True).whole


def test_who_sends_nothing_is_asked_for_nothing() -> None:
    relay = Relay[str](Topology.path(2))
    for round in (1, 2):
        take(relay, 0, round, held={})
    parcel = relay.parcel(0, round=3)
    assert (parcel.whole, parcel.acknowledged) == (False, None)
    assert relay.ledger.totals()["uplink_frames"] == 0


def test_settings_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match="evaluate-every is a number of rounds and must be >= 1; got 0"
    ):
        Relay[str](Topology.ring(3), evaluate_every=0)
    with pytest.raises(
        ConfigError, match="max-staleness is a number of rounds and must be >= 0; got -1"
    ):
        Relay[str](Topology.ring(3), max_staleness=-1)
    with pytest.raises(
        ConfigError,
        match="key-interval is a number of rounds, or 0 for as few as pay; it must be >= 0; got -1",
    ):
        Relay[str](Topology.ring(3), key_interval=-1)


# --- what the ledger is told ---


def test_both_figures_for_comparison_cover_the_same_deliveries() -> None:
    relay = Relay[str](Topology.ring(4))
    for round in (1, 2):
        for agent in range(4):
            relay.parcel(agent, round=round)
        all_post(relay, round, *range(4))
    totals = relay.ledger.totals()
    assert (totals["deliveries"], totals["links_total"], totals["uplink_total"]) == (
        8,
        8 * 14,
        8 * 14,
    )
    assert (totals["fp32_total"], totals["paper_convention_bytes"]) == (8 * 400, 8 * 30 / 8)
    assert totals["bits_per_weight"] == pytest.approx(8 * 14 / 100)
    assert totals["header_total"] == 16 * 3


# ---- one agent that says anything ----------------------------------------------------


def answer(
    agent: int, *frames: Frame, held: Mapping[int, int] | None = None, **more: object
) -> Answer[Frame]:
    return Answer(
        {"agent": agent}, {}, [posted(frame) for frame in frames], held=held or {}, **more
    )  # type: ignore[arg-type]


def test_an_agent_that_lacks_everything_is_believed_ever_less() -> None:
    """Its neighbors would else send a whole frame in every round."""
    relay = Relay[Frame](Topology.complete(3))
    asked: list[int] = []
    for round in range(1, 65):
        parcels = {agent: relay.parcel(agent, round=round) for agent in range(3)}
        if parcels[0].whole:
            asked.append(round)
        for agent in (0, 1):
            last = round - 1 if round > 1 else None
            frames = [Frame(agent, round, 10, last)]
            if parcels[agent].whole:
                frames.append(Frame(agent, round, 9999, None))
            held = {j: round - 1 for j in range(3) if j != agent and round > 1}
            relay.take(agent, answer(agent, *frames, held=held), round=round)
        relay.take(2, answer(2, Frame(2, round, 10, None), lacking=[0, 1]), round=round)
    assert len(asked) <= 7  # 64 rounds; in the rounds after 1, 2, 4, 8, 16 and 32
    assert len(asked) >= 4


def test_who_lost_its_state_once_is_believed_at_once() -> None:
    relay = Relay[Frame](Topology.complete(2))
    for round in range(1, 4):
        for agent in (0, 1):
            relay.parcel(agent, round=round)
            size, builds_on = (10, round - 1) if round > 1 else (99, None)
            held = {1 - agent: round - 1}
            frame = Frame(agent, round, size, builds_on)
            relay.take(agent, answer(agent, frame, held=held), round=round)
    assert not relay.parcel(0, round=4).whole
    relay.parcel(1, round=4)
    relay.take(0, answer(0, Frame(0, 4, 10, 3), held={1: 3}), round=4)
    relay.take(1, answer(1, Frame(1, 4, 10, 3)), round=4)  # it holds nothing any more
    parcel = relay.parcel(1, round=5)
    assert [frame.builds_on for frame in parcel.frames[0]] == [None, 1, 2, 3]
    relay.take(1, answer(1, Frame(1, 5, 10, 4), lacking=[0]), round=5)
    assert relay.parcel(0, round=6).whole  # even the whole frame cannot be decoded there


def test_an_agent_that_never_sends_a_whole_frame_is_silent() -> None:
    relay = Relay[Frame](Topology.complete(2), max_staleness=50)
    kept = []
    for round in range(1, 30):
        for agent in (0, 1):
            relay.parcel(agent, round=round)
            frame = Frame(agent, round, 1000, 99 if agent == 0 else None)
            relay.take(agent, answer(agent, frame), round=round)
        kept.append(len(relay._posted.get(0, [])))
    assert max(kept) <= 4
    assert kept[-1] == 0
    assert relay.parcel(0, round=30).whole  # it may come back
    relay.take(0, answer(0, Frame(0, 30, 1000, None)), round=30)
    relay.take(1, answer(1, held={}), round=30)
    assert [frame.round for frame in relay.parcel(1, round=31).frames[0]] == [30]


def test_whole_frames_come_with_how_much_their_masks_keep() -> None:
    relay = Relay[Frame](Topology.complete(3))
    for agent, facts in enumerate([{"kept-by-layer": [3, 5]}, {"kept-by-layer": [4, 4]}, {}]):
        relay.parcel(agent, round=1)
        frame = posted(Frame(agent, 1, 99, 0))
        relay.take(agent, Answer({"agent": agent, **facts}, {}, [frame]), round=1)
    assert relay.parcel(2, round=2).kept == {0: [3, 5], 1: [4, 4]}
    assert relay.parcel(0, round=2).kept == {1: [4, 4]}
    frame = posted(Frame(0, 2, 9, 1))
    held = {0: 1, 1: 1}
    relay.take(0, Answer({"agent": 0, "kept-by-layer": [3, 5]}, {}, [frame]), round=2)
    relay.take(2, Answer({"agent": 2}, {}, [], held=held), round=2)
    parcel = relay.parcel(2, round=3)
    assert ([f.round for f in parcel.frames[0]], parcel.kept) == ([2], {})
