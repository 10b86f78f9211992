"""The task: scikit-learn's diabetes data, divided over agents by body mass index."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from flower_mcepl.data import DataSettings, own_splits

BODY_MASS_INDEX = 2  # column of the table
Split = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Three linear layers for rows [batch, 10]; the weights stay random: Kaiming's."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width),
            nn.ELU(),
            nn.Linear(width, width),
            nn.ELU(),
            nn.Linear(width, 1),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Return predictions [batch, 1]."""
        return self.layers(rows)


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
def table() -> tuple[Tensor, Tensor]:
    """Return all rows [442, 10] and targets [442], both with mean 0 and variance 1."""
    data = load_diabetes()
    targets = (data.target - data.target.mean()) / data.target.std()
    rows = data.data / data.data.std(axis=0)
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)


def load_data(
    agent: int, *, num_agents: int, settings: DataSettings, seed: int
) -> tuple[Split, Split | None, Split]:
    """Training, validation and test split of the agent, all from its own patients.

    Agent 0 has those of the lowest body mass index, the last one those of the highest.
    """
    rows, targets = table()
    order = np.argsort(rows[:, BODY_MASS_INDEX].numpy(), kind="stable")
    mine = torch.as_tensor(np.array_split(order, num_agents)[agent])
    places = own_splits(np.zeros(len(mine), dtype=int), settings, seed=seed, agent=agent)
    train, validation, test = (
        (rows[mine[chosen]], targets[mine[chosen]]) if len(chosen) else None
        for chosen in (places.train, places.validation, places.test)
    )
    return train, validation, test
