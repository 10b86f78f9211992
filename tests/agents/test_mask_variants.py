"""The ablations of MCE-PL against their equations and against each other."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import ConfigError, MceplAgent, MceplConfig, StateError
from flower_mcepl.agents import Algorithm
from flower_mcepl.agents.registry import read_config
from flower_mcepl.runs.settings import RunSettings
from tests.fleet.agents import same_tensors
from tests.oracles import masks as oracles
from tests.oracles import weights as slow_weights
from tests.oracles.baselines import RING, agent_of, blobs, data_of, fleet_of, play


def test_no_fine_tuning_is_mcepl_with_a_step_of_zero() -> None:
    settings = {"score_lr": 1.0, "retention_linear": 0.5}
    preset = fleet_of("mcepl-no-finetuning", finetune_lr=3.0, **settings)
    by_hand = fleet_of("mcepl", finetune_lr=0.0, **settings)
    other = fleet_of("mcepl", finetune_lr=3.0, **settings)
    for agents in (preset, by_hand, other):
        play(agents, RING, 1, 2, 3)
    for mine, theirs, another in zip(preset, by_hand, other, strict=True):
        assert same_tensors(mine.state().tensors, theirs.state().tensors)
        assert not same_tensors(mine.state().tensors, another.state().tensors)
        assert mine.parameters() == theirs.parameters()


@pytest.mark.parametrize(
    "key", ["mcepl-no-finetuning.finetune-lr", "local-masks.fusion", "mask-averaging.fusion"]
)
def test_what_makes_an_ablation_cannot_be_set(key: str) -> None:
    name, _, own = key.partition(".")
    with pytest.raises(ConfigError, match=f"unknown run-config key '{key}'"):
        RunSettings.from_run_config({"algorithm": name, key: 2.0})
    plain = read_config(name, {own: "nonsense", "score-lr": 3.0}, agent=0)  # a key of others
    assert plain == read_config(name, {"score-lr": 3.0}, agent=0)


def test_a_fixed_parameter_is_one_of_the_config() -> None:
    with pytest.raises(
        ConfigError, match=r"fixed parameters must be fields of MceplConfig; got 'lr, pull'"
    ):
        Algorithm(MceplAgent, MceplConfig, fixed={"pull": 1.0, "lr": 1.0, "finetune_lr": 0.0})


@pytest.mark.parametrize("name", ["mcepl-no-finetuning", "local-masks", "mask-averaging"])
def test_an_ablation_bears_its_name_in_handshake_and_state(name: str) -> None:
    agent, plain = agent_of(name), agent_of("mcepl")
    assert type(agent) is type(plain)
    assert agent.describe()["algorithm"] == agent.state().facts["algorithm"] == name
    assert plain.describe()["algorithm"] == MceplAgent.algorithm == "mcepl"
    with pytest.raises(StateError, match=f"of algorithm 'mcepl', but agent 0 has '{name}'"):
        agent.restore(plain.state())


def test_local_masks_are_mcepl_without_neighbors() -> None:
    settings = {"score_lr": 1.0, "retention_linear": 0.5}
    agent, alone = agent_of("local-masks", **settings), agent_of("mcepl", **settings)
    alone.fuse({}, round=0)  # from the start: the common first mask is a neighbor's, too
    for round in (1, 2):
        for each in (agent, alone):
            each.train(round=round)
        agent.fuse({1: alone.outgoing()}, round=round)
        alone.fuse({}, round=round)
    assert same_tensors(agent.state().tensors, alone.state().tensors)
    assert agent.evaluate() == alone.evaluate()


def mean_masks(agent: Any, z: dict[str, Any], inbox: list[dict[str, Tensor]]) -> dict[str, Any]:
    own = {name: oracles.topk_mask(value, agent.model.retention[name]) for name, value in z.items()}
    return {
        name: oracles.neighbor_mean([own[name], *(masks[name].numpy() for masks in inbox)])
        for name in own
    }


def test_mask_averaging_by_the_equations() -> None:
    agents = fleet_of(
        "mask-averaging", score_lr=0.6, finetune_lr=0.3, weight_decay=0.01, retention_linear=0.5
    )
    agent, (data, *_) = agents[0], data_of(agents)
    first = agent.first_payload()
    w = {name: agent.model.module.get_parameter(name).numpy() for name in first}
    biases = {"b1": agent.model.module[0].bias.numpy(), "b2": agent.model.module[2].bias.numpy()}
    z = {name: value.detach().double().numpy() for name, value in agent.model.scores.items()}
    inbox = [first]
    for round in (1, 2):
        averaged = mean_masks(agent, z, inbox)
        network = {
            short: w[name] * averaged[name]
            for short, name in (("w1", "0.weight"), ("w2", "2.weight"))
        }
        slow = slow_weights.gradient({**network, **biases}, data)
        g = {
            name: slow[short] * w[name] * np.sign(z[name])
            for short, name in (("w1", "0.weight"), ("w2", "2.weight"))
        }
        z = {name: z[name] - 0.6 * (g[name] + 0.01 * z[name]) for name in z}
        for each in agents:
            each.train(round=round)
        sent = [each.outgoing() for each in agents]
        for name, mask in sent[0].items():  # its own mask, whatever the neighbors hold
            assert np.array_equal(
                mask.numpy(), oracles.topk_mask(z[name], agent.model.retention[name])
            )
        inbox = [sent[1], sent[2], sent[3]]
        for each in agents:
            each.fuse({j: sent[j] for j in range(4) if j != each.index}, round=round)
        n = {name: oracles.neighbor_mean([masks[name].numpy() for masks in inbox]) for name in z}
        z = {name: oracles.neighbor_step(z[name], g[name], n[name], 0.3) for name in z}
        for name, scores in agent.model.scores.items():
            np.testing.assert_allclose(scores.detach().numpy(), z[name], rtol=1e-4, atol=1e-6)
    averaged = mean_masks(agent, z, inbox)
    inputs, labels = blobs(1000)
    hidden = np.tanh(inputs.numpy() @ (w["0.weight"] * averaged["0.weight"]).T + biases["b1"])
    logits = torch.from_numpy(hidden @ (w["2.weight"] * averaged["2.weight"]).T + biases["b2"])
    metrics = agent.evaluate()
    assert metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    assert metrics["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert metrics["density"] == sum((m > 0).sum() for m in averaged.values()) / (24 + 18)


def test_mask_averaging_without_neighbors_is_local_masks() -> None:
    averaging, alone = (
        agent_of(name, score_lr=1.0, retention_linear=0.4)
        for name in ("mask-averaging", "local-masks")
    )
    averaging.fuse({}, round=0)
    for agent in (averaging, alone):
        agent.train(round=1)
        agent.fuse({}, round=1)
    assert averaging.evaluate() == alone.evaluate()
    assert same_tensors(averaging.state().tensors, alone.state().tensors)
