"""The task: the network, and CIFAR-10 divided over the agents."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from flwr.app import Context
from torch import Tensor, nn
from torchvision.transforms import v2

from flower_mcepl.data import (
    DataSettings,
    Indices,
    Partition,
    cached_tensors,
    own_splits,
    own_tests,
)
from mcepl_cifar10.networks import make_network

Split = tuple[Tensor, Tensor]


def model_fn(context: Context) -> nn.Module:
    """Return the network of the run: that of the paper, or one of `NETWORKS`."""
    run = context.run_config
    return make_network(str(run["network"]), float(run["width"]))


def data_fn(context: Context):
    """Return the training, validation and test split of the agent that this node is."""
    run = context.run_config
    train, validation, test = load_data(
        int(context.node_config["partition-id"]),
        data=str(run["data"]),
        num_agents=int(run["num-agents"]),
        settings=DataSettings.from_run_config(run),
        seed=int(run["seed"]),
        cache=str(run["cache"]),
    )
    return Augmented(*train) if run["augment"] else train, validation, test


def load_split(data: str, split: str) -> Dataset:
    """One split with columns ``img`` and ``label``, from parquet files or the hub."""
    if is_on_the_hub(data):
        return load_dataset(data, split=split)
    files = sorted(map(str, Path(data).rglob(f"{split}*.parquet")))
    if not files:
        raise FileNotFoundError(
            f"data = {data!r}: no {split}*.parquet in that folder or below. Give the absolute "
            "path of a folder with CIFAR-10 as parquet, or a name on the Hugging Face hub: "
            "--run-config 'data=\"uoft-cs/cifar10\"'."
        )
    return load_dataset("parquet", data_files=files, split="train")


def is_on_the_hub(data: str) -> bool:
    """Tell whether ``data`` is a name on the hub, no folder."""
    folder = Path(data)
    return not folder.is_absolute() and data.count("/") == 1 and not folder.exists()


def source_of(data: str) -> str | list[list[str | int]]:
    """Key of the data in the cache: a name on the hub, or files and their times."""
    if is_on_the_hub(data):
        return data
    files = [(file, file.stat()) for file in sorted(Path(data).resolve().rglob("*.parquet"))]
    return [[str(file), seen.st_size, seen.st_mtime_ns] for file, seen in files]


@lru_cache
def encoded_images(data: str, split: str) -> tuple[Dataset, np.ndarray]:
    """Images of a split, still encoded, and their labels; read once in a process."""
    images = load_split(data, split)
    return images, np.asarray(images["label"][:])


@lru_cache
def parts(data: str, partition: str, num_agents: int, seed: int) -> tuple[Indices, ...]:
    """Return which training images each agent holds."""
    return Partition.parse(partition).divide(
        encoded_images(data, "train")[1], num_agents=num_agents, seed=seed
    )


def load_data(
    agent: int, *, data: str, num_agents: int, settings: DataSettings, seed: int, cache: str = ""
) -> tuple[Split, Split | None, Split]:
    """Training, validation and test split of the agent, ``(images, labels)`` each.

    Training and validation are of the training images that the agent holds; a run
    without a validation split has None. Testing: CIFAR-10's own test images, those of
    the agent's classes. ``cache`` is a folder for the decoded pixels, so that on a
    device, where every message is a process of its own, only the first one decodes;
    empty for none.
    """

    def make() -> dict[str, Tensor]:
        return decode_splits(agent, data=data, num_agents=num_agents, settings=settings, seed=seed)

    if cache:
        told = {
            "num-agents": num_agents,
            "seed": seed,
            "agent": agent,
            **asdict(settings),
            "version": 1,
        }
        found = cached_tensors(cache, {**told, "data": source_of(data)}, make)
    else:
        found = make()
    train, validation, test = (
        (normalized(found[name]), found[f"{name}-labels"].long())
        for name in ("train", "validation", "test")
    )
    return train, validation if len(validation[1]) else None, test


def decode_splits(
    agent: int, *, data: str, num_agents: int, settings: DataSettings, seed: int
) -> dict[str, Tensor]:
    """Pixels, uint8 [n, 3, 32, 32], and labels, uint8 [n], of an agent's splits."""
    images, labels = encoded_images(data, "train")
    mine = parts(data, settings.partition, num_agents, seed)[agent]
    places = own_splits(labels[mine], settings, seed=seed, agent=agent)
    found = {}
    for name, chosen in (("train", places.train), ("validation", places.validation)):
        found |= decode(name, images.select(mine[np.sort(chosen)]))
    tests, their_labels = encoded_images(data, "test")
    own = own_tests(their_labels, labels[mine], settings, seed=seed, agent=agent)
    return found | decode("test", tests.select(own))


def decode(name: str, split: Dataset) -> dict[str, Tensor]:
    """Return the pixels and labels of a split under its name."""
    pixels = np.zeros((len(split), 32, 32, 3), np.uint8)
    for place, image in enumerate(split["img"]):
        pixels[place] = image.convert("RGB")
    return {
        name: torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        f"{name}-labels": torch.tensor(split["label"], dtype=torch.uint8),
    }


class Augmented(torch.utils.data.Dataset):
    """Training images, mirrored or not, and shifted by at most four pixels.

    What is drawn comes from torch's global generator, which an agent sets for each
    round from the run's seed.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images, labels.tolist()
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def normalized(pixels: Tensor) -> Tensor:
    """Return images of mean 0.5 and deviation 0.5, float [n, 3, 32, 32]."""
    return pixels.float().div_(127.5).sub_(1)
