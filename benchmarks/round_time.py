"""Time of a round under `flwr run` against the bare steps divided by the cores.

The agents train the CIFAR-10 network on made-up images of its shape: no data set is
needed. The bare step is timed in this command too: in one process alone, and in as many
processes at once as there are cores (they share caches and memory bandwidth).

    python benchmarks/round_time.py [--agents 20] [--rounds 6]
"""

import argparse
import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flower_mcepl import AgentData, MceplAgent, MceplConfig, shared_module
from flower_mcepl.launch import run_app
from flower_mcepl.models import AlexNetCifar

DEGREE = 10  # mean degree of the example's graph; fewer agents have a complete one
CIFAR10 = Path(__file__).parents[1] / "examples" / "cifar10"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--agents", type=int, default=20, help="number of agents (default: 20)")
    options.add_argument(
        "--rounds", type=int, default=6, help="rounds; the first is left out (default: 6)"
    )
    options.add_argument("--steps", type=int, default=12, help="bare steps to time (default: 12)")
    args = options.parse_args()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )

    print("bare steps, one process ...", file=sys.stderr)
    alone = step_seconds(args.steps)
    print(f"bare steps, {cores} processes at once ...", file=sys.stderr)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        together = statistics.mean(pool.map(step_seconds, [args.steps] * cores))
    print("flwr run ...", file=sys.stderr)
    rounds, inside = round_seconds(args.agents, args.rounds)

    measured = statistics.median(rounds)
    print(
        f"{args.agents} agents, {graph_of(args.agents)}, one mini-batch of 128 a round, "
        f"{cores} cores"
    )
    print(f"  bare step: {alone:.3f} s alone, {together:.3f} s with all cores busy")
    print(
        f"  round under flwr run: median {measured:.2f} s of {len(rounds)} rounds "
        f"({min(rounds):.2f} to {max(rounds):.2f})"
    )
    for name, step in (("alone", alone), ("all cores busy", together)):
        bare = args.agents * step / cores
        print(
            f"  round / (steps / cores), steps timed {name}: {measured / bare:.3f}   (goal: at "
            "most 1.25)"
        )
    busy = inside / cores
    print(
        f"  inside the agents' own code (fuse, train, encode): {busy:.2f} s a round; "
        f"Flower, Ray, state and building the agents: {measured - busy:.2f} s"
    )


def graph_of(agents: int) -> str:
    """Return the example's graph for so many agents: each has at most all others."""
    return f"erdos-renyi:degree={min(DEGREE, agents - 1)}"


def step_seconds(steps: int) -> float:
    """Return the median seconds of one training step on one thread."""
    torch.set_num_threads(1)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    data = AgentData.of((images, labels), (images, labels), agent=0)
    agent = MceplAgent(0, shared_module(AlexNetCifar, seed=0), data, MceplConfig(), seed=0)
    times = []
    for round in range(1, steps + 3):
        start = time.perf_counter()
        agent.train(round=round)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def round_seconds(agents: int, rounds: int) -> tuple[list[float], float]:
    """Seconds of the cifar10 example's rounds, and of the agents' own code in each."""
    with tempfile.TemporaryDirectory() as folder:
        write_made_up_images(Path(folder))
        outcome = run_app(
            CIFAR10,
            run_config={
                "data": folder,
                "train-fraction": 1.0,  # enough for full batches
                "num-agents": agents,
                "topology": graph_of(agents),
                "num-rounds": rounds,
                "evaluate-every": rounds + 1,
                "record-dir": f"{folder}/runs",
            },
            num_supernodes=agents,
        )
        if not outcome.ok:
            raise SystemExit(f"the run failed: {outcome.details}\n{outcome.log[-3000:]}")
        (record,) = Path(folder, "runs").iterdir()
        lines = [
            json.loads(line)
            for line in (record / "relay.jsonl").read_text(encoding="utf-8").splitlines()
        ][:rounds]
    ends = [line["seconds"] for line in lines]
    own = statistics.mean(line["agent_seconds"] for line in lines[1:])
    return [after - before for before, after in itertools.pairwise(ends)], own


def write_made_up_images(folder: Path) -> None:
    """Write noise as CIFAR-10 comes, 5000 training and 100 test images."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    random = np.random.default_rng(0)
    for split, count in (("train", 5000), ("test", 100)):
        rows = []
        for pixels in random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Picture.fromarray(pixels).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = {"img": rows, "label": [i % 10 for i in range(count)]}
        features = Features({"img": Image(), "label": Value("int64")})
        Dataset.from_dict(table, features=features).to_parquet(str(folder / f"{split}.parquet"))


if __name__ == "__main__":
    main()
