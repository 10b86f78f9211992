"""The task: a small network, and scikit-learn's digits divided so that each agent holds a few classes."""

from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from flwr_datasets.partitioner import PathologicalPartitioner
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and two linear layers for images [batch, 1, 8, 8].

    The weights stay random, so their scale matters more than usual: Kaiming initialisation, and a group norm
    without parameters, keep the signal alive where a mask leaves one weight in ten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.GroupNorm(8, 32, affine=False),
            nn.ELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.GroupNorm(8, 64, affine=False),
            nn.ELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 128),
            nn.ELU(),
            nn.Linear(128, 10),
        )
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, 10]."""
        return self.layers(images)


@lru_cache
def partitioner(num_agents: int, classes_per_agent: int, seed: int) -> PathologicalPartitioner:
    """Divide the digits: every agent gets images of `classes_per_agent` classes."""
    digits = load_digits()
    parts = PathologicalPartitioner(
        num_partitions=num_agents,
        partition_by="label",
        num_classes_per_partition=classes_per_agent,
        class_assignment_mode="deterministic",
        seed=seed,
    )
    parts.dataset = Dataset.from_dict({"image": digits.images.reshape(-1, 64), "label": digits.target})
    return parts


def load_data(
    agent: int, *, num_agents: int, classes_per_agent: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the agent's ``(images, labels)`` for training (80 %) and for testing (20 %), both of its own classes."""
    part = partitioner(num_agents, classes_per_agent, seed).load_partition(agent).with_format("numpy")
    order = np.random.default_rng([seed, agent]).permutation(len(part))
    images = torch.tensor(part["image"][order], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(part["label"][order], dtype=torch.long)
    cut = len(part) * 4 // 5
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
