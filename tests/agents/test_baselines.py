"""What every algorithm must do, MCE-PL and the baselines beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import ConfigError, DivergedError, StateError, UnsupportedLayerError
from flower_mcepl.agents import ALGORITHMS, AgentState, find_algorithm, load_state, save_state
from flower_mcepl.agents.parts.averaging import DEGREE
from flower_mcepl.agents.parts.dense import DenseAgent
from tests.fleet.agents import noisy_net, same_tensors, split
from tests.oracles.baselines import PAW, RING, SEED, agent_of, fleet_of, play, two_layers

EVERY = sorted(name for name, entry in ALGORITHMS.items() if entry.server is None)
DENSE = ["local", "dsgd", "dfedavgm", "choco"]
WEIGHTS = [*DENSE, "dispfl"]

SOURCE = {
    "model_fn": noisy_net,
    "split": split,
    "local_epochs": 0,
    "local_steps": 2,
    "batch_size": 8,
}
FULL: dict[str, dict[str, Any]] = {
    name: {
        **SOURCE,
        "momentum": 0.6,
        "lr_schedule": "cosine",
        "lr_rounds": 9,
        "score_lr": 1.0,
        "finetune_lr": 1.0,
        "lr": 0.05,
    }
    for name in EVERY
}


def in_memory(state: AgentState, tmp_path: Path) -> AgentState:
    return state


def through_a_file(state: AgentState, tmp_path: Path) -> AgentState:
    save_state(state, tmp_path / "agent.safetensors")
    return load_state(tmp_path / "agent.safetensors")


@pytest.mark.parametrize(
    ("trained", "way"),
    [(False, in_memory), (True, through_a_file)],
    ids=["between rounds", "before the exchange"],
)
@pytest.mark.parametrize("algorithm", EVERY)
def test_a_restored_fleet_continues_bit_for_bit(
    algorithm: str, trained: bool, way: Callable[[AgentState, Path], AgentState], tmp_path: Path
) -> None:
    agents, later = (fleet_of(algorithm, **FULL[algorithm]) for _ in range(2))
    play(agents, PAW, 1, 2)
    play(later, RING, 5)  # whatever they did before is overwritten
    if trained:
        for agent in agents:
            agent.train(round=3)
    for agent, copy in zip(agents, later, strict=True):
        state = agent.state()
        copy.restore(way(state, tmp_path))
        assert copy.state().facts == state.facts
        assert same_tensors(copy.state().tensors, state.tensors)
    for fleet in (agents, later):
        sent = [agent.outgoing() for agent in fleet]
        for agent in fleet:
            agent.fuse({j: sent[j] for j in PAW[agent.index] if sent[j]}, round=3)
    assert play(agents, PAW, 4, 5) == play(later, PAW, 4, 5)
    for agent, copy in zip(agents, later, strict=True):
        assert agent.evaluate() == copy.evaluate()
        assert same_tensors(agent.state().tensors, copy.state().tensors)


@pytest.mark.parametrize("algorithm", EVERY)
def test_the_global_generators_do_not_matter(algorithm: str) -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        agents = fleet_of(algorithm, 2, **FULL[algorithm])
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        metrics = play(agents, ((1,), (0,)), 1, 2)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((metrics, agents[0].evaluate(), agents[0].state().tensors))
    assert results[0][:2] == results[1][:2]
    assert same_tensors(results[0][2], results[1][2])


@pytest.mark.parametrize("algorithm", EVERY)
def test_learning_beats_chance(algorithm: str) -> None:
    settings = {
        "score_lr": 5.0,
        "finetune_lr": 5.0,
        "retention_linear": 0.6,
        "lr": 0.3,
        "density": 0.6,
    }
    agents = fleet_of(
        algorithm, model_fn=wide_net, num_rounds=20, weight_decay=0.0, local_epochs=1, **settings
    )
    play(agents, RING, *range(1, 21))
    assert np.mean([agent.evaluate()["accuracy"] for agent in agents]) > 0.7  # chance is 1/3


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))


@pytest.mark.parametrize("algorithm", EVERY)
def test_an_evaluation_changes_nothing(algorithm: str) -> None:
    agents = fleet_of(algorithm, 2, **FULL[algorithm])
    play(agents, ((1,), (0,)), 1)
    before = agents[0].state().tensors
    metrics = agents[0].evaluate()
    assert metrics == agents[0].evaluate()
    assert metrics.keys() == {"accuracy", "loss", "num-examples", "density"}
    assert metrics["num-examples"] == 24
    assert same_tensors(before, agents[0].state().tensors)


@pytest.mark.parametrize("algorithm", EVERY)
def test_payloads_have_the_shapes_that_were_said(algorithm: str) -> None:
    agent = agent_of(algorithm, **FULL[algorithm])
    agent.train(round=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in agent.outgoing().items()}
    assert shapes == agent.layers
    first = agent.first_payload()
    assert (
        first is None
        or {name: tuple(tensor.shape) for name, tensor in first.items()} == agent.layers
    )
    agent.train(round=2)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in agent.outgoing().items()}


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_running_statistics_stay_at_home(algorithm: str) -> None:
    agents = fleet_of(algorithm, 2, **FULL[algorithm])
    play(agents, ((1,), (0,)), 1)
    means = [dict(agent.model.named_buffers())["1.running_mean"] for agent in agents]
    assert not torch.equal(*means)
    assert not [
        name
        for agent in agents
        for name in agent.outgoing()
        if "running" in name or "tracked" in name
    ]


@pytest.mark.parametrize("algorithm", DENSE)
def test_the_handshake_of_dense_agents(algorithm: str) -> None:
    agent = agent_of(algorithm, 3)
    counts = " ".join(f"{name}:{(agent.data.train.labels == name).sum()}" for name in range(3))
    assert agent.describe() == {
        "agent": 3,
        "algorithm": algorithm,
        "fingerprint": agent_of("mcepl").fingerprint,
        "task": "classification",
        "main-metric": "accuracy",
        "higher-is-better": True,
        "metric-unit": "fraction",
        "seed": SEED,
        "num-weights": 51,
        "kept-weights": 51,
        "num-examples": 18,
        "num-test-examples": 18,
        "classes": "0 1 2",
        "train-counts": counts,
        "test-counts": " ".join(
            f"{name}:{(agent.data.test.labels == name).sum()}" for name in range(3)
        ),
    }
    assert agent.evaluate()["density"] == 1.0


@pytest.mark.parametrize("algorithm", EVERY)
def test_the_parameters_are_those_of_the_configuration(algorithm: str) -> None:
    agent = agent_of(algorithm)
    assert agent.parameters()["batch_size"] == 24
    assert find_algorithm(algorithm).config(**agent.parameters()) == agent.config


def frozen_half() -> nn.Module:
    model = two_layers_with_norm()
    model[0].requires_grad_(False)
    return model


def two_layers_with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_frozen_weights_neither_train_nor_travel(algorithm: str) -> None:
    agents = fleet_of(algorithm, 2, model_fn=frozen_half)
    before = agents[0].model[0].weight.clone()
    play(agents, ((1,), (0,)), 1, 2)
    assert torch.equal(agents[0].model[0].weight, before)
    trained = {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(agents[0].weights) == trained
    assert set(agents[0].outgoing()) - {DEGREE} == (set() if algorithm == "local" else trained)


def test_a_network_without_anything_to_train_is_refused() -> None:
    def frozen() -> nn.Module:
        return two_layers_with_norm().requires_grad_(False)

    with pytest.raises(
        UnsupportedLayerError, match="Sequential has no weight to train: requires_grad is False"
    ):
        agent_of("local", model_fn=frozen)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_wide_weights_that_would_travel_are_refused_before_round_1(algorithm: str) -> None:
    def wide() -> nn.Module:
        return two_layers().double()

    agent = agent_of(algorithm, model_fn=wide)
    if not isinstance(agent, DenseAgent) or algorithm == "local":
        agent.check()
        return
    with pytest.raises(UnsupportedLayerError, match=r"float64 are 0.weight, .* Call .float"):
        agent.check()


def test_the_module_that_was_passed_in_stays_as_it_is() -> None:
    agent = agent_of("dsgd")
    first = {name: tensor.clone() for name, tensor in agent.first_payload().items()}
    play([agent], ((),), 1, 2)
    assert same_tensors(first, agent.first_payload())


# --- what can go wrong ---

BAD = [
    ("local", {"lr": 0.0}, r"lr must be > 0; got 0\.0"),
    ("local", {"lr": float("nan")}, r"lr must be a finite number >= 0; got nan"),
    ("local", {"lr": -1.0}, r"lr must be a finite number >= 0; got -1\.0"),
    ("local", {"lr_decay": 0.0}, r"lr-decay must be in \(0, 1\]; got 0\.0"),
    ("local", {"lr_decay": 1.5}, r"lr-decay must be in \(0, 1\]; got 1\.5"),
    ("local", {"clip_norm": -2.0}, r"clip-norm must be a finite number >= 0; got -2\.0"),
    ("dsgd", {"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1\.0"),
    ("dsgd", {"weight_decay": -0.1}, r"weight-decay must be a finite number >= 0; got -0\.1"),
    ("dsgd", {"batch_size": 0}, r"batch-size must be >= 1; got 0"),
    ("dsgd", {"local_epochs": -1}, r"local-epochs must be >= 0; got -1"),
    (
        "dsgd",
        {"lr_schedule": "linear"},
        r"lr-schedule must be one of constant, cosine; got 'linear'",
    ),
    (
        "dsgd",
        {"lr_schedule": "cosine", "num_rounds": 0},
        r"lr-schedule cosine needs lr-rounds >= 1",
    ),
    ("dfedavgm", {"precision": "int4"}, r"precision must be one of .*int8.*; got 'int4'"),
    ("dfedavgm", {"local_steps": 0}, r"local-steps must be >= 1; got 0"),
    ("dfedavgm", {"lr": "fast"}, r"run-config key lr must be float; got 'fast'"),
    ("mask-averaging", {"score_lr": 0.0}, r"score-lr must be > 0; got 0\.0"),
    (
        "local-masks",
        {"retention_conv": 0.0},
        r"retention ratio of key retention-conv .* must be in \(0, 1\]",
    ),
]


@pytest.mark.parametrize(("algorithm", "settings", "message"), BAD)
def test_a_bad_parameter_is_refused_by_its_key(
    algorithm: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        agent_of(algorithm, **settings)


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown algorithm 'dispfi'; known: mcepl, .*fedpm\. Did you mean 'dispfl'",
    ):
        agent_of("dispfi")
    with pytest.raises(ConfigError, match=r"unknown algorithm 7; known: mcepl, .*fedpm\.$"):
        find_algorithm(7)  # type: ignore[arg-type]


def test_the_algorithms_are_these() -> None:
    assert list(ALGORITHMS) == [
        "mcepl",
        "mcepl-no-finetuning",
        "local-masks",
        "mask-averaging",
        "local",
        "dsgd",
        "dfedavgm",
        "choco",
        "dispfl",
        "fedavg",
        "ditto",
        "fedspa",
        "fedpm",
    ]
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.fixed or algorithm.agent.algorithm == name
        assert algorithm.server is None or algorithm.server.algorithm == name
        assert algorithm.agent.server_based == (algorithm.server is not None)
        algorithm.config()  # every parameter has a default


@pytest.mark.parametrize("precision", ["int8", "int8-differences"])
def test_8_bits_are_said_and_left_to_the_wire(precision: str) -> None:
    agent = agent_of("dfedavgm", precision=precision)
    assert (agent.precision, agent_of("dfedavgm").precision, agent_of("dsgd").precision) == (
        (precision,) + 2 * ("float32",)
    )
    assert agent.outgoing()["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_a_loss_that_is_not_finite_names_the_agent(algorithm: str) -> None:
    agent = agent_of(algorithm, 2)
    agent.data.train.inputs[0] = float("nan")  # before, the split would be refused
    with pytest.raises(
        DivergedError, match=r"agent 2: the training loss of round 4 is nan\. Lower lr \(now 0\."
    ):
        agent.train(round=4)


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_weights_that_leave_the_numbers_are_not_sent(algorithm: str) -> None:
    settings = {"lr": 3e38, "weight_decay": 1e3, "local_steps": 1, "local_epochs": 0}
    with pytest.raises(
        DivergedError,
        match=r"agent 2: round 1 left weights that are not finite in 0\.weight.* Lower lr \(now 3e",
    ):
        agent_of(algorithm, 2, **settings).train(round=1)


class RootOfSquares(nn.Module):
    """Its output is finite where a sum of squares is zero, and its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x) * (x[:, :1] > 0)
        return self.head(hidden) + hidden.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("algorithm", EVERY)
