"""Time of a training step by the share of filters that are on, whole and compact.

One agent a share and kind on the network of the paper; the classifier keeps all
filters, and without ``--first`` the first layer. Kinds take turns, so that all see the
same noise; medians of processor time are compared with the whole step at the same
share, step by step of the turns, and with a network without gates. One compact step in
`filters-refresh` is a whole one; that is not in these times, but in the last column.

    python benchmarks/filters_time.py [--repeats 20] [--batch-sizes 32,128] [--first]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from step_time import timed

from flower_mcepl import AgentData, MceplAgent, MceplConfig, shared_module
from flower_mcepl.models import AlexNetCifar

SHARES = (1.0, 0.75, 0.5, 0.25)
PLAIN = "no gates"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=20, help="steps of each kind (default: 20)")
    options.add_argument("--batch-sizes", default="32,128", help="images a step")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument("--first", action="store_true", help="gates in the first layer, too")
    options.add_argument("--arithmetic", default="exact", help="class of arithmetic")
    options.add_argument("--retention", type=float, default=0.5, help="r of all layers")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for size in map(int, args.batch_sizes.split(",")):
        show(args, size)


def show(args: argparse.Namespace, size: int) -> None:
    """Print the table of one batch size."""
    kinds: dict[str, Callable[[], object]] = {PLAIN: step_of(args, size)}
    for share in SHARES:
        kinds[f"{share:g} whole"] = step_of(args, size, filters=share)
        kinds[f"{share:g} compact"] = step_of(
            args, size, filters=share, filters_training="compact", filters_refresh=10**6
        )
    times = timed(kinds, repeats=args.repeats)
    plain = statistics.median(times[PLAIN])
    print(
        f"AlexNet-CIFAR, {'first layer, too' if args.first else 'all but the first layer'}, "
        f"batch {size}, {args.threads} thread(s), {args.arithmetic}, processor "
        f"time, median of {args.repeats} alternating steps; no gates: {1000 * plain:.0f} ms"
    )
    print("  share   whole   compact   compact / whole   / no gates   with 1 whole step in 10")
    for share in SHARES:
        whole, compact = times[f"{share:g} whole"], times[f"{share:g} compact"]
        ratio = statistics.median(c / w for c, w in zip(compact, whole, strict=True))
        alone = statistics.median(c / p for c, p in zip(compact, times[PLAIN], strict=True))
        print(
            f"  {share:<5g} {1000 * statistics.median(whole):6.0f}ms "
            f"{1000 * statistics.median(compact):6.0f}ms {ratio:15.3f} {alone:13.3f} "
            f"{0.9 * ratio + 0.1:19.3f}"
        )


def step_of(args: argparse.Namespace, size: int, **filters: Any) -> Callable[[], object]:
    """One round of one local step of an agent with these settings."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    share = filters.get("filters", 1.0)
    layers = {"filters_layers": f"conv1.weight={share}"} if args.first and share < 1 else {}
    config = MceplConfig(
        batch_size=size,
        arithmetic=args.arithmetic,
        retention=args.retention,
        gated=bool(filters),
        **layers,
        **filters,
    )
    data = AgentData.of((images, labels), (images, labels), agent=0)
    agent = MceplAgent(0, shared_module(AlexNetCifar, seed=0), data, config, seed=0)
    return lambda: agent.train(round=1)


if __name__ == "__main__":
    main()
