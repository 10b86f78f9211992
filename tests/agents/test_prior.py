"""What all agents know of every mask beforehand: the same everywhere, drawn from
nothing.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

from flower_mcepl import ForeignFrameError, MaskedModel, MceplAgent, Topology, simulate
from flower_mcepl.agents.parts import prior as module
from flower_mcepl.agents.parts.prior import SCORE_CLASSES, WEIGHT_CLASSES, shared_prior
from flower_mcepl.exchange.turn import open_mail
from flower_mcepl.streams import torch_stream
from flower_mcepl.wire import Prior, encode_frame
from tests.fleet.agents import SEED, make_agent, make_fleet, same_tensors, small_net


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cache", {})


def prior_of(agent: MceplAgent) -> Prior:
    assert agent.prior is not None
    return agent.prior


def agents(**config: object) -> list[MceplAgent]:
    """Agents as on different devices, where nothing is shared through the cache."""
    fleet = []
    for index in (0, 1, 5):
        module._cache.clear()
        fleet.append(make_agent(index, **config))
    return fleet


@pytest.mark.parametrize("score_init", ["shared", "independent"])
def test_all_agents_have_the_same(score_init: str) -> None:
    digests = {prior_of(agent).digest for agent in agents(score_init=score_init)}
    again = {
        prior_of(agent).digest
        for agent in agents(score_init=score_init, retention=0.5, first_retention=0.3)
    }
    assert len(digests) == 1
    assert digests == again  # what an agent keeps is its own business


def test_with_scores_of_their_own_the_weights_alone_count() -> None:
    """The classes tell sizes of weights: scores that differ may not show."""
    fleet = agents(score_init="independent")
    assert not torch.equal(fleet[0].model.scores["3.weight"], fleet[1].model.scores["3.weight"])
    assert prior_of(fleet[0]).digest == prior_of(fleet[1]).digest != prior_of(make_agent(0)).digest
    weight = fleet[0].model.module.get_parameter("3.weight").detach()
    assert_classes(prior_of(fleet[0]), "3.weight", levels(weight, SCORE_CLASSES))


def levels(tensor: torch.Tensor, count: int) -> list[int]:
    """Sizes in ``count`` equal steps up to the largest, one by one."""
    sizes = np.abs(tensor.detach().numpy().reshape(-1))
    return [
        min(int(np.float32(size / sizes.max()) * np.float32(count)), count - 1) for size in sizes
    ]


def test_a_tensor_without_elements_or_sizes_has_the_lowest_level() -> None:
    for tensor in (torch.zeros(0, 3), torch.zeros(2, 3)):
        levels_of = module._levels(tensor, SCORE_CLASSES)
        assert (levels_of.dtype, levels_of.shape) == (torch.uint8, tensor.shape)
        assert not levels_of.any()


def assert_classes(prior: Prior, name: str, expected: list[int]) -> None:
    found = prior.classes(name)
    assert found is not None
    labels = np.empty(len(expected), np.int64)
    labels[found.order] = np.repeat(np.arange(len(found.starts) - 1), np.diff(found.starts))
    assert labels.tolist() == expected


def test_with_shared_scores_sizes_of_scores_and_weights_make_the_classes() -> None:
    agent = make_agent(0)
    for name, scores in agent.model.scores.items():
        weight = agent.model.module.get_parameter(name).detach()
        pairs = zip(levels(scores, SCORE_CLASSES), levels(weight, WEIGHT_CLASSES), strict=True)
        assert_classes(prior_of(agent), name, [a * WEIGHT_CLASSES + b for a, b in pairs])


@pytest.mark.filterwarnings("ignore:all frozen weights of 0.weight are zero")
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_weights_of_one_size_are_one_class(value: float) -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight.fill_(value)
    model = MaskedModel(net, retention=0.3, generator=torch_stream(0, "scores"))
    classes = shared_prior(model, seed=0, score_init="independent").classes("0.weight")
    assert classes is not None
    assert set(np.diff(classes.starts)) <= {0, 36}


def test_neither_training_nor_a_saved_state_changes_it() -> None:
    """A device builds its agent anew for every message and then restores it."""
    before = make_agent(0)
    digest = prior_of(before).digest
    before.train(round=1)
    state = before.state()
    module._cache.clear()
    later = make_agent(0)
    later.restore(state)
    assert prior_of(later).digest == digest


def test_models_and_seeds_are_told_apart_though_it_is_kept() -> None:
    found = [
        prior_of(make_agent(0, seed=seed, score_init=init))
        for seed in (1, 2)
        for init in ("shared", "independent")
    ]
    assert len({prior.digest for prior in found}) == 4
    for _ in range(2):
        again = [
            prior_of(make_agent(1, seed=seed, score_init=i))
            for seed in (1, 2)
            for i in ("shared", "independent")
        ]
        assert [prior.digest for prior in again] == [prior.digest for prior in found]
    assert len(module._cache) <= 4


def test_it_is_made_once_for_all_agents_of_a_process() -> None:
    assert prior_of(make_agent(0)) is prior_of(make_agent(1))


def test_it_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and global generators stand where they stood without it, so masks are the
    same bits.
    """
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    with_prior = masks_of_a_run()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    monkeypatch.setattr(
        "flower_mcepl.agents.parts.common_knowledge.shared_prior", lambda *_, **__: None
    )
    assert make_agent(0).prior is None
    without = masks_of_a_run()
    assert all(same_tensors(one, other) for one, other in zip(with_prior, without, strict=True))


def masks_of_a_run() -> list[dict[str, torch.Tensor]]:
    fleet = make_fleet(3)
    simulate(fleet, Topology.ring(3), num_rounds=3)
    return [agent.state().tensors for agent in fleet]


def first_frame(agent: MceplAgent) -> bytes:
    agent.train(round=1)
    return open_mail(agent, max_staleness=5).outbox.write(agent.outgoing(), round=1)[0].data


@pytest.mark.parametrize(
    "other",
    [{"seed": SEED + 1}, {"score_init": "independent"}],
    ids=["seed", "score-init"],
)
def test_agents_that_know_other_things_refuse_each_others_frames(other: dict[str, object]) -> None:
    one, two = make_agent(0), make_agent(1, **other)
    for sender, receiver in ((one, two), (two, one)):
        inbox = open_mail(receiver, max_staleness=5).inbox
        with pytest.raises(ForeignFrameError, match="ive both agents"):
            inbox.put(sender.index, [first_frame(sender)], latest_round=1)
        assert inbox.rounds() == {}


def test_agents_that_know_the_same_take_each_others_frames() -> None:
    inbox = open_mail(make_agent(1), max_staleness=5).inbox
    inbox.put(0, [first_frame(make_agent(0))], latest_round=1)
    assert inbox.rounds() == {0: 1}


def test_it_spares_bytes() -> None:
    """Where a network is large enough to have classes, its frames are smaller with it
    than without.
    """

    def wide_net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 3))

    agent = make_agent(0, model_fn=wide_net)
    agent.train(round=1)
    masks = agent.outgoing()
    sizes = [
        len(encode_frame(masks, sender=0, round=1, fingerprint=agent.fingerprint, prior=prior))
        for prior in (agent.prior, None)
    ]
    assert sizes[0] < sizes[1]