def test_what_one_bad_gradient_leaves_is_no_state(algorithm: str) -> None:
    agent = agent_of(algorithm, 2, model_fn=RootOfSquares, momentum=0.5, first_mask="scores")
    with pytest.raises(DivergedError, match=r"agent 2: (the training loss|round 1 left)"):
        agent.train(round=1)


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_the_state_of_another_algorithm_or_agent_is_refused(algorithm: str) -> None:
    agent = agent_of(algorithm)
    with pytest.raises(StateError, match="of algorithm 'mcepl', but agent 0 has"):
        agent.restore(agent_of("mcepl").state())
    with pytest.raises(StateError, match="of agent 1, but agent 0 has 0"):
        agent.restore(agent_of(algorithm, 1).state())


GROUPS = {
    "local": ["weights", "velocity", "buffer"],
    "dsgd": ["weights", "velocity", "buffer", "mixing", "start"],
    "dfedavgm": ["weights", "buffer", "mixing"],
    "dispfl": ["weights", "buffer", "mask", "held"],
}


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
@pytest.mark.parametrize(
    ("algorithm", "group"), [(name, group) for name in GROUPS for group in GROUPS[name]]
)
def test_an_incomplete_state_is_refused_and_changes_nothing(
    algorithm: str, group: str, damage: str
) -> None:
    agent, fresh = (agent_of(algorithm, **FULL[algorithm]) for _ in range(2))
    agent.train(round=1)
    state, before = agent.state(), fresh.state().tensors
    assert {name.partition("/")[0] for name in state.tensors} == set(GROUPS[algorithm])
    victim = next(name for name in state.tensors if name.startswith(f"{group}/"))
    if damage == "missing":
        del state.arrays[victim]
    else:
        state.arrays[victim] = np.zeros((7, 7), np.float32)
    with pytest.raises(StateError, match=rf"agent 0 is incomplete: its {group} must hold"):
        fresh.restore(state)
    assert same_tensors(before, fresh.state().tensors)
