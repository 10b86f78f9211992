"""``local-epochs`` says how often a round shows each example to the model."""

from collections import Counter
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl.agents import ALGORITHMS
from tests.oracles.baselines import agent_of


class Seen(nn.Module):
    """Counts the examples that a training model gets, by the number in column 0."""

    counts: ClassVar[Counter[int]] = Counter()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.counts.update(inputs[:, 0].int().tolist())
        return inputs * 0.01


def counting_net() -> nn.Module:
    return nn.Sequential(Seen(), nn.Linear(4, 3))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_example_is_seen_exactly_local_epochs_times(algorithm: str) -> None:
    @settings(max_examples=10)
    @given(size=st.integers(1, 14), batch_size=st.integers(1, 6), epochs=st.integers(1, 3))
    def holds(size: int, batch_size: int, epochs: int) -> None:
        numbers = torch.arange(float(size))[:, None].expand(size, 4).contiguous()
        agent = agent_of(
            algorithm,
            model_fn=counting_net,
            split=lambda _: (numbers, torch.arange(size) % 3),
            batch_size=batch_size,
            local_epochs=epochs,
        )
        Seen.counts.clear()
        agent.train(round=1)
        assert Seen.counts == dict.fromkeys(range(size), epochs)

    holds()
