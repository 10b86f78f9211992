"""Which round an agent is in when it trains and fuses: what a cosine schedule makes of
each.
"""

import copy
import math

import pytest
import torch

from flower_mcepl import Topology, simulate
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import open_mail, play_round
from flower_mcepl.masks import formulas as maths
from tests.fleet.agents import make_agent, make_fleet, same_tensors

ROUNDS = 4
COSINE = {"lr_schedule": "cosine", "lr_rounds": ROUNDS, "local_steps": 2}


def factor(round: int) -> float:
    """What the step sizes of a round are multiplied by: 1 in the first one, falling to
    0.
    """
    return 0.5 * (1 + math.cos(math.pi * (round - 1) / ROUNDS))


def test_a_cosine_plays_through_the_rounds_as_by_hand() -> None:
    """In round t an agent trains with the factor of t; what it sent then is fused with
    the factor of t, too.
    """
    fleet, by_hand = make_fleet(3, **COSINE), make_fleet(3, **COSINE)
    simulate(fleet, Topology.ring(3), num_rounds=ROUNDS)
    for round in range(1, ROUNDS + 1):
        for agent in by_hand:
            agent.train(round=round)
        masks = {agent.index: agent.outgoing() for agent in by_hand}
        for agent in by_hand:
            others = {j: mask for j, mask in masks.items() if j != agent.index}
            agent.fuse(others, round=round)
    for agent, expected in zip(fleet, by_hand, strict=True):
        assert same_tensors(agent.state().tensors, expected.state().tensors)


@pytest.mark.parametrize("round", range(1, ROUNDS + 1))
def test_the_fine_tuning_step_has_the_size_of_the_round_that_is_fused(round: int) -> None:
    agent, neighbor = make_agent(0, **COSINE), make_agent(1, **COSINE)
    agent.train(round=round)
    neighbor.train(round=round)
    before = {name: z.detach().clone() for name, z in agent.model.scores.items()}
    gradient = copy.deepcopy(agent.gradient)
    mask = neighbor.outgoing()
    agent.fuse({1: mask}, round=round)
    step = agent.config.finetune_lr * factor(round)
    for name, z in agent.model.scores.items():
        n = mask[name].float()
        expected = maths.neighbor_step(before[name], gradient[name], n, finetune_lr=step)
        assert torch.equal(z, expected)


def test_a_parcel_of_a_round_fuses_the_round_before() -> None:
    rounds: list[tuple[str, int]] = []
    agent = make_agent(0)
    mail = open_mail(agent, max_staleness=5)
    fuse, train = agent.fuse, agent.train

    def noted_fuse(inbox: object, *, round: int) -> None:
        rounds.append(("fuse", round))
        fuse(inbox, round=round)  # type: ignore[arg-type]

    def noted_train(*, round: int) -> dict[str, float]:
        rounds.append(("train", round))
        return train(round=round)

    agent.fuse, agent.train = noted_fuse, noted_train  # type: ignore[method-assign]
    play_round(agent, mail, Parcel(1, None))
    play_round(agent, mail, Parcel(2, (1,)))
    play_round(agent, mail, Parcel(3, (1,), train=False))
    assert rounds == [("train", 1), ("fuse", 1), ("train", 2), ("fuse", 2)]
