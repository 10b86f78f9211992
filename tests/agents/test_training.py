"""The local steps that all algorithms share: their mean loss, and the random streams
that are each agent's own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flower_mcepl import ConfigError
from flower_mcepl.agents import ALGORITHMS
from flower_mcepl.agents.parts.training import TrainingConfig, train_locally
from flower_mcepl.data.batches import TensorBatches

SPLIT = TensorBatches(torch.arange(12.0).view(12, 1), torch.arange(12) % 3)


def drawn(agent: int, round: int, seed: int = 1) -> tuple[list[float], list[list[float]]]:
    """What dropout would draw in each step, and the inputs of its batch."""
    draws, batches = [], []

    def step(inputs: Tensor, labels: Tensor) -> float:
        draws.append(float(torch.rand(())))
        batches.append(inputs.flatten().tolist())
        return 0.0

    config = TrainingConfig(batch_size=4, local_steps=2)
    train_locally(step, SPLIT, config, seed=seed, agent=agent, round=round, device="cpu")
    return draws, batches


def test_the_loss_is_the_mean_of_the_steps() -> None:
    losses = iter([1.0, 2.0, 6.0])
    config = TrainingConfig(batch_size=4, local_steps=3)
    metrics = train_locally(
        lambda *_: next(losses), SPLIT, config, seed=1, agent=0, round=1, device="cpu"
    )
    assert metrics == {"train-loss": 3.0}


@pytest.mark.parametrize("part", [0, 1], ids=["draws of the model", "batches"])
def test_every_agent_and_round_has_a_stream_of_its_own(part: int) -> None:
    places = [(agent, round, seed) for agent in (0, 1, 2) for round in (1, 2) for seed in (1, 2)]
    results = [drawn(*place)[part] for place in places]
    assert [drawn(*place)[part] for place in places] == results
    assert all(one != other for i, one in enumerate(results) for other in results[:i])


def test_what_a_split_draws_by_itself_comes_from_the_agents_stream() -> None:
    class Noisy:
        num_examples = 4

        def training_batches(self, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield torch.rand(4), torch.zeros(4, dtype=torch.long)

    def seen(agent: int) -> list[float]:
        batches: list[list[float]] = []

        def step(inputs: Tensor, labels: Tensor) -> float:
            batches.append(inputs.tolist())
            return 0.0

        noisy: Any = Noisy()
        train_locally(step, noisy, TrainingConfig(), seed=1, agent=agent, round=1, device="cpu")
        return batches[0]

    assert seen(0) == seen(0) != seen(1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_checks_the_shared_parameters(algorithm: str) -> None:
    config = ALGORITHMS[algorithm].config
    for wrong, rule in (({"batch_size": 0}, "batch-size"), ({"momentum": 1.0}, "momentum")):
        with pytest.raises(ConfigError, match=rule):
            config(**wrong)
