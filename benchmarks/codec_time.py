"""Time of encoding and decoding a mask against a training step of its network.

Takes a few training steps to get two neighbouring rounds' real masks, then times in
turn: a training step, writing the delta frame, reading it, and the same for a whole
frame; medians are compared.

With ``--network vit-b`` nothing is trained: masks of that size are drawn, and frames of
them are compared with packing and deflating the mask. Beside the time stands the peak
of memory that Python and NumPy take during a call, result included, as a multiple of
the mask at a byte a weight. The range coder's own buffer, at most twice the frame, is
not in it.

    python benchmarks/codec_time.py [--network cifar10] [--repeats 20]
    [--batch-size 128] [--threads 1] [--rounds 4]
"""

import argparse
import math
import tracemalloc
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from fleet_size import make_fleet
from step_time import batch, measure, one_agent

from flower_mcepl import MceplAgent
from flower_mcepl.wire import Reference, WrittenFrame, decode_frame, write_frame

VIT_B = {
    f"{block:02}.{name}": shape
    for block in range(12)
    for name, shape in {
        "qkv": (2304, 768),
        "out": (768, 768),
        "up": (3072, 768),
        "down": (768, 3072),
    }.items()
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--network", choices=("cifar10", "digits", "vit-b"), default="cifar10")
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
    if args.network == "vit-b":
        large_frames(args.repeats)
        return
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


def large_frames(repeats: int) -> None:
    """Print time and memory of frames of masks of ViT-B size."""
    draw = np.random.default_rng(0)
    half, sparse = ({name: random_mask(draw, name, r) for name in VIT_B} for r in (0.5, 0.3))
    frames = {
        "packed key frame, r = .5": (half, None),
        "coded key frame, r = .3": (sparse, None),
        "10 % off the first mask, r = .3": (flipped(draw, sparse, 0.1), Reference(0, sparse)),
        "delta of 2 %, r = .5": (flipped(draw, half, 0.02), Reference(1, half)),
        "delta of 0.5 %, r = .5": (flipped(draw, half, 0.005), Reference(1, half)),
    }
    kinds: dict[str, Callable[[], object]] = {"pack and deflate, r = .5": lambda: deflated(half)}
    for name, (masks, reference) in frames.items():
        kinds[f"write {name}"] = lambda m=masks, r=reference: write_large(m, r)
        data = write_large(masks, reference).data
        kinds[f"read {name}"] = lambda d=data, r=reference: decode_frame(
            d, fingerprint="0" * 32, layers=VIT_B, references=[r] if r else []
        )
    times = measure(kinds, repeats=repeats)
    weights = sum(map(math.prod, VIT_B.values()))
    print(f"{weights:,} weights in {len(VIT_B)} layers, median of {repeats} runs in turn")
    for (name, run), seconds in zip(kinds.items(), times.values(), strict=True):
        share, peak = seconds / next(iter(times.values())), traced_peak(run) / weights
        print(f"  {name:<38} {seconds:6.2f} s {share:6.2f} of deflating   memory {peak:.2f}")


def random_mask(draw: np.random.Generator, name: str, share: float) -> torch.Tensor:
    numel = math.prod(VIT_B[name])
    mask = np.zeros(numel, np.bool_)
    mask[draw.permutation(numel)[: int(share * numel)]] = True
    return torch.from_numpy(mask.reshape(VIT_B[name]))


def flipped(
    draw: np.random.Generator, masks: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """The masks with a share of their bits flipped; as many come on as go off."""
    flipped = {}
    for name, mask in masks.items():
        bits = mask.numpy().reshape(-1).copy()
        on, off = np.flatnonzero(bits), np.flatnonzero(~bits)
        for places in (on, off):
            bits[draw.permutation(places)[: int(share / 2 * bits.size)]] ^= True
        flipped[name] = torch.from_numpy(bits.reshape(mask.shape))
    return flipped


def deflated(masks: Mapping[str, torch.Tensor]) -> bytes:
    return zlib.compress(b"".join(np.packbits(mask.numpy()).tobytes() for mask in masks.values()))


def write_large(masks: Mapping[str, torch.Tensor], reference: Reference | None) -> WrittenFrame:
    return write_frame(masks, sender=0, round=2, fingerprint="0" * 32, reference=reference)


def traced_peak(run: Callable[[], object]) -> int:
    """Bytes that Python and NumPy hold at the most during a call."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


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
