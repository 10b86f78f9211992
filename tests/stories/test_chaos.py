"""Twenty agents, or twelve nodes, every fifth message lost in either direction, every
agent restarted once without its memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from flower_mcepl import Agent, MceplAgent, Topology, read_run
from flower_mcepl.agents import AgentState
from flower_mcepl.agents.agent import Payload
from flower_mcepl.exchange.parcels import Answer, Parcel, Posted
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.exchange.turn import Mail, Reply, open_mail, play_round
from tests.fleet.agents import make_agent, same_tensors
from tests.fleet.flower import agent_grid, gossip, state_of

NUM_AGENTS, LOSS, STALENESS = 20, 0.2, 5
FINGERPRINT = "0123456789abcdef" * 2
LAYERS = {"conv": (16, 3, 3, 3), "fc": (40, 20)}


def random_masks(seed: str, share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(Random(seed).getrandbits(40))
    return {name: torch.rand(shape, generator=generator) < share for name, shape in LAYERS.items()}


def random_weights(seed: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(Random(seed).getrandbits(40))
    return {name: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}


FIRST, FIRST_WEIGHTS = random_masks("first", 0.3), random_weights("first")


class Flipping(Agent):
    """An agent whose masks flip a little every round, and that learns nothing."""

    algorithm = "flipping"
    fingerprint = FINGERPRINT
    layers = LAYERS
    seed = 0

    def __init__(self, index: int) -> None:
        self.index = index
        self.payload = FIRST

    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        pass

    def train(self, *, round: int) -> dict[str, float]:
        flips = random_masks(f"{self.index}, {round}", 0.02)
        self.payload = {name: mask ^ flips[name] for name, mask in self.payload.items()}
        return {}

    def outgoing(self) -> dict[str, Tensor]:
        return dict(self.payload)

    def evaluate(self) -> dict[str, float]:
        return {}

    def state(self) -> AgentState:
        return AgentState.of_tensors({}, self.payload)

    def restore(self, state: AgentState) -> None:
        self.payload = state.tensors

    def first_payload(self) -> dict[str, Tensor]:
        return FIRST

    def parameters(self) -> dict[str, Any]:
        return {}


class Drifting(Flipping):
    """The same with weights that move a little, sent as quantized differences."""

    algorithm = "drifting"
    precision = "int8-differences"

    def __init__(self, index: int) -> None:
        self.index = index
        self.payload = FIRST_WEIGHTS

    def train(self, *, round: int) -> dict[str, float]:
        steps = random_weights(f"{self.index}, {round}")
        self.payload = {name: weight + 0.01 * steps[name] for name, weight in self.payload.items()}
        return {}

    def first_payload(self) -> dict[str, Tensor]:
        return FIRST_WEIGHTS


@dataclass
class Device:
    """An agent with its mail, and what the outside saw of it."""

    agent: Flipping
    mail: Mail
    # by round, as decoded, arrived or not
    sent: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    # what it holds, as in its last answer that arrived
    told: dict[int, int] = field(default_factory=dict)
    restarted: int = 0  # the round in which it lost its memory
    heard: int = 0  # the round of its last answer that arrived
    seen: dict[int, int] = field(default_factory=dict)  # what was found to be right in its mailbox

    @classmethod
    def fresh(cls, agent: Flipping) -> "Device":
        return cls(agent, open_mail(agent, max_staleness=STALENESS))

    def forget_everything(self, round: int) -> None:
        self.agent = type(self.agent)(self.agent.index)
        self.mail, self.seen = open_mail(self.agent, max_staleness=STALENESS), {}
        self.restarted = round


Post = Posted[bytes]


class Chaos:
    def __init__(
        self,
        topology: Topology,
        seed: int,
        num_rounds: int,
        key_interval: int,
        kind: type[Flipping] = Flipping,
    ) -> None:
        self.random = Random(seed)
        self.topology, self.num_rounds = topology, num_rounds
        self.relay = Relay[bytes](topology, max_staleness=STALENESS, key_interval=key_interval)
        self.devices = [Device.fresh(kind(index)) for index in range(topology.num_agents)]
        self.restarts = {
            index: self.random.randint(2, max(num_rounds, 2))
            for index in range(topology.num_agents)
        }
        self.posts: dict[int, list[tuple[int, Post]]] = {
            device.agent.index: [] for device in self.devices
        }
        self.keys_sent = self.lacked = self.deliveries = 0

    def lost(self, round: int) -> bool:
        return round <= self.num_rounds and self.random.random() < LOSS

    def play(self, round: int, *, closing: bool = False) -> None:
        parcels = [
            self.relay.parcel(d.agent.index, round=round, closing=closing) for d in self.devices
        ]
        for device, parcel in zip(self.devices, parcels, strict=True):
            for sender, chain in parcel.frames.items():
                self.check_chain(device, sender, chain, parcel.round - 1)
            if self.restarts.get(device.agent.index) == round:
                device.forget_everything(round)
            if not self.lost(round):  # the order
                reply = self.answer(device, parcel)
                if not self.lost(round):  # the answer
                    self.take_in(device, reply, round)
        for device in self.devices:
            self.check_mailbox(device)

    def answer(self, device: Device, parcel: Parcel[bytes]) -> Reply:
        held = device.mail.inbox.rounds()
        reply = play_round(device.agent, device.mail, parcel)
        assert reply.refused == []
        for sender in reply.lacking:
            # Only who has lost what it said it holds can lack anything: by a restart
            # that the relay has not heard of, or because it was too old to count.
            assert sender in device.told
            assert sender not in held
            stale = parcel.round - 1 - device.told[sender] > STALENESS
            assert device.restarted > device.heard or stale
            self.lacked += 1
        if parcel.train:
            device.sent[parcel.round] = {**device.agent.outgoing(), **reply.frames[0].decoded}
            whole = [not frame.reference for frame in reply.frames]
            forgotten = parcel.acknowledged is None or parcel.acknowledged < device.restarted
            # It starts afresh exactly where it must, and a key comes beside a delta
            # exactly where one is asked for.
            assert whole == ([True] if forgotten else [False, True] if parcel.whole else [False])
            self.keys_sent += sum(whole)
        return reply

    def take_in(self, device: Device, reply: Reply, round: int) -> None:
        device.told, device.heard = dict(reply.held), round
        posts = [Posted(f.data, len(f.data), f.header_bytes, f.reference) for f in reply.frames]
        self.posts[device.agent.index] += [(round, post) for post in posts]
        self.relay.take(device.agent.index, Answer({}, {}, posts, held=reply.held), round=round)

    def check_chain(self, device: Device, sender: int, chain: list[bytes], previous: int) -> None:
        """A key goes over a link only where the receiver holds nothing that leads on,
        or that would cost more.
        """
        self.deliveries += 1
        posts = [
            next(post for _, post in self.posts[sender] if post.frame == frame) for frame in chain
        ]
        if not posts[0].is_key:
            return
        held = device.told.get(sender)
        newest, last_key = (
            self.posts[sender][-1][0],
            max(r for r, post in self.posts[sender] if post.is_key),
        )
        if held is None or last_key - held > STALENESS:
            return
        deltas = self.delta_chains(sender, newest, held)
        assert all(
            sum(p.num_bytes for p in other) > sum(p.num_bytes for p in posts) for other in deltas
        )

    def delta_chains(self, sender: int, to: int, held: int) -> Iterator[list[Post]]:
        """Every chain of deltas ever posted that leads from one round to another."""
        if to == held:
            yield []
        for round, post in self.posts[sender]:
            if round == to and post.builds_on and post.builds_on >= held:
                yield from (
                    [*chain, post] for chain in self.delta_chains(sender, post.builds_on, held)
                )

    def check_mailbox(self, device: Device) -> None:
        """What is held of each sender is, bit for bit, what that one sent, decoded, in
        the round that is named.
        """
        inbox = device.mail.inbox
        for sender, round in inbox.rounds().items():
            if device.seen.get(sender) == round:
                continue
            device.seen[sender] = round
            assert same_tensors(
                dict(inbox.current([sender], round=round)[sender]), self.devices[sender].sent[round]
            )

    def check_all_is_well(self, round: int) -> None:
        """Everybody holds the payloads of ``round`` of all neighbors."""
        for device in self.devices:
            neighbors = self.topology.in_neighbors(device.agent.index, round=round)
            found = device.mail.inbox.current(neighbors, round=round)
            assert {j: device.mail.inbox.rounds()[j] for j in neighbors} == dict.fromkeys(
                neighbors, round
            )
            assert all(same_tensors(dict(found[j]), self.devices[j].sent[round]) for j in neighbors)


TOPOLOGIES = {
    "ring": Topology.ring(NUM_AGENTS),
    "regular": Topology.random_regular(NUM_AGENTS, degree=4, seed=1),
    "changing": Topology.random_neighbors(NUM_AGENTS, degree=3, seed=1),
}


@pytest.mark.parametrize(
    ("topology", "seed", "key_interval", "kind"),
    [
        ("ring", 0, 0, Flipping),
        pytest.param("ring", 1, 0, Flipping, marks=pytest.mark.slow),  # as with seed 0
        pytest.param("regular", 2, 0, Flipping, marks=pytest.mark.slow),  # as the ring
        ("regular", 3, 4, Flipping),
        ("changing", 4, 0, Flipping),
        pytest.param("ring", 0, 0, Drifting, marks=pytest.mark.slow),  # as the changing one
        ("regular", 3, 4, Drifting),
        ("changing", 4, 0, Drifting),
    ],
)
def test_all_end_with_exactly_their_neighbors_payloads(
    topology: str, seed: int, key_interval: int, kind: type[Flipping]
) -> None:
    num_rounds = 16
    chaos = Chaos(TOPOLOGIES[topology], seed, num_rounds, key_interval, kind)
    for round in range(1, num_rounds + 1):
        chaos.play(round)
    assert all(device.restarted for device in chaos.devices)
    chaos.play(num_rounds + 1)  # a round in which nothing is lost
    chaos.play(num_rounds + 2, closing=True)  # brings its payloads
    chaos.check_all_is_well(num_rounds + 1)
    # what they hold is near what the senders have, though many errors of rounding went
    # in
    if kind is Drifting:
        for device in chaos.devices:
            for name, weight in device.agent.payload.items():
                assert (device.sent[num_rounds + 1][name] - weight).abs().max() < 0.01
    totals = chaos.relay.ledger.totals()
    assert totals["deliveries"] == chaos.deliveries
    assert (
        totals["uplink_keys"]
        <= chaos.keys_sent
        < totals["uplink_frames"] / (2 if key_interval == 0 else 1)
    )


def test_without_losses_or_restarts_a_link_carries_one_key() -> None:
    chaos = Chaos(TOPOLOGIES["ring"], 0, 0, 0)
    chaos.restarts = {}
    for round in range(1, 11):
        chaos.play(round)
    assert chaos.lacked == 0
    rows = chaos.relay.ledger.link_rows()
    assert len(rows) == 2 * NUM_AGENTS
    assert {(row["keys"], row["frames"]) for row in rows} == {(1, 9)}


# --- through Flower's messages ---


def noting_agent(index: int, sent: dict[tuple[int, int], dict[str, Tensor]]) -> MceplAgent:
    """An agent that writes down what it sends."""
    agent = make_agent(index)
    train, outgoing = agent.train, agent.outgoing
    now = 0

    def noting_train(*, round: int) -> dict[str, float]:
        nonlocal now
        now = round
        return train(round=round)

    def noting_outgoing() -> dict[str, Tensor]:
        sent[index, now] = outgoing()
        return sent[index, now]

    agent.train, agent.outgoing = noting_train, noting_outgoing  # type: ignore[method-assign]
    return agent


@pytest.mark.slow
def test_the_same_through_strategy_and_client(tmp_path: Path) -> None:
    random, num_rounds, size = Random(0), 8, 12
    topology = Topology.random_regular(size, degree=4, seed=1)
    sent: dict[tuple[int, int], dict[str, Tensor]] = {}
    grid = agent_grid(size, lambda index: noting_agent(index, sent))
    restarts: dict[int, list[int]] = {}
    for agent in range(size):
        restarts.setdefault(random.randint(2, num_rounds - 1), []).append(agent)
    agents = {index: make_agent(index) for index in range(size)}

    def prepare(round: int) -> None:
        for agent in restarts.get(round, []):
            grid.add_node(1000 + agent, agent)
        for fate in (grid.silent, grid.mute):  # the message is lost; or its answer is
            fate.clear()
            fate.update(
                1000 + agent
                for agent in range(size)
                if round < num_rounds and random.random() < LOSS
            )

    def held(agent: int) -> Mapping[int, Any]:
        """What the node's Context holds of each sender, with the round."""
        inbox = open_mail(agents[agent], max_staleness=STALENESS).inbox
        context = grid.contexts[1000 + agent]
        if context.state:
            inbox.restore(state_of(context).inbox)
        return {
            j: (round, inbox.current([j], round=round)[j]) for j, round in inbox.rounds().items()
        }

    def check(round: int) -> None:
        for agent in range(size):
            for sender, (sent_in, masks) in held(agent).items():
                assert same_tensors(dict(masks), sent[sender, sent_in])

    prepare(1)
    steps = {round: lambda round=round: prepare(round) for round in range(2, num_rounds + 1)}
    gossip(
        grid,
        topology,
        rounds=num_rounds,
        min_agents=1,
        max_staleness=STALENESS,
        evaluate_every=99,
        before=steps,
        after=check,
        record=tmp_path,
    )
    check(num_rounds + 1)
    for agent in range(size):
        neighbors = topology.in_neighbors(agent)
        assert {j: round for j, (round, _) in held(agent).items()} == dict.fromkeys(
            neighbors, num_rounds
        )
    (folder,) = tmp_path.iterdir()
    run = read_run(folder)
    assert [line["refused"] for line in run.relay] == [{}] * (num_rounds + 1)
    reasons = {reason.partition(".")[0] for line in run.relay for reason in line["failed"].values()}
    assert reasons == {"error 3: Message Unavailable", "error 4: Reply Unavailable"}
    fresh = [agent for line in run.relay[1:] for agent in line["fresh"]]
    assert len({*fresh}) > size / 2  # the others' answers in that round were lost
