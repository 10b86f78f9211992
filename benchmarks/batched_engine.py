"""Agents a second: the loop of `simulate` against its engine "batched".

Twenty agents of a network train on random images of its shape, one mini-batch a round,
on a ring. Loop and stack take turns, so that both see the same noise; ratios are those
within a turn, of processor time on the CPU and of clock time on a GPU. "step" is the
local step alone, "round" all of a round: frames, fusion, step and masks.

    python benchmarks/batched_engine.py [--agents 20] [--batch-size 32] [--repeats 7]
    [--networks digits,alexnet] [--devices cpu,cuda]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from flower_mcepl import AgentData, MceplAgent, MceplConfig, Topology, shared_module, simulate
from flower_mcepl.agents.stack import AgentStack
from flower_mcepl.config.engines import BATCHED, LOOP
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.models import AlexNetCifar

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))
ROUNDS = 3  # of a run; the first is left out


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--agents", type=int, default=20, help="(default: 20)")
    options.add_argument("--batch-size", type=int, default=32, help="images a step (default: 32)")
    options.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    options.add_argument("--networks", default="digits,alexnet", help="(default: both)")
    options.add_argument("--devices", default="cpu,cuda", help="(default: those that are here)")
    args = options.parse_args()
    torch.set_num_threads(1)
    for device in args.devices.split(","):
        if device == "cuda" and not torch.cuda.is_available():
            print("cuda: there is none here, so the GPU is unmeasured")
            continue
        name = torch.cuda.get_device_name() if device == "cuda" else "one thread"
        for network in args.networks.split(","):
            print(f"{device} ({name}), {network}, {args.agents} agents, batch {args.batch_size}")
            fleets = [make_fleet(network, args, device=device) for _ in (LOOP, BATCHED)]
            for what, kinds in (("step", steps(fleets)), ("round", rounds(fleets))):
                show(what, turns(kinds, repeats=args.repeats, device=device), args.agents)


def make_fleet(network: str, args: argparse.Namespace, *, device: str) -> list[MceplAgent]:
    """Agents with random images of a network's shape."""
    model_fn, shape = networks()[network]
    module, draw = shared_module(model_fn, seed=0), torch.Generator().manual_seed(0)
    fleet = []
    for index in range(args.agents):
        images = torch.randn(2 * args.batch_size, *shape, generator=draw)
        labels = torch.randint(10, (2 * args.batch_size,), generator=draw)
        data = AgentData.of((images, labels), (images[:4], labels[:4]), agent=index)
        config = MceplConfig(batch_size=args.batch_size, score_gradient="normalized", score_lr=1e-3)
        fleet.append(MceplAgent(index, module, data, config, seed=0, device=device))
    return fleet


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]]:
    """Networks by name, with the shape of their images."""
    from mcepl_quickstart.task import Net

    return {"digits": (Net, (1, 8, 8)), "alexnet": (AlexNetCifar, (3, 32, 32))}


Kind = Callable[[Callable[[], float]], float]
"""Seconds of one turn, by a clock."""


def steps(fleets: Sequence[list[MceplAgent]]) -> list[Kind]:
    """A local step of all agents: in a loop, and as a stack."""
    loop, stack = fleets[0], AgentStack(fleets[1])

    def alone(clock: Callable[[], float]) -> float:
        start = clock()
        for agent in loop:
            agent.train(round=1)
        return clock() - start

    def together(clock: Callable[[], float]) -> float:
        start = clock()
        stack.train(round=1)
        return clock() - start

    return [alone, together]


def rounds(fleets: Sequence[list[MceplAgent]]) -> list[Kind]:
    """A round of `simulate`, by each engine: the median of a short run."""

    def kind(engine: str, fleet: list[MceplAgent]) -> Kind:
        def measure(clock: Callable[[], float]) -> float:
            ends: dict[int, float] = {}

            def note(round: int, agent: int, reply: Reply) -> None:
                ends[round] = clock()

            simulate(
                fleet,
                Topology.ring(len(fleet)),
                num_rounds=ROUNDS,
                evaluate_every=ROUNDS + 1,
                engine=engine,
                on_reply=note,
            )
            times = [ends[r] - ends[r - 1] for r in range(2, ROUNDS + 1)]
            return statistics.median(times)

        return measure

    return [kind(engine, fleet) for engine, fleet in zip((LOOP, BATCHED), fleets, strict=True)]


def turns(kinds: Sequence[Kind], *, repeats: int, device: str) -> list[list[float]]:
    """Seconds of each kind in each turn, after one that does not count."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    return [[kind(clock) for kind in kinds] for _ in range(repeats + 1)][1:]


def show(what: str, times: Sequence[Sequence[float]], agents: int) -> None:
    """Print agents a second of both, and the ratios."""
    loop, stack = (agents / statistics.median(kind) for kind in zip(*times, strict=True))
    ratios = sorted(alone / together for alone, together in times)
    print(
        f"  {what:<5} loop {loop:8.1f}, batched {stack:8.1f} agents a second; batched is "
        f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
