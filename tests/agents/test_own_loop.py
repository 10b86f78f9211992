"""Agents with a user's own loop: the same steps give the same agent, and what is
evaluated is the masked network.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import AgentData, ConfigError, MceplAgent, MceplConfig, shared_module
from flower_mcepl.agents import OwnLoopAgent
from flower_mcepl.agents.parts.own_metrics import _log_left_out
from tests.fleet.agents import SEED, make_agent, small_net, split

CONFIG = MceplConfig(batch_size=24, weight_decay=0.0, score_lr=1.0, finetune_lr=1.0)
INPUTS, LABELS = split(0)


def one_step(model: nn.Module, lr: float = 1.0) -> float:
    """A plain SGD step over the whole split, which clears no gradient."""
    loss = nn.functional.cross_entropy(model(INPUTS), LABELS)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=lr)
    return loss.item()


def own_loop(train_fn: Any = None, evaluate_fn: Any = None) -> OwnLoopAgent:
    return OwnLoopAgent(
        0,
        shared_module(small_net, seed=SEED),
        AgentData.of((INPUTS, LABELS), split(1000), agent=0),
        CONFIG,
        train_fn=train_fn or (lambda model, round: one_step(model)),
        evaluate_fn=evaluate_fn or (lambda model: {}),
        seed=SEED,
    )


def built_in() -> MceplAgent:
    data = AgentData.of((INPUTS, LABELS), split(1000), agent=0)
    return MceplAgent(0, shared_module(small_net, seed=SEED), data, CONFIG, seed=SEED)


def close(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], atol=1e-6) for name in left
    )


def test_the_same_steps_make_the_same_agent() -> None:
    """Also in later rounds, as a function that clears no gradient finds none of the
    round before.
    """
    own, expected = own_loop(), built_in()
    neighbor = make_agent(1)
    neighbor.train(round=1)
    for round in range(1, 4):
        losses = [agent.train(round=round)["train-loss"] for agent in (own, expected)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert own.gradient.keys() == expected.gradient.keys()
        assert any(bool(g.any()) for g in own.gradient.values())
        assert close(own.gradient, expected.gradient)
        for agent in (own, expected):
            agent.fuse({1: neighbor.outgoing()}, round=round)
        assert close(own.model.scores, expected.model.scores)


def test_the_gradient_of_the_fine_tuning_step_is_that_of_the_last_backward() -> None:
    gradients: list[dict[str, Tensor]] = []

    def two_steps(model: Any, round: int) -> float:
        one_step(model, lr=0.1)
        model.zero_grad()
        loss = one_step(model, lr=0.1)
        gradients.append({name: z.grad.clone() for name, z in model.scores.items()})
        return loss

    agent = own_loop(two_steps)
    agent.train(round=1)
    assert close(agent.gradient, gradients[0])
    assert all(z.grad is None for z in agent.model.scores.values())


def test_the_network_under_the_mask_is_what_is_evaluated() -> None:
    networks: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        networks.append(model)
        return {"accuracy": 0.5, "loss": 1.0, "num-examples": 24}

    agent = own_loop(evaluate_fn=evaluate)
    agent.train(round=1)
    metrics = agent.evaluate()
    weights = shared_module(small_net, seed=SEED).state_dict()
    masks = agent.outgoing()
    for name, weight in networks[0].state_dict().items():
        expected = weights[name] * masks[name] if name in masks else weights[name]
        assert torch.equal(weight, expected)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert 0 < kept < sum(mask.numel() for mask in masks.values())
    assert metrics["density"] == kept / sum(mask.numel() for mask in masks.values())


def test_an_accuracy_in_percent_is_refused() -> None:
    percent = {"accuracy": 33.3, "loss": 1.0, "num-examples": 3}
    with pytest.raises(ConfigError, match=r"agent 0: .* fraction in 0\.\.1; got 33\.3\. Divide"):
        own_loop(evaluate_fn=lambda model: percent).evaluate()
    for accuracy in (0, 1, 0.333):
        told = own_loop(evaluate_fn=lambda model, a=accuracy: {**percent, "accuracy": a}).evaluate()
        assert told["accuracy"] == accuracy


def test_the_record_says_which_parameters_have_no_effect() -> None:
    parameters = own_loop().parameters()
    assert parameters["without_effect"] == sorted(parameters["without_effect"])
    assert set(parameters["without_effect"]) < set(parameters)
    assert "finetune_lr" not in parameters["without_effect"]
    assert "without_effect" not in built_in().parameters()


def test_numbers_of_any_kind_are_kept_and_text_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _log_left_out.cache_clear()
    metrics = {
        "loss": torch.tensor(0.5),
        "accuracy": np.float32(0.25),
        "num-examples": np.int64(3),
        "f1": torch.tensor(0.75),
        "per-class": [0.1, 0.2],
        "one": np.array([0.5]),
        "note": "text",
        "seconds": 3.0,
        "sure": True,
        "spread": float("inf"),
    }
    agent = own_loop(evaluate_fn=lambda model: metrics)
    for _ in range(2):
        found = agent.evaluate()
        density = found.pop("density")
        assert 0 < density < 1
        assert found == {"loss": 0.5, "accuracy": 0.25, "num-examples": 3, "f1": 0.75}
        assert {type(value) for value in found.values()} == {float, int}
    (line,) = caplog.messages
    assert "evaluate function's per-class, one, note, seconds, sure, spread is left out" in line


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": "low", "num-examples": 3}, "loss is missing from loss, num-examples, or no"),
        ({"loss": 1.0, "num-examples": 3, "accuracy": "high"}, "fraction in 0..1.*'high'"),
        ({"loss": 1.0, "num-examples": 3, "accuracy": 87.5}, "fraction in 0..1.*87.5"),
        ({"loss": 1.0, "num-examples": np.nan}, "num-examples is missing from loss, num-exam"),
        ((0.5, 0.25), "must return a dict of metrics, .*tuple of 0.5, 0.25.*Return"),
        (None, "must return a dict of metrics, .*NoneType"),
    ],
)
def test_what_must_be_a_number_is_one(metrics: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        own_loop(evaluate_fn=lambda model: metrics).evaluate()


def test_an_accuracy_of_no_examples_is_none() -> None:
    metrics = {"loss": np.nan, "accuracy": np.float64(np.nan), "num-examples": 0}
    told = own_loop(evaluate_fn=lambda model: metrics).evaluate()
    assert told.keys() == {"loss", "num-examples", "density"}


@pytest.mark.parametrize(
    "given", [None, {"loss": 0.5}, (0.5, 0.9), [0.5], "0.5", torch.zeros(3), True]
)
def test_a_train_function_returns_its_loss(given: Any) -> None:
    def trained(model: nn.Module, round: int) -> Any:
        one_step(model)
        return given

    with pytest.raises(ConfigError, match=r"^agent 0: .* the mean loss, one number; got .*Let it"):
        own_loop(trained).train(round=1)


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), torch.tensor(0.5, requires_grad=True)])
def test_a_loss_is_a_number_of_any_kind(given: Any) -> None:
    for factor, metrics in [(1, {"train-loss": 0.5}), (np.nan, {}), (np.inf, {})]:

        def trained(model: nn.Module, round: int, factor: float = factor) -> Any:
            one_step(model)
            return given * factor

        assert own_loop(trained).train(round=1) == metrics


def without_freezing(model: nn.Module) -> None:
    model.requires_grad_(True)


def initialize(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.ones_(layer.bias)


def by_data(model: nn.Module) -> None:
    next(model.children()).get_parameter("0.weight").data.add_(1)


def other_layer(model: Any) -> None:
    model.module[-1] = nn.Linear(1, 1)


@pytest.mark.parametrize("change", [without_freezing, initialize, by_data, other_layer])
def test_weights_that_all_share_are_left_alone(change: Callable[[Any], None]) -> None:
    def trained(model: nn.Module, round: int) -> float:
        before = change is without_freezing
        if before:
            change(model)
        loss = one_step(model)
        if not before:
            change(model)
        return loss

    agent = own_loop(trained)
    with pytest.raises(ConfigError, match=r"^agent 0: .*leave the weights under.*changed \d\."):
        agent.train(round=1)


def test_the_best_scores_of_a_round_may_be_loaded() -> None:
    def trained(model: nn.Module, round: int) -> float:
        best = {name: value.clone() for name, value in model.state_dict().items()}
        loss = one_step(model)
        model.load_state_dict(best)
        return loss

    own_loop(trained).train(round=1)
