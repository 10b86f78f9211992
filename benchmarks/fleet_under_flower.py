"""Rounds of large fleets under `flwr run`, several agents a node, against their work.

A fleet like that of `fleet_size.py` as a Flower app, in Flower's simulation with as
many workers as cores: a node plays several agents (`agents-per-node`). Prints the wall
time of an agent and round, and how many times the agents' own computing time over the
cores that is; what is above 1 are Flower, Ray and the relay.

    python benchmarks/fleet_under_flower.py [--agents 20,200,1000] [--per-node 20]
    [--rounds 4] [--topology random-regular:degree=4]
"""

import argparse
import itertools
import os
import statistics
import tempfile
from pathlib import Path

from flower_mcepl import read_run
from flower_mcepl.launch import run_app
from flower_mcepl.record.reading import Run

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fleet"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "flower-mcepl"
[tool.flwr.app.components]
serverapp = "mcepl_fleet:server"
clientapp = "mcepl_fleet:client"
[tool.flwr.app.config]
num-agents = 20
num-rounds = 4
topology = "random-regular:degree=4"
seed = 0
batch-size = 8
evaluate-every = 1000
checkpoint-every = 0
agents-per-node = 1
record-dir = "runs"
"""

APP = """
import torch
from flwr.serverapp import ServerApp
from sklearn.datasets import load_digits
from torch import nn

from flower_mcepl.clients import make_client_app
from flower_mcepl.strategies import make_strategy

IMAGES = 20  # of an agent


def model_fn(context):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 256), nn.ELU(), nn.Linear(256, 10),
    )


def data_fn(context):
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    draw = torch.Generator().manual_seed(context.node_config["partition-id"])
    own = torch.randperm(len(labels), generator=draw)[:IMAGES]
    train, test = own[:-4], own[-4:]
    return (images[train], labels[train]), (images[test], labels[test])


client = make_client_app(model_fn, data_fn)
server = ServerApp()


@server.main()
def main(grid, context):
    make_strategy(context, model_fn, name="fleet").start(grid=grid)
"""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--agents", default="20,200,1000", help="(default: 20,200,1000)")
    options.add_argument("--per-node", type=int, default=20, help="agents a node (default: 20)")
    options.add_argument(
        "--rounds", type=int, default=4, help="rounds; the first is left out (default: 4)"
    )
    options.add_argument("--topology", default="random-regular:degree=4", help="of all sizes")
    args = options.parse_args()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    print(f"{args.topology}, {args.per_node} agents a node, {args.rounds} rounds, {cores} cores")
    for agents in map(int, args.agents.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            run = played(Path(folder), args, agents)
            wall, work = per_agent(run)
            files = ("relay.jsonl", "traffic.jsonl")
            size = sum((run.path / name).stat().st_size for name in files)
            print(
                f"  {agents:>5} agents on {agents // args.per_node} nodes: {1000 * wall:6.2f} ms "
                f"an agent and round, {wall * cores / work:.2f} times their own "
                f"{1000 * work:.2f} ms over the cores; record "
                f"{size / agents / args.rounds:.0f} bytes an agent and round",
                flush=True,
            )


def played(folder: Path, args: argparse.Namespace, agents: int) -> Run:
    """Record of a run of such a fleet."""
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (app / "mcepl_fleet.py").write_text(APP, encoding="utf-8")
    outcome = run_app(
        app,
        run_config={
            "num-agents": agents,
            "num-rounds": args.rounds,
            "topology": args.topology,
            "agents-per-node": args.per_node,
            "record-dir": str(folder / "runs"),
        },
        num_supernodes=agents // args.per_node,
        timeout=3 * 3600,
    )
    if not outcome.ok:
        raise SystemExit(f"{outcome.status}: {outcome.log[-3000:]}")
    (record,) = (folder / "runs").iterdir()
    return read_run(record)


def per_agent(run: Run) -> tuple[float, float]:
    """Wall and computing seconds of an agent and round: medians, without the first."""
    lines = run.relay[:-1]
    if lacking := [line["round"] for line in lines if line["answered"] != run.num_agents]:
        raise SystemExit(f"not all of {run.num_agents} agents answered in rounds {lacking}")
    walls = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(lines)]
    work = [line["agent_seconds"] for line in lines[1:]]
    return statistics.median(walls) / run.num_agents, statistics.median(work) / run.num_agents


if __name__ == "__main__":
    main()
