"""The task: a small network, and scikit-learn's digits divided over the agents."""

from functools import lru_cache

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flower_mcepl.data import DataSettings, Indices, Partition, own_splits

GROUPS = 8  # of channels, for the group norm
Split = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Two convolutions and two linear layers for images [batch, 1, 8, 8].

    The weights stay random, so their scale matters more than usual: Kaiming
    initialisation, and a group norm without parameters, keep the signal alive where a
    mask leaves one weight in ten. `width` is a factor on channels and hidden units,
    rounded to whole groups of the norm.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = (
            GROUPS * max(1, round(width * size / GROUPS)) for size in (32, 64, 128)
        )
        self.layers = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, first, affine=False),
            nn.ELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, second, affine=False),
            nn.ELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * second, hidden),
            nn.ELU(),
            nn.Linear(hidden, 10),
        )
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, 10]."""
        return self.layers(images)


def model_fn(context: Context) -> nn.Module:
    """Return the network of the run."""
    name, width = str(context.run_config["network"]), float(context.run_config["width"])
    if name == "net":
        return Net(width=width)
    from mcepl_quickstart.networks import make_network  # needs torchvision

    return make_network(name, width)


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
    """Return all images [1797, 1, 8, 8] with values from -1 to 1, and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.long)


@lru_cache
def parts(partition: str, num_agents: int, seed: int) -> tuple[Indices, ...]:
    """Return which images each agent holds."""
    return Partition.parse(partition).divide(digits()[1], num_agents=num_agents, seed=seed)


def load_data(
    agent: int, *, num_agents: int, settings: DataSettings, seed: int
) -> tuple[Split, Split | None, Split]:
    """Training, validation and test split of the agent, all from its own images.

    A run without a validation split has None.
    """
    images, labels = digits()
    mine = parts(settings.partition, num_agents, seed)[agent]
    places = own_splits(labels[mine], settings, seed=seed, agent=agent)
    train, validation, test = (
        (images[mine[chosen]], labels[mine[chosen]]) if len(chosen) else None
        for chosen in (places.train, places.validation, places.test)
    )
    return train, validation, test
