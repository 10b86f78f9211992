"""Running mean of the weights, at which those that train weights may be evaluated."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flower_mcepl import Agent, ConfigError
from flower_mcepl import shared_module as build
from flower_mcepl.agents import AgentState
from flower_mcepl.agents import make_agent as registered
from flower_mcepl.agents.fedavg import FedavgConfig
from flower_mcepl.agents.local import LocalConfig
from tests.fleet.agents import SEED, make_agent, noisy_net, same_tensors

DECAY = 0.8
GOSSIP = ("local", "dsgd", "dfedavgm", "dispfl", "choco")


def agent_of(algorithm: str, index: int = 0, **keys: Any) -> Any:
    run_config = {"batch-size": 8, "local-epochs": 0, "num-rounds": 6, **keys}
    data = make_agent(index).data
    return registered(algorithm, index, build(noisy_net, seed=SEED), data, run_config, seed=SEED)


def weights_of(agent: Any) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in agent.weights.items()}


def evaluated(agent: Any, weights: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of an agent with other weights, which it loses again."""
    own = weights_of(agent)
    put(agent, weights)
    metrics = agent.learner.evaluate(agent.model, agent.data)
    put(agent, own)
    return metrics


@torch.no_grad()
def put(agent: Any, weights: dict[str, Tensor]) -> None:
    for name, x in agent.weights.items():
        x.copy_(weights[name])


@pytest.mark.parametrize("algorithm", GOSSIP)
def test_evaluation_is_at_the_mean_of_the_weights_after_each_round(algorithm: str) -> None:
    agents = [agent_of(algorithm, i, **{"weight-averaging": DECAY}) for i in range(3)]
    seen: list[dict[str, Tensor]] = []
    for round in range(1, 5):
        payloads = {}
        for agent in agents:
            agent.train(round=round)
            payloads[agent.index] = agent.outgoing()
        for agent in agents:
            inbox = {j: p for j, p in payloads.items() if j != agent.index and p}
            agent.fuse(inbox, round=round)
        seen.append(weights_of(agents[0]))
        mean = seen[0]
        for weights in seen[1:]:
            mean = {name: DECAY * mean[name] + (1 - DECAY) * x for name, x in weights.items()}
        masks = getattr(agents[0], "masks", {})
        mean = {name: x * masks[name] if name in masks else x for name, x in mean.items()}
        metrics = agents[0].evaluate()
        assert metrics["loss"] == pytest.approx(evaluated(agents[0], mean)["loss"], rel=1e-5)
        assert same_tensors(weights_of(agents[0]), seen[-1]), "evaluation changes nothing"


@pytest.mark.parametrize("algorithm", [*GOSSIP, "fedavg", "fedspa", "ditto", "choco"])
def test_training_and_what_is_sent_do_without_it(algorithm: str) -> None:
    plain, averaged = (agent_of(algorithm, **keys) for keys in ({}, {"weight-averaging": DECAY}))
    for agent in (plain, averaged):
        for round in (1, 2, 3):
            agent.train(round=round)
            agent.fuse({}, round=round)
            agent.evaluate()
    assert same_tensors(weights_of(plain), weights_of(averaged))


def test_a_restored_agent_has_the_mean() -> None:
    def fleet() -> list[Agent]:
        return [agent_of("dsgd", i, **{"weight-averaging": DECAY}) for i in range(3)]

    whole, rest = fleet(), fleet()
    for round in range(1, 6):
        for agent in whole:
            agent.train(round=round)
            agent.fuse({}, round=round)
        if round == 3:
            for one, other in zip(whole, rest, strict=True):
                other.restore(one.state())
        if round > 3:
            for agent in rest:
                agent.train(round=round)
                agent.fuse({}, round=round)
    for one, other in zip(whole, rest, strict=True):
        assert one.evaluate() == other.evaluate()
        assert same_tensors(dict(one.state().tensors), dict(other.state().tensors))


@pytest.mark.parametrize("algorithm", [*GOSSIP, "fedavg", "fedspa", "ditto"])
def test_the_mean_of_an_agent_that_joins_late_begins_after_its_first_round(algorithm: str) -> None:
    keys = {"weight-averaging": DECAY}
    late, restored, early = (agent_of(algorithm, **keys) for _ in range(3))
    for agent, rounds in ((late, (3, 4, 5)), (restored, (3, 4, 5)), (early, (1, 2, 3))):
        means = []
        for round in rounds:
            agent.train(round=round)
            means.append(dict(agent.state().group("average")))
            agent.fuse({}, round=round)
            if agent is restored:
                agent.restore(AgentState.decode(agent.state().encode()))
        assert [bool(mean) for mean in means] == [False, True, True]
    assert late.evaluate() == restored.evaluate()


def test_ditto_averages_its_personal_model() -> None:
    agent, seen = agent_of("ditto", **{"weight-averaging": DECAY}), []
    for round in range(1, 4):
        agent.train(round=round)
        agent.fuse({}, round=round)
        seen.append({n: x.detach().clone() for n, x in agent.personal_weights.items()})
    mean = seen[0]
    for weights in seen[1:]:
        mean = {n: DECAY * mean[n] + (1 - DECAY) * x for n, x in weights.items()}
    averaged = agent.evaluate()["loss"]
    with torch.no_grad():
        for name, x in agent.personal_weights.items():
            x.copy_(mean[name])
    alone = agent.learner.evaluate(agent.personal, agent.data)["loss"]
    assert averaged == pytest.approx(alone, rel=1e-5)


def test_a_fine_tuned_model_is_handed_out_as_it_was_evaluated() -> None:
    agent = agent_of("fedavg", **{"finetune-steps": 2})
    agent.train(round=1)
    before = weights_of(agent)
    model = agent.personal_model()
    assert same_tensors(weights_of(agent), before), "it leaves no trace"
    alone = agent.learner.evaluate(model, agent.data)["loss"]
    assert alone == agent.evaluate()["loss"]
    assert alone != agent.learner.evaluate(agent.model, agent.data)["loss"]


def test_a_model_is_fine_tuned_or_averaged() -> None:
    with pytest.raises(ConfigError, match="weight-averaging must be 0 where finetune-steps"):
        FedavgConfig(finetune_steps=2, weight_averaging=DECAY)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_decay_is_below_one(value: float) -> None:
    with pytest.raises(ConfigError, match=r"weight-averaging must be in \[0, 1\)"):
        LocalConfig(weight_averaging=value)
