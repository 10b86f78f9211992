"""Agents a second: the loop of `simulate` against its engine "batched".

Twenty agents of a network train on random images of its shape, one mini-batch a round,
on a graph. Loop and stack take turns, so that both see the same noise; ratios are those
within a turn, of processor time on the CPU and of clock time on a GPU. "step" is the
local step alone, "fusion" what follows once the neighbors' masks are decoded, "round"
all of a round: frames, fusion, step and masks.

    python benchmarks/batched_engine.py [--agents 20] [--batch-size 32] [--repeats 7]
    [--graph ring] [--networks digits,alexnet] [--devices cpu,cuda]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flower_mcepl import AgentData, MceplAgent, MceplConfig, Topology, shared_module, simulate
from flower_mcepl.agents.inboxes import Distinct
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
    options.add_argument("--graph", default="ring", help="spec of the graph (default: ring)")
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
            print(
                f"{device} ({name}), {network}, {args.agents} agents, {args.graph}, batch "
                f"{args.batch_size}"
            )
            fleets = [make_fleet(network, args, device=device, draw=draw) for draw in (0, 1)]
            graph = Topology.parse(args.graph, num_agents=args.agents)
            for what, kinds in (
                ("step", steps(fleets)),
                ("fusion", fusions(fleets, graph)),
                ("round", rounds(fleets, graph)),
            ):
                show(what, turns(kinds, repeats=args.repeats, device=device), args.agents)


def make_fleet(
    network: str, args: argparse.Namespace, *, device: str, draw: int
) -> list[MceplAgent]:
    """Agents with random images of a network's shape.

    Other draws make other masks: a frame that one fleet sent, a process need not decode
    again for the other.
    """
    model_fn, shape = networks()[network]
    module, generator = shared_module(model_fn, seed=0), torch.Generator().manual_seed(draw)
    fleet = []
    for index in range(args.agents):
        images = torch.randn(2 * args.batch_size, *shape, generator=generator)
        labels = torch.randint(10, (2 * args.batch_size,), generator=generator)
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


def fusions(fleets: Sequence[list[MceplAgent]], graph: Topology) -> list[Kind]:
    """Fusion of all agents, each of which decoded what it hears."""
    loop, stack = fleets[0], AgentStack(fleets[1])
    sent = stack.outgoing()

    def heard() -> list[dict[int, dict[str, Tensor]]]:
        senders = [graph.in_neighbors(agent.index) for agent in loop]
        return [{j: {n: m.clone() for n, m in sent[j].items()} for j in own} for own in senders]

    def alone(clock: Callable[[], float]) -> float:
        _train(fleets[0])
        inboxes, start = heard(), clock()
        for agent, inbox in zip(loop, inboxes, strict=True):
            agent.fuse(inbox, round=1)
        return clock() - start

    def together(clock: Callable[[], float]) -> float:
        _train(fleets[1])
        inboxes, start = heard(), clock()
        distinct = Distinct()
        stack.fuse([*map(distinct.inbox, inboxes)], round=1, votes=[{}] * len(loop))
        return clock() - start

    return [alone, together]


def _train(fleet: list[MceplAgent]) -> None:
    """Leave a gradient for the fine-tuning step of each."""
    AgentStack(fleet).train(round=1)


def rounds(fleets: Sequence[list[MceplAgent]], graph: Topology) -> list[Kind]:
    """A round of `simulate`, by each engine: the median of a short run."""

    def kind(engine: str, fleet: list[MceplAgent]) -> Kind:
        def measure(clock: Callable[[], float]) -> float:
            ends: dict[int, float] = {}

            def note(round: int, agent: int, reply: Reply) -> None:
                ends[round] = clock()

            simulate(
                fleet,
                graph,
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
        f"  {what:<6} loop {loop:8.1f}, batched {stack:8.1f} agents a second; batched is "
        f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
