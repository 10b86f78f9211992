"""The task: the network of the paper, and CIFAR-10 divided over the agents."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from flwr.app import Context
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from flower_mcepl.models import AlexNetCifar
from flower_mcepl.partition import Indices, Partition
from flower_mcepl.splits import DataSettings, own_splits, own_tests

Split = tuple[Tensor, Tensor]


def model_fn(context: Context) -> AlexNetCifar:
    """Return the network of the paper."""
    return AlexNetCifar(width=float(context.run_config["width"]))


def load_split(data: str, split: str) -> Dataset:
    """Return one split with the columns ``img`` and ``label``, from a folder of parquet files or the hub."""
    folder = Path(data)
    if not folder.is_absolute() and data.count("/") == 1 and not folder.exists():
        return load_dataset(data, split=split)
    files = sorted(map(str, folder.rglob(f"{split}*.parquet")))
    if not files:
        raise FileNotFoundError(
            f"data = {data!r}: no {split}*.parquet in that folder or below. Give the absolute path of a folder with "
            "CIFAR-10 as parquet, or a name on the Hugging Face hub: --run-config 'data=\"uoft-cs/cifar10\"'."
        )
    return load_dataset("parquet", data_files=files, split="train")


@lru_cache
def training_images(data: str) -> tuple[Dataset, np.ndarray]:
    """Return the training images, still encoded, and their labels."""
    images = load_split(data, "train")
    return images, np.asarray(images["label"])


@lru_cache
def test_images(data: str) -> TensorDataset:
    """Return all test images, decoded once for the agents of this process."""
    return TensorDataset(*decode(load_split(data, "test")))


@lru_cache
def parts(data: str, partition: str, num_agents: int, seed: int) -> tuple[Indices, ...]:
    """Return which training images each agent holds."""
    return Partition.parse(partition).divide(training_images(data)[1], num_agents=num_agents, seed=seed)


def load_data(
    agent: int, *, data: str, num_agents: int, settings: DataSettings, seed: int
) -> tuple[Split, Split | None, Subset]:
    """Return the agent's training, validation and test split.

    Training and validation, ``(images, labels)`` each, are of the training images that the agent holds; a run without
    a validation split has None. Testing: CIFAR-10's own test images, those of the agent's classes.
    """
    images, labels = training_images(data)
    mine = parts(data, settings.partition, num_agents, seed)[agent]
    places = own_splits(labels[mine], settings, seed=seed, agent=agent)
    train, validation = (
        decode(images.select(mine[np.sort(chosen)])) if len(chosen) else None
        for chosen in (places.train, places.validation)
    )
    test = test_images(data)
    own = own_tests(test.tensors[1], labels[mine], settings, seed=seed, agent=agent)
    return train, validation, Subset(test, own.tolist())


def decode(split: Dataset) -> tuple[Tensor, Tensor]:
    """Return images [n, 3, 32, 32] normalised to mean 0.5 and deviation 0.5, and labels [n]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["img"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    return images, torch.tensor(split["label"], dtype=torch.long)
