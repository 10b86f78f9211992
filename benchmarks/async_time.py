"""Time to a target accuracy with a barrier, with deadlines, and without a barrier.

Ten agents learn digits, three classes each, on a graph of degree 4; a local step takes
100 virtual seconds (deadlines are never below a minute), with noise of a tenth. Some
agents, one of ten or every second one, take 1, 2, 5 or 10 times as long. Each fleet
plays the same virtual time, that of ``--rounds`` rounds of a fast agent:

    rounds     waits for the slowest agent in every round
    deadline   goes on without agents that miss the deadline (timeout-factor 1.5)
    async      waits for nobody; votes count alike until max-staleness, or fade by λ

    python benchmarks/async_time.py [--rounds 100] [--seeds 1,2] [--target .95]
"""

import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from digits_fleet import RECIPE, make_fleet

from flower_mcepl import Topology, simulate
from flower_mcepl.record.figures import clock_to, curve_by_clock
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.speeds import Speeds
from flower_mcepl.runs.virtual_time import VirtualTimes

AGENTS, STEP, NOISE, EVERY = 10, 100.0, 0.1, 2
FACTORS = (1, 2, 5, 10)
FLEETS = {"one of ten": AGENTS, "every second": 2}  # the slow agent stands first of so many
DATA: dict[str, Any] = {
    **{"partition": "pathological:classes=3", "train-fraction": 0.4, "test-fraction": 0.6},
    **{"network": "net", "width": 1.0},
}
KEYS: dict[str, Any] = {**RECIPE, "batch-size": 32}
WAYS: dict[str, dict[str, Any]] = {
    "rounds": {},
    "deadline": {"timeout_factor": 1.5},
    "async": {"schedule": "async"},
    "async, λ = .5": {"schedule": "async", "age_decay": 0.5},
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=100, help="of a fast agent (default: 100)")
    options.add_argument("--seeds", default="1", help="of runs and noise (default: 1)")
    options.add_argument("--target", type=float, default=0.95, help="accuracy (default: .95)")
    args = options.parse_args()
    budget = args.rounds * STEP
    with tempfile.TemporaryDirectory() as folder:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        barriers = {seed: played(seed, Path(folder), "1", args.rounds, {}) for seed in seeds}
        for fleet, period in FLEETS.items():
            for factor in FACTORS[period != AGENTS :]:
                print(f"{fleet} {factor} times slower", flush=True)
                times = ", ".join(map(str, [STEP * factor, *[STEP] * (period - 1)]))
                speeds = f"{times}; noise={NOISE}"
                for way, more in WAYS.items():
                    runs = [
                        timed(barriers[seed], seed, speeds)
                        if way == "rounds"
                        else played(seed, Path(folder), speeds, args.rounds, more)
                        for seed in seeds
                    ]
                    print(f"  {way:<14} {shown(runs, args.target, budget)}", flush=True)


def shown(runs: list[Run], target: float, budget: float) -> str:
    """Hours to the target, accuracy when the time is over, rounds by then."""
    times = [clock_to(run, target) for run in runs]
    hours = statistics.fmean(math.inf if t is None else t / 3600 for t in times)
    ends = [[mean for t, mean in curve_by_clock(run) if t <= budget * 1.001] for run in runs]
    accuracy = statistics.fmean(end[-1] if end else math.nan for end in ends)
    slow, fast = (statistics.fmean(rounds_of(run, i, budget) for run in runs) for i in (0, 1))
    return (
        f"{hours:6.2f} h to {target:.0%}   {100 * accuracy:6.2f} % at the end   "
        f"rounds: slow agent {slow:5.1f}, fast agent {fast:5.1f}"
    )


def played(seed: int, folder: Path, speeds: str, rounds: int, options: dict[str, Any]) -> Run:
    """Run of one fleet, at least as long as the time lasts."""
    if "schedule" in options:  # noise: the budget ends the run
        options, rounds = {**options, "time_budget": rounds * STEP}, 2 * rounds
    record = RunRecord.create(folder, name=f"run-{seed}", config={})
    simulate(
        fleet_of(seed),
        graph_of(seed),
        num_rounds=rounds,
        evaluate_every=EVERY,
        record=record,
        speeds=speeds,
        **options,
    )
    return read_run(record.path)


def timed(run: Run, seed: int, speeds: str) -> Run:
    """The same run by rounds, bit for bit, on the clock of other speeds."""
    times = VirtualTimes(fleet_of(seed), Speeds.parse(speeds), None)
    clocks = [0.0]
    for round in range(1, run.num_rounds + 1):
        clocks.append(clocks[-1] + max(times(i, round, clocks[-1]) for i in range(AGENTS)))
    return replace(run, rounds=[{**row, "clock": clocks[row["round"]]} for row in run.rounds])


def graph_of(seed: int) -> Topology:
    """Who hears whom."""
    return Topology.random_regular(AGENTS, degree=4, seed=seed)


def fleet_of(seed: int) -> list[Any]:
    """Agents of the fleet."""
    return make_fleet(AGENTS, data=DATA, keys=KEYS, seed=seed)


def rounds_of(run: Run, agent: int, budget: float) -> int:
    """Rounds that an agent has played, and answered, while the time lasts."""
    rows = [row for row in run.rounds if row["agent"] == agent and row["clock"] <= budget * 1.001]
    if not any(line["late"] for line in run.relay):  # they are its own, or those of all
        return max((int(row["round"]) for row in rows), default=0)
    lines = [line for line in run.relay if line["clock"] <= budget * 1.001]
    return sum(str(agent) in {*line["frames"], *line["late"]} for line in lines)


if __name__ == "__main__":
    main()
