"""Time of encoding and decoding a mask against a training step of its network.

Takes a few training steps to get two neighbouring rounds' real masks, then times in
turn: a training step, writing the delta frame, reading it, and the same for a whole
frame; medians are compared.

    python benchmarks/codec_time.py [--repeats 20] [--batch-size 128] [--threads 1]
    [--rounds 4]
"""

import argparse

import torch
from fleet_size import make_fleet
from step_time import batch, measure, one_agent

from flower_mcepl import MceplAgent
from flower_mcepl.wire import Reference, WrittenFrame, decode_frame, write_frame


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--network", choices=("cifar10", "digits"), default="cifar10")
    options.add_argument("--repeats", type=int, default=20, help="runs of each kind (default: 20)")
    options.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="training rounds before the masks are taken (default: 4)",
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.network == "digits":
        (agent,) = make_fleet(1)
    else:
        agent = one_agent(*batch(args.batch_size), arithmetic="exact")
    held = Reference(0, agent.first_payload())
    for round in range(1, args.rounds + 1):
        agent.train(round=round)
        frame = write(agent, round, held)
        before, held = held, read(agent, frame, held)
    assert frame.reference == args.rounds - 1
    whole = write(agent, args.rounds, None)
    masks = agent.outgoing()
    kinds = {
        "training step": lambda: agent.train(round=1),
        "write the delta": lambda: write(agent, args.rounds, before, masks),
        "read the delta": lambda: read(agent, frame, before),
        "write a whole frame": lambda: write(agent, args.rounds, None, masks),
        "read a whole frame": lambda: read(agent, whole, None),
    }
    times = measure(kinds, repeats=args.repeats)
    step = times["training step"]
    print(
        f"{args.network}, {agent.model.num_weights:,} maskable weights, batch "
        f"{agent.config.batch_size}, "
        f"{args.threads} thread(s), median of {args.repeats} runs in turn; delta of "
        f"{len(frame.data):,} bytes, whole frame of {len(whole.data):,}"
    )
    for name, seconds in times.items():
        print(f"  {name:<22} {1000 * seconds:8.2f} ms   {seconds / step:7.4f} of the step")
    both = (times["write the delta"] + times["read the delta"]) / step
    goal = "   (goal: at most 0.05)" if args.network == "cifar10" else ""
    print(f"delta, written and read: {both:.4f} of the step{goal}")


def write(
    agent: MceplAgent,
    round: int,
    reference: Reference | None,
    masks: dict[str, torch.Tensor] | None = None,
) -> WrittenFrame:
    return write_frame(
        agent.outgoing() if masks is None else masks,
        sender=0,
        round=round,
        fingerprint=agent.fingerprint,
        reference=reference,
        prior=agent.prior,
    )


def read(agent: MceplAgent, frame: WrittenFrame, reference: Reference | None) -> Reference:
    return decode_frame(
        frame.data,
        fingerprint=agent.fingerprint,
        layers=agent.layers,
        references=[reference] if reference else [],
        prior=agent.prior,
    ).as_reference()


if __name__ == "__main__":
    main()
