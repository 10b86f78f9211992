"""The network that an agent hands out is the one that it evaluates."""

import pytest
import torch
from torch import nn

from flower_mcepl import Agent, AgentData, ConfigError, shared_module
from flower_mcepl.agents import ALGORITHMS, make_agent
from tests.fleet.agents import SEED, noisy_net, split

RUN = {
    "batch-size": 8,
    "score-lr": 1.0,
    "lr": 0.05,
    "score-averaging": 0.5,
    "weight-averaging": 0.5,
    "num-rounds": 3,
}


def trained(algorithm: str) -> Agent:
    data = AgentData.of(split(2), split(1002), agent=2)
    module = shared_module(noisy_net, seed=SEED)
    agent = make_agent(algorithm, 2, module, data, RUN, seed=SEED)
    for round in (1, 2):
        agent.train(round=round)
        agent.fuse({}, round=round)
    return agent


@pytest.mark.parametrize("algorithm", [*ALGORITHMS])
def test_a_personal_model_evaluates_as_its_agent_does(algorithm: str) -> None:
    agent = trained(algorithm)
    state = agent.state()
    network = agent.personal_model().eval()
    inputs, labels = split(1002)
    with torch.no_grad():
        outputs = network(inputs)
    metrics = agent.evaluate()
    assert metrics["accuracy"] == pytest.approx((outputs.argmax(1) == labels).float().mean())
    loss = nn.functional.cross_entropy(outputs, labels)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    with torch.no_grad():  # it is a copy
        for parameter in network.parameters():
            parameter.zero_()
    assert agent.evaluate() == metrics
    assert all((agent.state().arrays[n] == x).all() for n, x in state.arrays.items())


def test_an_agent_without_a_network_says_so() -> None:
    agent = trained("local")
    with pytest.raises(ConfigError, match="agents of local tell of none"):
        Agent.personal_model(agent)
