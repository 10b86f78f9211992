"""The task: scikit-learn's digits as sequences of eight rows, divided over agents."""

from functools import lru_cache

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flower_mcepl.data import DataSettings, Indices, Partition, own_splits

Split = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A GRU over sequences [batch, 8, 8], and a linear layer over its last state.

    The weights stay random, so their scale matters more than usual: Kaiming's rule, and
    no biases.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, width, batch_first=True)
        self.classify = nn.Linear(width, 10)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return logits [batch, 10]."""
        states, _ = self.recurrent(sequences)
        return self.classify(states[:, -1])


def model_fn(context: Context) -> Net:
    """Return the network of the run."""
    return Net(width=int(context.run_config["width"]))


def data_fn(context: Context):
    """Return the training, validation and test split of the agent that this node is."""
    run = context.run_config
    return load_data(
        int(context.node_config["partition-id"]),
        num_agents=int(run["num-agents"]),
        settings=DataSettings.from_run_config(run),
        seed=int(run["seed"]),
    )


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all sequences [1797, 8, 8] with values from -1 to 1, and their labels."""
    data = load_digits()
    sequences = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    return sequences, torch.tensor(data.target, dtype=torch.long)


@lru_cache
def parts(partition: str, num_agents: int, seed: int) -> tuple[Indices, ...]:
    """Return which sequences each agent holds."""
    return Partition.parse(partition).divide(digits()[1], num_agents=num_agents, seed=seed)


def load_data(
    agent: int, *, num_agents: int, settings: DataSettings, seed: int
) -> tuple[Split, Split | None, Split]:
    """Training, validation and test split of the agent, all from its own sequences."""
    sequences, labels = digits()
    mine = parts(settings.partition, num_agents, seed)[agent]
    places = own_splits(labels[mine], settings, seed=seed, agent=agent)
    train, validation, test = (
        (sequences[mine[chosen]], labels[mine[chosen]]) if len(chosen) else None
        for chosen in (places.train, places.validation, places.test)
    )
    return train, validation, test
