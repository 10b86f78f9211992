"""Bytes of a real run's frames, layer by layer, against other codings of its masks.

Decodes the frames that a run of examples/cifar10 with keep-frames = true left in its
record, and compares each delta with: the entropy of its flips with one flip rate per
layer (what ideal i.i.d. coding takes), one bit per weight, zstd -19 on the XOR of the
two masks, and the paper's own convention (one bit per kept weight).

    python benchmarks/wire_size.py RECORD [--agents 4] [--first-round 2] [--last-round
    0]
"""

import argparse
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import zstandard

from flower_mcepl import AgentData, MceplAgent, MceplConfig, read_run, shared_module
from flower_mcepl.models import AlexNetCifar
from flower_mcepl.wire import Reference, decode_frame
from flower_mcepl.wire.digits import Bits
from flower_mcepl.wire.payload import support_of
from flower_mcepl.wire.range_coding import BitWriter
from flower_mcepl.wire.support import Known, choose_code

COLUMNS = ("weights", "flips", "ours", "entropy", "packed", "zstd", "paper")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("record", type=Path, help="run record of examples/cifar10 with frames/")
    options.add_argument(
        "--agents",
        type=int,
        default=4,
        help="how many agents to look at, evenly spread (default: 4)",
    )
    options.add_argument(
        "--first-round", type=int, default=2, help="first round that counts (default: 2)"
    )
    options.add_argument(
        "--last-round", type=int, default=0, help="last round that counts (default: 0, the last)"
    )
    args = options.parse_args()
    agent = any_agent(args.record)
    files = frames_of(args.record)
    chosen = sorted(files)[:: max(1, len(files) // args.agents)][: args.agents]
    last = args.last_round or max(max(rounds) for rounds in files.values())
    totals: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COLUMNS, 0.0))
    frames = frame_bytes = 0
    for sender in chosen:
        held: Reference | None = None
        for round in range(1, last + 1):
            data = files[sender][round].read_bytes()
            references = [Reference(0, agent.first_payload()), *([held] if held else [])]
            frame = decode_frame(
                data,
                fingerprint=agent.fingerprint,
                layers=agent.layers,
                references=references,
                prior=agent.prior,
            )
            if held is not None and round >= args.first_round:
                frames, frame_bytes = frames + 1, frame_bytes + len(data)
                for name in agent.layers:
                    bits, before = support_of(frame.tensors[name]), support_of(held.tensors[name])
                    recent = held.flips.get(name)
                    known = Known(bits.size, before, recent, agent.prior.classes(name))
                    count(totals[name], bits, before, coded_bytes(bits, known))
            whole_too = (
                files[sender][round].with_name(files[sender][round].stem + "-key.frame").exists()
            )
            held = Reference(round, frame.tensors, {} if whole_too else frame.flips)
    report(
        totals,
        frames,
        frame_bytes,
        f"agents {', '.join(map(str, chosen))}, rounds {args.first_round} to {last}",
    )


def any_agent(record: Path) -> MceplAgent:
    """Return an agent of the run: first mask and classes are the same for all."""
    config = read_run(record).config["run_config"]
    net = shared_module(
        lambda: AlexNetCifar(width=float(config["width"])), seed=int(config["seed"])
    )
    blank = np.zeros((1, 3, 32, 32), np.float32), np.zeros(1, np.int64)
    data = AgentData.of(*[tuple(map(torch.from_numpy, blank))] * 2, agent=0)
    return MceplAgent(
        0, net, data, MceplConfig.from_run_config(config, agent=0), seed=int(config["seed"])
    )


def frames_of(record: Path) -> dict[int, dict[int, Path]]:
    """Return the frames by sender and round, key frames beside a delta left out."""
    files: dict[int, dict[int, Path]] = defaultdict(dict)
    for file in (record / "frames").glob("*.frame"):
        if match := re.fullmatch(r"(\d+)-agent-(\d+)\.frame", file.name):
            files[int(match[2])][int(match[1])] = file
    if not files:
        raise SystemExit(f"{record} has no frames/: run with --run-config 'keep-frames=true'")
    return files


def coded_bytes(bits: Bits, known: Known) -> float:
    """Bytes of a layer in a frame, without the few that end a range coder."""
    plan, writer = choose_code(bits, known), BitWriter()
    plan.write(writer)
    return max(len(writer.to_bytes()) - 4, 0) if plan.kind > 1 else plan.num_bits / 8


def count(row: dict[str, float], bits: Bits, before: Bits, ours: float) -> None:
    flips = bits ^ before
    packed = np.packbits(flips)
    share = flips.mean()
    row["weights"] = bits.size
    row["flips"] += int(flips.sum())
    row["ours"] += ours
    if 0 < share < 1:
        row["entropy"] -= (
            bits.size * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
        )
    row["packed"] += packed.size
    row["zstd"] += len(zstandard.ZstdCompressor(level=19).compress(packed.tobytes()))
    row["paper"] += bits.sum() / 8


def report(totals: dict[str, dict[str, float]], frames: int, frame_bytes: int, what: str) -> None:
    print(f"{frames} delta frames: {what}; mean bytes per frame\n")
    titles = (
        "layer, weights, flips, ours, i.i.d. entropy, ours / entropy, 1 bit per weight, "
        "zstd -19 of the XOR"
    )
    print(f"| {titles.replace(', ', ' | ')} | paper's convention |")
    print("|---|---|---|---|---|---|---|---|---|")
    weights = sum(row["weights"] for row in totals.values())
    everything = {key: sum(row[key] for row in totals.values()) for key in COLUMNS}
    for name, row in [*sorted(totals.items()), ("all", everything)]:
        mean = {key: row[key] / frames for key in COLUMNS}
        print(
            f"| {name} | {row['weights']:,.0f} | {100 * mean['flips'] / row['weights']:.2f} % | "
            f"{mean['ours']:,.0f} | {mean['entropy']:,.0f} | {row['ours'] / row['entropy']:.3f} | "
            f"{mean['packed']:,.0f} | {mean['zstd']:,.0f} | {mean['paper']:,.0f} |"
        )
    mean_frame = frame_bytes / frames
    print(
        f"\nwhole frames, headers included: {mean_frame:,.0f} bytes, "
        f"{8 * mean_frame / weights:.4f} bit per weight, "
        f"{mean_frame / (everything['entropy'] / frames):.3f} of the i.i.d. entropy, "
        f"{everything['packed'] / frames / mean_frame:.1f} times under one bit per weight, "
        f"{4 * weights / mean_frame:,.0f} times under fp32"
    )


if __name__ == "__main__":
    main()
