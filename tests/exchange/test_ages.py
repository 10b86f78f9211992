"""Ages and votes: against a diary that remembers everything, and NumPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import ConfigError, Topology
from flower_mcepl.agents import make_agent as agent_of
from flower_mcepl.config.schedules import ASYNC
from flower_mcepl.exchange.ages import OwnAges, vote
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.exchange.turn import open_mail, play_round
from flower_mcepl.masks.fusion import Fusion
from tests.fleet.agents import SEED, make_agent, make_fleet, small_net, split

MOST = 3
happenings = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=40)


def diary_age(diary: list[tuple[bool, int]], agent: int, sender: int) -> int:
    """Parcels of the agent since the last frame of the sender, by reading backwards."""
    age = 0
    for is_frame, who in reversed(diary):
        if is_frame and who == sender:
            return age
        age += (not is_frame) and who == agent
    raise LookupError(sender)


@given(diary=happenings)
def test_an_age_is_the_number_of_parcels_since_the_frame_came(
    diary: list[tuple[bool, int]],
) -> None:
    ages = OwnAges(MOST)
    for number, (is_frame, who) in enumerate(diary, start=1):
        (ages.note_frame if is_frame else ages.note_parcel)(who)
        senders = {sender for frame, sender in diary[:number] if frame}
        for agent in range(4):
            for sender in senders:
                expected = min(diary_age(diary[:number], agent, sender), MOST + 1)
                assert ages.age(agent, sender) == expected


@given(
    age_decay=st.floats(0.0, 1.0, exclude_min=True),
    rounds=st.dictionaries(st.integers(1, 5), st.integers(0, 6), max_size=5),
    seed=st.integers(0, 99),
)
def test_faded_votes_are_those_of_numpy(
    age_decay: float, rounds: dict[int, int], seed: int
) -> None:
    """``n = 1/|N| Σ λ^a m_j``: what a vote lacks falls to the agent itself."""
    agent, rng = make_agent(0), np.random.default_rng(seed)
    masks = {
        sender: {name: rng.random(shape) < 0.5 for name, shape in agent.layers.items()}
        for sender in sorted(rounds)
    }
    votes = {sender: vote(age, age_decay=age_decay) for sender, age in rounds.items()}
    inbox = {
        sender: {name: torch.from_numpy(mask) for name, mask in payload.items()}
        for sender, payload in masks.items()
    }
    agent.fuse(inbox, round=1, votes={s: v for s, v in votes.items() if v != 1})
    for name, n in agent.model.neighbor_means.items():
        if not masks:
            assert n is None
            continue
        heard = [age_decay ** rounds[s] * payload[name] for s, payload in masks.items()]
        assert n is not None
        np.testing.assert_allclose(n.numpy(), sum(heard) / len(heard), rtol=1e-6, atol=1e-7)


def test_a_faded_mean_survives_in_the_state() -> None:
    agent, other = make_agent(0), make_agent(1)
    agent.fuse({1: other.outgoing()}, round=1, votes={1: 0.3})
    again = make_agent(0)
    again.restore(agent.state())
    for name, n in agent.model.neighbor_means.items():
        assert torch.equal(n, again.model.neighbor_means[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["dsgd", "dfedavgm", "choco"])
def test_faded_weights_of_averaging_fall_to_the_agent(algorithm: str) -> None:
    """``x_i + Σ_j v_j W_ij (x_j - x_i)``, W of two neighbors of unknown degree."""
    one, two, three = (dense_agent(algorithm, index) for index in range(3))
    for agent in (one, two, three):
        agent.train(round=1)
    own = {name: x.clone() for name, x in one.mixed_weights().items()}
    start = {name: x.clone() for name, x in one.weights.items()}
    inbox = {2: three.outgoing(), 1: two.outgoing()}
    one.fuse(inbox, round=1, votes={2: 0.25})
    gamma = one.consensus_lr
    for name in one.shared:
        pull = sum(v / 3 * (inbox[j][name] - own[name]) for j, v in ((1, 1.0), (2, 0.25)))
        torch.testing.assert_close(one.weights[name], start[name] + gamma * pull)


def dense_agent(algorithm: str, index: int, **keys: Any) -> Any:
    from flower_mcepl import AgentData, shared_module

    data = AgentData.of(split(index), split(1000 + index), agent=index)
    module = shared_module(small_net, seed=SEED)
    return agent_of(algorithm, index, module, data, {"batch-size": 8, **keys}, seed=SEED)


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [("dispfl", {"drop-fraction": 0.0}), ("mcepl", {"fusion": "mask-averaging"})],
)
def test_who_cannot_weigh_votes_refuses_to_let_them_fade(
    algorithm: str, keys: dict[str, Any]
) -> None:
    agent = dense_agent(algorithm, 0, **keys)
    open_mail(agent, max_staleness=5)
    with pytest.raises(ConfigError, match=r"age-decay must be 1; got 0\.5\. Leave it out; mcepl"):
        open_mail(agent, max_staleness=5, age_decay=0.5)


def test_a_rule_of_bits_alone_says_that_votes_have_faded() -> None:
    agent, other = make_agent(0), make_agent(1)
    agent.model.fusion = Fusion(hear=lambda masks, own: (masks[0] & own).float())
    agent.fuse({1: other.outgoing()}, round=1)
    with pytest.raises(ConfigError, match=r"gets masks as floats, .*set age-decay to 1"):
        agent.fuse({1: other.outgoing()}, round=2, votes={1: 0.5})


@pytest.mark.parametrize("age_decay", [0.0, -0.5, 1.01, float("nan")])
def test_a_decay_out_of_range(age_decay: float) -> None:
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]; got .*1 lets all votes count"):
        Relay[bytes](Topology.ring(3), age_decay=age_decay)


# --- mailbox and relay ---


def mailbox(**options: Any) -> tuple[Mailbox, Any]:
    agent = make_agent(0)
    return open_mail(agent, **{"max_staleness": 2, "age_decay": 0.5, **options}).inbox, agent


def test_a_frame_of_a_sender_far_ahead_ages_by_the_owners_rounds() -> None:
    inbox, _ = mailbox()
    sender = make_agent(1)
    frame = open_mail(sender, max_staleness=2).outbox.write(sender.outgoing(), round=40)[0].data
    inbox.put(1, [frame], latest_round=None, came=3)
    assert inbox.rounds() == {1: 40}  # what the next frame may build on
    expected: list[dict[int, float]] = [{}, {1: 0.5}, {1: 0.25}]
    for round, votes in zip((3, 4, 5), expected, strict=True):
        assert set(inbox.current([1], round=round)) == {1}
        assert inbox.votes([1], round=round) == votes
    assert inbox.current([1], round=6) == {}
    restored, _ = mailbox()
    restored.restore(inbox.arrays())
    assert restored.votes([1], round=5) == {1: 0.25}
    restored.forget(older_than=6)
    assert restored.rounds() == {}


def test_by_rounds_a_frame_says_its_own_age() -> None:
    inbox, _ = mailbox()
    sender = make_agent(1)
    frame = open_mail(sender, max_staleness=2).outbox.write(sender.outgoing(), round=3)[0].data
    inbox.put(1, [frame], latest_round=4)
    assert (inbox.votes([1], round=3), inbox.votes([1], round=4)) == ({}, {1: 0.5})
    assert "1/came" not in inbox.arrays()
    assert inbox.votes([2], round=2) == {2: 0.25}  # the common first payload is of round 0


def test_the_relay_says_ages_and_stops_with_them() -> None:
    """Agent 1 answers once; agent 0 goes on alone, and hears it so long."""
    agents = make_fleet(2)
    relay = Relay[bytes](Topology.ring(2), max_staleness=2, schedule=ASYNC)
    mails = [open_mail(agent, max_staleness=2) for agent in agents]
    heard = []

    def play(index: int, round: int) -> Parcel[bytes]:
        parcel = relay.parcel(index, round=round)
        reply = play_round(agents[index], mails[index], parcel)
        relay.take(index, answer_of(agents[index], reply), round=round)
        heard.append({*mails[index].inbox.current([1 - index], round=round - 1)})
        return parcel

    for round in range(1, 8):
        play(1, round)
    parcels = [play(0, round) for round in range(1, 6)]
    assert [parcel.ages for parcel in parcels] == [None, {1: 0}, {}, {}, {}]
    assert parcels[1].frames[1]  # round 7 of agent 1 in round 2 of agent 0
    # the first parcel of an agent brings nothing: it goes on from the common first mask
    assert heard[7:] == [{1}, {1}, {1}, {1}, set()]


def answer_of(agent: Any, reply: Any) -> Answer[bytes]:
    facts: Mapping[str, Any] = agent.describe()
    return reply.answer(facts, bytes)  # type: ignore[no-any-return]
