"""CHOCO-SGD over the real wire and relay, against NumPy and a diary of what is held."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from flower_mcepl import ConfigError, Topology, simulate
from flower_mcepl.agents.choco import ChocoConfig
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.exchange.turn import Mail, Reply, open_mail, play_round
from tests.fleet.agents import noisy_net, same_tensors, split
from tests.oracles import weights as slow_weights
from tests.oracles.baselines import (
    CLOSE,
    NAMES,
    RING,
    agent_of,
    arrays,
    assert_same,
    data_of,
    fleet_of,
    play,
)
from tests.oracles.weights import Weights

COMPLETE = tuple(tuple(j for j in range(4) if j != i) for i in range(4))
LOCAL: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.02, "local_steps": 2}
SIGN = {"compressor": "sign"}
TOP = {"compressor": "top-k", "top_k": 0.1}
When = Mapping[int, Collection[int]]  # agents by round


def graph_of(neighbors: Sequence[Sequence[int]]) -> Topology:
    edges = [(i, j) for i, others in enumerate(neighbors) for j in others if i < j]
    return Topology.from_edges(edges, num_agents=len(neighbors))


class Fleet:
    """Agents over a relay: some are offline in a round, or their answer is lost."""

    def __init__(self, agents: Sequence[Any], neighbors: Sequence[Sequence[int]]) -> None:
        self.agents, self.mails = list(agents), [open_mail(a, max_staleness=5) for a in agents]
        self.relay = Relay[bytes](graph_of(neighbors), max_staleness=5)

    def play(
        self, round: int, *, offline: Collection[int] = (), lost: Collection[int] = ()
    ) -> dict[int, Reply]:
        online = [agent.index for agent in self.agents if agent.index not in offline]
        parcels = {i: self.relay.parcel(i, round=round) for i in online}
        replies = {
            i: play_round(self.agents[i], self.mails[i], parcel) for i, parcel in parcels.items()
        }
        for i, reply in replies.items():
            assert (reply.refused, reply.lacking) == ([], [])
            if i not in lost:
                answer = reply.answer(self.agents[i].describe(), bytes)
                self.relay.take(i, answer, round=round)
        return replies

    def held_by(self, agent: int, round: int) -> dict[int, Any]:
        return dict(self.mails[agent].inbox.current(range(len(self.agents)), round=round))


def slow_sign(d: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    size = np.float32(sum(abs(float(value)) for value in d.ravel()) / d.size)
    return np.array([size if value >= 0 else -size for value in d.ravel()]).reshape(d.shape)


def slow_top(d: np.ndarray[Any, Any], share: float = 0.1) -> np.ndarray[Any, Any]:
    order = sorted(range(d.size), key=lambda place: -abs(float(d.ravel()[place])))
    kept = order[: max(1, int(np.ceil(share * d.size)))]
    rounded = torch.from_numpy(d.ravel().copy()).to(torch.bfloat16).float().numpy()
    return np.array([rounded[k] if k in kept else 0.0 for k in range(d.size)], np.float32).reshape(
        d.shape
    )


SLOW: list[Any] = [(SIGN, slow_sign), (TOP, slow_top)]


@pytest.mark.parametrize("neighbors", [RING, COMPLETE], ids=["ring", "complete"])
@pytest.mark.parametrize(("settings", "q"), SLOW, ids=["sign", "top-k"])
@pytest.mark.parametrize(
    ("offline", "lost"),
    [({}, {}), ({3: [2], 4: [2], 5: [2]}, {}), ({6: [0]}, {4: [1, 3], 5: [1]})],
    ids=["all", "one is away", "answers get lost"],
)
def test_rounds_by_the_published_equations(
    neighbors: Any,
    settings: dict[str, Any],
    q: Callable[[Any], Any],
    offline: When,
    lost: When,
) -> None:
    agents = fleet_of("choco", consensus_lr=0.6, **settings, **LOCAL)
    fleet, weight = Fleet(agents, neighbors), 1 / (1 + len(neighbors[0]))
    x, data = [arrays(agent) for agent in agents], data_of(agents)
    first = {name: value.astype(np.float32) for name, value in x[0].items()}
    came = [dict(first) for _ in agents]  # x^_i as the relay has it
    own = [dict(first) for _ in agents]  # x^_i as agent i takes it
    begun: set[int] = set()
    for round in range(1, 10):
        replies = fleet.play(round, offline=offline.get(round, ()), lost=lost.get(round, ()))
        before = [dict(model) for model in came]  # what parcels of this round were made of
        for i, reply in replies.items():
            if i in begun:  # an agent that never answered gets no neighbors
                x[i] = {
                    n: x[i][n] + 0.6 * weight * sum(before[j][n] - own[i][n] for j in neighbors[i])
                    for n in NAMES
                }
            x[i] = slow_weights.sgd(
                x[i], data[i], steps=2, lr=0.1, decay=0.02, momentum=0.0, velocity={}
            )
            sent: Weights = {n: reply.payload[name].numpy() for n, name in NAMES.items()}
            for n, name in NAMES.items():
                np.testing.assert_allclose(sent[n], x[i][n], **CLOSE)
                # from what the relay has, also where the last answer was lost
                own[i][n] = came[i][n] + q(sent[n] - came[i][n])
                assert np.array_equal(reply.frames[0].decoded[name].numpy(), own[i][n])
            x[i] = {n: value.astype(np.float64) for n, value in sent.items()}
            if i not in lost.get(round, ()):
                came[i] = dict(own[i])
                begun.add(i)
    assert_same(agents, x)
    assert begun == {0, 1, 2, 3}


@pytest.mark.parametrize("settings", [SIGN, TOP], ids=["sign", "top-k"])
def test_a_neighbor_holds_what_the_agent_thinks_that_it_holds(settings: dict[str, Any]) -> None:
    """Bit for bit, also after a long absence, for which only a whole frame helps."""
    fleet = Fleet(fleet_of("choco", **settings, **LOCAL), COMPLETE)
    whole = 0
    for round in range(1, 40):
        away = [2] if 5 <= round < 25 else []
        known = [{n: w.clone() for n, w in agent._known.items()} for agent in fleet.agents]
        replies = fleet.play(round, offline=away)
        whole += sum(len(reply.frames) == 2 for reply in replies.values())
        for i in replies:
            for j, payload in fleet.held_by(i, round - 1).items() if round > 1 else ():
                if j in away or (j == 2 and round == 25):
                    continue
                assert same_tensors({n: payload[n] for n in known[j]}, known[j])
        assert round < 12 or not away or set(fleet.held_by(0, round - 1)) == {1, 3}
    assert whole > 3
    assert set(fleet.held_by(2, 39)) == {0, 1, 3}


@pytest.mark.slow
def test_agents_agree_in_the_end_without_a_gradient() -> None:
    """Compressed gossip alone reaches consensus on the mean of the first models."""
    settings = {"lr": 1e-30, "weight_decay": 0.0}
    for compressor in (SIGN, TOP):
        agents = fleet_of("choco", consensus_lr=0.3, **compressor, **settings)
        for agent in agents:
            draw = torch.Generator().manual_seed(agent.index)
            with torch.no_grad():
                for weight in agent.weights.values():
                    weight.add_(torch.randn(weight.shape, generator=draw))
        mean = {n: sum(arrays(agent)[n] for agent in agents) / 4 for n in NAMES}
        fleet = Fleet(agents, COMPLETE)
        gaps = []
        for round in range(1, 31):
            fleet.play(round)
            gaps.append(
                max(float(np.abs(arrays(a)[n] - mean[n]).max()) for a in agents for n in NAMES)
            )
        assert gaps[-1] < 0.3 * gaps[0]


def test_without_a_wire_it_is_gossip_at_a_part_of_the_way() -> None:
    agents, w = fleet_of("choco", consensus_lr=0.5, **LOCAL), slow_weights.metropolis(RING)
    x, data = [arrays(agent) for agent in agents], data_of(agents)
    for round in (1, 2, 3):
        x = [
            slow_weights.sgd(mine, part, steps=2, lr=0.1, decay=0.02, momentum=0.0, velocity={})
            for mine, part in zip(x, data, strict=True)
        ]
        mixed = slow_weights.mix(w, x)
        x = [{n: 0.5 * a[n] + 0.5 * b[n] for n in a} for a, b in zip(x, mixed, strict=True)]
        play(agents, RING, round)
    assert_same(agents, x)


@pytest.mark.parametrize("settings", [SIGN, TOP], ids=["sign", "top-k"])
def test_a_fleet_from_its_states_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    def make() -> Fleet:
        common = {"momentum": 0.6, "batch_size": 8, "local_steps": 2}
        fleet = [
            agent_of("choco", i, model_fn=noisy_net, split=split, **settings, **common)
            for i in range(4)
        ]
        return Fleet(fleet, RING)

    one, other = make(), make()
    for round in (1, 2, 3):
        one.play(round)
    for agent, copy, mail, new in zip(
        one.agents, other.agents, one.mails, other.mails, strict=True
    ):
        copy.restore(agent.state())
        restore(new, mail)
    other.relay.restore(one.relay.state(round=3))
    for round in (4, 5):
        mine, theirs = one.play(round, offline=[1]), other.play(round, offline=[1])
        assert [r.frames[0].data for r in mine.values()] == [
            r.frames[0].data for r in theirs.values()
        ]
    for agent, copy in zip(one.agents, other.agents, strict=True):
        assert same_tensors(agent.state().tensors, copy.state().tensors)


def restore(new: Mail, mail: Mail) -> None:
    new.inbox.restore(mail.inbox.arrays())
    new.outbox.restore(mail.outbox.arrays())


@pytest.mark.parametrize(
    ("settings", "bits"),
    [(SIGN, 1.0), ({**TOP, "top_k": 0.1}, 2.13), ({**TOP, "top_k": 0.01}, 0.25)],
)
def test_frames_have_the_bits_that_the_pages_say(settings: dict[str, Any], bits: float) -> None:
    def wide() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 3000), torch.nn.Linear(3000, 3))

    sizes = []
    agents = [agent_of("choco", i, model_fn=wide, lr=0.001, **settings) for i in range(2)]
    simulate(
        agents,
        Topology.ring(2),
        num_rounds=5,
        on_reply=lambda round, agent, reply: sizes.extend(
            len(frame.data) for frame in reply.frames[:1]
        ),
    )
    weights = agents[0].num_weights()
    assert 8 * sizes[-1] / weights == pytest.approx(bits, abs=0.08)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compressor": "zip"}, r"compressor must be one of sign, top-k; got 'zip'"),
        ({"top_k": 0.02}, r"top-k must be one of 0\.001, 0\.01, 0\.1; got 0\.02"),
        ({"consensus_lr": 0.0}, r"consensus-lr must be in \(0, 1\]; got 0\.0"),
        ({"consensus_lr": 1.5}, r"consensus-lr must be in \(0, 1\]; got 1\.5"),
    ],
)
def test_bad_settings_are_refused_by_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent_of("choco", **settings)


def test_each_share_has_its_codec() -> None:
    assert ChocoConfig().precision == "sign-differences"
    for share in (0.001, 0.01, 0.1):
        config = ChocoConfig(compressor="top-k", top_k=share)
        assert config.precision == f"top-{share}-differences"
