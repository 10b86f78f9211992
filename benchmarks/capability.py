"""A fleet whose devices choose their share of filters, on a trace of speeds.

Ten agents learn digits (the data and keys of ``examples/paper/10-filters.toml``). Their
clock is made up: a local step takes one second with all filters on, .2 + .8 ρ with the
share ρ, with noise of up to a fifth; from one round on agent 0 is three times slower.
A step may take 1.5 seconds. The same clock runs fleets in which agent 0 keeps one share
from the first round to the last; the best of those that are late in at most 5 % of its
rounds is the best in hindsight.

    python benchmarks/capability.py [--rounds 100] [--seeds 1,2] [--shares .25]
"""

import argparse
import random
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from digits_fleet import RECIPE, make_fleet

from flower_mcepl import Topology, simulate
from flower_mcepl.agents.parts.pace import LEVELS
from flower_mcepl.record.reading import Run, read_run
from flower_mcepl.record.writing import RunRecord

AGENTS, BUDGET, SLOWER, NOISE = 10, 1.5, 3.0, 0.2
SLOW = 0  # the agent that becomes slow
DATA: dict[str, Any] = {
    **{"partition": "iid", "train-fraction": 0.2, "test-fraction": 0.8, "stratify": True},
    **{"network": "net", "width": 1.0},
}
KEYS: dict[str, Any] = {
    **RECIPE,
    "score-averaging": 0.9,
    **{"filters": "auto", "filters-training": "compact", "step-budget": BUDGET},
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=100, help="training rounds (default: 100)")
    options.add_argument("--slow-from", type=int, default=30, help="agent 0 is slow from here on")
    options.add_argument("--seeds", default="1", help="of runs and noise (default: 1)")
    options.add_argument(
        "--shares", default=",".join(map(str, LEVELS)), help="fixed ones of agent 0 (default: all)"
    )
    options.add_argument("--record", default="", help="folder that keeps the records")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, args.seeds.split(",")):
            show(args, seed, Path(args.record or folder))


def show(args: argparse.Namespace, seed: int, folder: Path) -> None:
    """Print what came of one seed."""
    run = played(args, seed, folder, None)
    levels = [LEVELS.index(share) for share in run.decisions[SLOW].values()]
    spent = [entry["spent"] for entry in decisions(run, SLOW)]
    changes = [t + 2 for t, (a, b) in enumerate(pairwise(levels)) if a != b]
    after = [t for t in changes if t > args.slow_from]
    fits = [
        level for level, share in enumerate(LEVELS) if SLOWER * cost(share) * (1 + NOISE) <= BUDGET
    ]
    due = max(fits, default=0)
    late = sum(seconds > BUDGET for seconds in spent)
    everyone = [entry for agent in range(AGENTS) for entry in decisions(run, agent)]
    print(f"seed {seed}: {args.rounds} rounds, agent 0 three times slower from {args.slow_from} on")
    print(f"  agent 0, share by round: {shown(levels)}")
    print(
        f"  settled after {max(after, default=args.slow_from) - args.slow_from} rounds; lowest "
        f"level {due - min(levels)} below the one that fits; {len(changes)} changes in all"
    )
    print(
        f"  late rounds: agent 0 {late} of {len(spent)} ({late / len(spent):.1%}), all agents "
        f"{sum(entry['spent'] > BUDGET for entry in everyone)} of {len(everyone)}"
    )
    rows = {"auto": row_of(run)}
    for share in map(float, args.shares.split(",")):
        rows[f"{share:g}"] = row_of(played(args, seed, folder, share))
    print("  share of agent 0   its late rounds   accuracy, mean   accuracy, agent 0")
    for name, (slow, mean, own) in rows.items():
        print(f"  {name:<16} {slow:17.1%} {mean:16.4f} {own:19.4f}")
    allowed = {name: row for name, row in rows.items() if name != "auto" and row[0] <= 0.05}
    if allowed:
        best = max(allowed, key=lambda name: allowed[name][1])
        print(
            f"  best fixed share in hindsight: {best}; auto is "
            f"{100 * (rows['auto'][1] - allowed[best][1]):+.2f} points from it in the mean"
        )


def played(args: argparse.Namespace, seed: int, folder: Path, share: float | None) -> Run:
    """Run in which agent 0 chooses its share, or keeps one; all others choose."""
    agents = make_fleet(AGENTS, data=DATA, keys=KEYS, seed=seed)
    name = "auto" if share is None else f"fixed-{share:g}"
    record = RunRecord.create(folder, name=f"{name}-{seed}", config={})

    def clock(index: int, round: int, now: float) -> float:
        if round == 0:
            return cost(now)
        noise = random.Random(f"{seed} {index} {round}").uniform(1 - NOISE, 1 + NOISE)
        slower = SLOWER if index == SLOW and round >= args.slow_from else 1.0
        return cost(now) * noise * slower

    if share is not None:
        hold(agents[SLOW], share)
    simulate(
        agents,
        Topology.complete(AGENTS),
        num_rounds=args.rounds,
        evaluate_every=args.rounds,
        record=record,
        step_seconds=clock,
    )
    return read_run(record.path)


def hold(agent: Any, share: float) -> None:
    """Let an agent keep one share, whatever its steps take."""
    begin = agent.pacer.begin

    def held(round: int, measure: Any) -> float:
        begin(round, measure)
        agent.pacer.pace = type(agent.pacer.pace)(LEVELS.index(share))
        return share

    agent.pacer.begin = held


def cost(share: float) -> float:
    """Seconds of a step at a share of the filters, without noise."""
    return 0.2 + 0.8 * share


def decisions(run: Run, agent: int) -> list[dict[str, Any]]:
    """Entries of the record on one agent, by round."""
    return [e for line in run.relay for e in line.get("decisions") or [] if e["agent"] == agent]


def row_of(run: Run) -> tuple[float, float, float]:
    """Late share of agent 0's rounds, mean accuracy, agent 0's accuracy."""
    spent = [entry["spent"] for entry in decisions(run, SLOW)]
    last = {row["agent"]: row["accuracy"] for row in run.rounds}
    late = sum(seconds > BUDGET for seconds in spent) / len(spent)
    return late, sum(last.values()) / len(last), last[SLOW]


def shown(levels: list[int]) -> str:
    """Levels as runs of rounds."""
    parts, first = [], 0
    for t in range(1, len(levels) + 1):
        if t == len(levels) or levels[t] != levels[first]:
            parts.append(f"{LEVELS[levels[first]]:g} in {first + 1}-{t}")
            first = t
    return ", ".join(parts)


if __name__ == "__main__":
    main()
