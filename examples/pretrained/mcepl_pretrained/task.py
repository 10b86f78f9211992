"""The task: a network with a body and a head, and the digits 5 to 9 over the agents."""

from functools import lru_cache

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from flower_mcepl.data import DataSettings, Indices, Partition, own_splits

WIDTH = 64  # of the transformer
FIRST_NEW = 5  # digits below it were for pretraining
Split = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A small vision transformer and a head, for images [batch, 1, 8, 8].

    Positions are drawn at the size of the patches they mark: over random weights, where
    they never learn, torchvision's are too small to be seen.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = VisionTransformer(
            image_size=8,
            patch_size=2,
            num_layers=2,
            num_heads=2,
            hidden_dim=WIDTH,
            mlp_dim=2 * WIDTH,
        )
        self.body.conv_proj = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.body.heads = nn.Identity()
        nn.init.normal_(self.body.encoder.pos_embedding, std=0.5)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, num_classes]."""
        return self.head(self.body(images))


def model_fn(context: Context) -> Net:
    """Return the network with a head for all digits, for `weights` to fill its body."""
    return Net(num_classes=10)


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
def digits(*, new: bool) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] with values from -1 to 1, and labels: 5 to 9, or 0 to 4."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.long)
    chosen = (labels >= FIRST_NEW) == new
    return images[chosen], labels[chosen]


@lru_cache
def parts(partition: str, num_agents: int, seed: int) -> tuple[Indices, ...]:
    """Return which of the new images each agent holds."""
    labels = digits(new=True)[1] - FIRST_NEW
    return Partition.parse(partition).divide(labels, num_agents=num_agents, seed=seed)


def load_data(
    agent: int, *, num_agents: int, settings: DataSettings, seed: int
) -> tuple[Split, Split | None, Split]:
    """Training, validation and test split of the agent, all from its own images."""
    images, labels = digits(new=True)
    mine = parts(settings.partition, num_agents, seed)[agent]
    places = own_splits(labels[mine], settings, seed=seed, agent=agent)
    train, validation, test = (
        (images[mine[chosen]], labels[mine[chosen]]) if len(chosen) else None
        for chosen in (places.train, places.validation, places.test)
    )
    return train, validation, test
