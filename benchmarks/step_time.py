"""Time of a masked training step: classes of arithmetic, a dense step, the limit.

The limit is the step's multiplications and additions over the speed of this machine's
matrix product, both in float32. The kinds take turns, so that all see the same noise;
medians of processor time are compared. The first row is a process of its own, run
before and after the others.

    python benchmarks/step_time.py [--network resnet18] [--batch-size 128] [--threads 1]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flower_mcepl import AgentData, MceplAgent, MceplConfig, shared_module
from flower_mcepl.agents.parts import training
from flower_mcepl.models import AlexNetCifar

DENSE, EXACT = "dense step, exact", "masked step, exact"
GIVEN_BACK = "masked step, exact, freed memory given back"
OPTIONS = ("repeats", "batch-size", "threads", "network")


class Network(NamedTuple):
    """A network and the width of its images."""

    name: str
    make: Callable[[], nn.Module]
    pixels: int


def resnet18() -> nn.Module:
    """The ResNet-18 of torchvision with ten classes."""
    from torchvision import models

    return models.resnet18(num_classes=10)


NETWORKS = {
    "alexnet": Network("AlexNet-CIFAR", AlexNetCifar, 32),
    "resnet18": Network("ResNet-18", resnet18, 64),
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=20, help="steps of each kind (default: 20)")
    options.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument(
        "--network",
        choices=NETWORKS,
        default="alexnet",
        help="alexnet: AlexNet-CIFAR, 32 pixels (default); resnet18: torchvision's, 64 pixels",
    )
    options.add_argument(
        "--bfloat16", action="store_true", help="too: takes minutes where it is emulated"
    )
    options.add_argument("--given-back", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    network = NETWORKS[args.network]
    images, labels = batch(args.batch_size, network.pixels)
    agents = {
        kind: one_agent(network, images, labels, arithmetic=kind)
        for kind in ("exact", "fast", *(["bfloat16"] if args.bfloat16 else []))
    }
    exact = agents["exact"]
    if args.given_back:
        training.keep_freed_memory = lambda: False
        print(measure({EXACT: lambda: exact.train(round=1)}, repeats=args.repeats)[EXACT])
        return
    kinds: dict[str, Callable[[], object]] = {
        DENSE: dense_step(network, images, labels),
        EXACT: lambda: exact.train(round=1),
        **{
            f"masked step, {kind}": lambda agent=agent: agent.train(round=1)
            for kind, agent in agents.items()
            if kind != "exact"
        },
        "of it: masks and masked weights, forward": exact.model.masked_weights,
        "outgoing mask": exact.outgoing,
    }
    before = given_back(args)
    times = measure(kinds, repeats=args.repeats)
    times = {GIVEN_BACK: min(before, given_back(args)), **times}
    flops, peak = step_flops(network, images, labels), matrix_product_speed()
    limit = flops / peak
    print(
        f"{network.name}, {exact.model.num_weights:,} maskable weights, batch {args.batch_size}, "
        f"{args.threads} thread(s), processor time, median of {args.repeats} alternating runs"
    )
    print(
        f"limit: {flops / 1e9:.1f} GFLOP a dense step at {peak / 1e9:.0f} GFLOP/s of a float32 "
        f"matrix product: {1000 * limit:.0f} ms"
    )
    for name, seconds in times.items():
        print(
            f"  {name:<44} {1000 * seconds:8.1f} ms   {seconds / times[DENSE]:6.3f} of the dense "
            f"step   {seconds / limit:5.2f} of the limit"
        )
    print(f"masked / dense: {times[EXACT] / times[DENSE]:.3f}   (goal: at most 1.10)")


def batch(size: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [size, 3, pixels, pixels] of noise, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def one_agent(
    network: Network, images: torch.Tensor, labels: torch.Tensor, *, arithmetic: str
) -> MceplAgent:
    """Agent with one batch."""
    data = AgentData.of((images, labels), (images, labels), agent=0)
    config = MceplConfig(batch_size=len(labels), arithmetic=arithmetic)
    return MceplAgent(0, shared_module(network.make, seed=0), data, config, seed=0)


def dense_step(
    network: Network, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    """Return one step of plain SGD on the weights that the masks cover."""
    net = shared_module(network.make, seed=0)
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.dim() > 1], lr=0.01, weight_decay=5e-4
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def given_back(args: argparse.Namespace) -> float:
    """Median seconds of an exact step in a process whose C library frees at once.

    The setting holds for a process, and so does what it has kept before.
    """
    command = [sys.executable, __file__, "--given-back"]
    command += [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in OPTIONS]
    return float(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)


def step_flops(network: Network, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Multiplications and additions of one dense step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        dense_step(network, images, labels)()
    return counter.get_total_flops()


def matrix_product_speed(size: int = 1024, repeats: int = 10) -> float:
    """Operations a second of a float32 matrix product: the best of several runs."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * size**3 / min(times)


def measure(kinds: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median processor seconds of each kind; see `timed`."""
    times = timed(kinds, repeats=repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(kinds: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each kind, in turns, after two warm-up runs."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 2):
        for name, run in kinds.items():
            start = time.process_time()
            run()
            if turn >= 2:
                times[name].append(time.process_time() - start)
    return times


if __name__ == "__main__":
    main()
