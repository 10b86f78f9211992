"""Network, data, training and test, as in any Flower app."""

from functools import lru_cache

import torch
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small convolutional network for images [batch, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10]."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@lru_cache
def partitioner(num_partitions: int) -> DirichletPartitioner:
    """Divide scikit-learn's digits unevenly: each partition has its own classes."""
    digits = load_digits()
    parts = DirichletPartitioner(
        num_partitions, partition_by="label", alpha=0.3, min_partition_size=40, seed=1
    )
    parts.dataset = Dataset.from_dict(
        {"image": digits.images.reshape(-1, 64), "label": digits.target}
    )
    return parts


def load_data(
    partition_id: int, num_partitions: int, batch_size: int
) -> tuple[DataLoader, DataLoader]:
    """Return training (80 %) and test images of one partition."""
    part = partitioner(num_partitions).load_partition(partition_id)
    part = part.train_test_split(test_size=0.2, seed=42).with_format("torch")
    train, test = (
        TensorDataset(
            part[split]["image"][:].float().reshape(-1, 1, 8, 8) / 8 - 1, part[split]["label"][:]
        )
        for split in ("train", "test")
    )
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(
        test, batch_size=batch_size
    )


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train the network; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    for images, labels in loader:
        logits = net(images)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
