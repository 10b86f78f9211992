"""Time of a masked training step against a dense step of the same network.

The steps are taken in turn, so that both see the same noise; medians are compared.

    python benchmarks/step_time.py [--repeats 20] [--batch-size 128] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from flower_mcepl import AgentData, MceplAgent, MceplConfig, shared_module
from flower_mcepl.models import AlexNetCifar


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=20, help="steps of each kind (default: 20)")
    options.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    agent, images, labels = one_agent(args.batch_size)
    kinds = {
        "dense step": dense_step(images, labels),
        "masked step": lambda: agent.train(round=1),
        "of it: masks and masked weights, forward": agent.model.masked_weights,
        "outgoing mask": agent.outgoing,
    }
    times = measure(kinds, repeats=args.repeats)
    print(
        f"AlexNet-CIFAR, {agent.model.num_weights:,} maskable weights, batch {args.batch_size}, "
        f"{args.threads} thread(s), median of {args.repeats} alternating runs"
    )
    for name, seconds in times.items():
        print(
            f"  {name:<42} {1000 * seconds:8.1f} ms   {seconds / times['dense step']:6.3f} of the "
            "dense step"
        )
    print(
        f"masked / dense: {times['masked step'] / times['dense step']:.3f}   (goal: at most 1.10)"
    )


def one_agent(batch_size: int) -> tuple[MceplAgent, torch.Tensor, torch.Tensor]:
    """Agent of the paper's network, images [batch_size, 3, 32, 32] of noise, labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    data = AgentData.of((images, labels), (images, labels), agent=0)
    agent = MceplAgent(
        0, shared_module(AlexNetCifar, seed=0), data, MceplConfig(batch_size=batch_size), seed=0
    )
    return agent, images, labels


def dense_step(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """Return one step of plain SGD on the weights that the masks cover."""
    net = shared_module(AlexNetCifar, seed=0)
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


def measure(kinds: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each kind; the kinds take turns, after two warm-up runs."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 2):
        for name, run in kinds.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
