"""How the cost of a simulated round grows with the number of agents.

Every number of agents gets a process of its own: the quickstart's network, twenty
images of scikit-learn's digits an agent, a random graph in which each has four
neighbors, all evaluated at the end alone. Times are processor times; what an agent
costs a round should not depend on how many others there are.

    python benchmarks/fleet_size.py [--agents 10,100,1000] [--rounds 5]
    [--topology random-regular:degree=4] [--profile 25]
"""

import argparse
import contextlib
import cProfile
import multiprocessing
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from flower_mcepl import AgentData, MceplAgent, MceplConfig, Topology, shared_module, simulate
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.overview import plot_run
from flower_mcepl.report.table import agent_table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))
IMAGES = 20  # of an agent; four of them are tested on
RUNS = "rounds.jsonl", "relay.jsonl", "traffic.jsonl", "summary.json", "config.json"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--agents", default="10,100,1000", help="(default: 10,100,1000)")
    options.add_argument("--rounds", type=int, default=5, help="training rounds (default: 5)")
    options.add_argument("--topology", default="random-regular:degree=4", help="of all sizes")
    options.add_argument(
        "--profile", type=int, default=0, help="rows of a profile of each run (default: 0, none)"
    )
    args = options.parse_args()
    print(
        f"{args.topology}, {args.rounds} rounds and the closing exchange, {IMAGES} images an "
        "agent, one thread, processor time"
    )
    first = None
    for agents in map(int, args.agents.split(",")):
        # a process of its own, so that its peak of memory is its own
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measured, (agents, args.rounds, args.topology, args.profile))
        first = first or row["round"]
        print(
            f"  {agents:>5} agents: {row['start']:5.1f} ms an agent to start, "
            f"{row['round']:6.2f} ms an agent and round ({row['round'] / first:.2f} of the first), "
            f"{row['memory']:.2f} MB an agent; record {row['record']:.0f} bytes an agent and "
            f"round, {row['per agent']:.0f} an agent besides; table {row['table']:.2f} s, "
            f"picture {row['picture']:.2f} s",
            flush=True,
        )


def measured(agents: int, rounds: int, topology: str, rows: int) -> dict[str, float]:
    """Return what a run of so many agents costs; profile it if rows are asked for."""
    torch.set_num_threads(1)
    warm_up()
    before, clock = peak_memory(), time.process_time()
    fleet = make_fleet(agents)
    graph = Topology.parse(topology, num_agents=agents, seed=0)
    made = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord.create(name="fleet", config={}, path=Path(folder, "run"))
        with profiled(rows):
            simulate(fleet, graph, num_rounds=rounds, evaluate_every=rounds + 1, record=record)
        played, memory = time.process_time(), peak_memory() - before
        sizes = {name: (record.path / name).stat().st_size for name in RUNS}
        by_round = sizes["relay.jsonl"] + sizes["traffic.jsonl"]
        run = read_run(record.path)
        read = time.process_time()
        agent_table(run)
        tabled = time.process_time()
        plot_run(run)
        drawn = time.process_time()
    return {
        "start": 1000 * (made - clock) / agents,
        "round": 1000 * (played - made) / agents / rounds,
        "memory": memory / agents,
        "record": by_round / agents / rounds,
        "per agent": (sum(sizes.values()) - by_round) / agents,
        "table": tabled - read,
        "picture": drawn - tabled,
    }


def warm_up() -> None:
    """Let everything be imported and every first call be made."""
    graph = Topology.ring(6)
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord.create(name="warm", config={}, path=Path(folder, "run"))
        simulate(make_fleet(6), graph, num_rounds=2, record=record)
        run = read_run(record.path)
        agent_table(run)
        plot_run(run)


def make_fleet(size: int) -> list[MceplAgent]:
    """Return agents of the quickstart's network with images of their own."""
    from mcepl_quickstart.task import Net

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    draw = torch.Generator().manual_seed(0)
    fleet = []
    for agent in range(size):
        own = torch.randperm(len(labels), generator=draw)[:IMAGES]
        train, test = own[:-4], own[-4:]
        data = AgentData.of(
            (images[train], labels[train]), (images[test], labels[test]), agent=agent
        )
        model = shared_module(Net, seed=0)
        fleet.append(MceplAgent(agent, model, data, MceplConfig(batch_size=8), seed=0))
    return fleet


@contextlib.contextmanager
def profiled(rows: int) -> Iterator[None]:
    """Print the dearest functions of what runs inside."""
    if not rows:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).sort_stats("tottime").print_stats(rows)


def peak_memory() -> float:
    """Return the most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
