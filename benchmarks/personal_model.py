"""Size, latency and memory of a personal model: whole, compact and as ONNX.

The masks are made up: a share of the filters of each layer but the last is empty, the
rest keeps half of its weights. All run on one core, in turn, so that all see the same
noise: a ratio is the median over the turns of two times of one turn. On a machine that
others use, ``--clock cpu`` counts processor time, without the time that others get. A
plain network of the same width stands beside them.
Memory is what a process of its own takes at most to load the file and run 32 images,
above what it has when its packages are loaded (Linux).

    python benchmarks/personal_model.py [--repeats 30] [--shares 1,.5] [--clock cpu]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from flower_mcepl import load_personal, shared_module
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.weight_init import SIGNED_CONSTANT, with_weights
from flower_mcepl.models import AlexNetCifar
from flower_mcepl.personal import Origin, compact, save_personal
from flower_mcepl.personal.exporting import export_onnx, export_program

BATCHES = (1, 32)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RETENTION, SEED = 0.5, 0
# the high-water mark begins anew where the packages are loaded
START = """
import sys
{packages}
def kilobytes(field):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))
open("/proc/self/clear_refs", "w", encoding="utf-8").write("5")
before = kilobytes("VmRSS")
{load}
print(kilobytes("VmHWM") - before)
"""
RUN = {  # packages, and how a file is loaded and runs 32 images
    ".mask": (
        "import torch, flower_mcepl.personal; from flower_mcepl.models import AlexNetCifar; "
        "torch.set_num_threads(1)",
        "network = flower_mcepl.load_personal(sys.argv[1], AlexNetCifar); "
        "network(torch.zeros(32, 3, 32, 32))",
    ),
    ".pt2": (
        "import torch, torch.export; torch.set_num_threads(1)",
        "network = torch.export.load(sys.argv[1]).module(); "
        "torch.no_grad().__enter__(); network(torch.zeros(32, 3, 32, 32))",
    ),
    ".onnx": (
        "import numpy, onnxruntime; options = onnxruntime.SessionOptions(); "
        "options.intra_op_num_threads = 1",
        "network = onnxruntime.InferenceSession(sys.argv[1], options); "
        "images = numpy.zeros((32, 3, 32, 32), numpy.float32); "
        "network.run(None, {network.get_inputs()[0].name: images})",
    ),
}

Run = Callable[[Tensor], object]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=30, help="runs of each (default: 30)")
    options.add_argument("--shares", default="1,.75,.5,.35,.25", help="filters that stay")
    options.add_argument("--clock", choices=CLOCKS, default="wall", help="what is timed")
    options.add_argument("--memory", action="store_true", help="measure memory, too")
    args = options.parse_args()
    torch.set_num_threads(1)
    shares = [float(share) for share in args.shares.split(",")]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for share in shares:
            report(share, Path(folder), args)


def report(share: float, folder: Path, args: argparse.Namespace) -> None:
    """Print the table of one share of filters."""
    files = {suffix: folder / f"model-{share:g}{suffix}" for suffix in RUN}
    images = torch.randn(max(BATCHES), 3, 32, 32)
    module = personal(share)
    save_personal(module, files[".mask"], origin=Origin(SEED, 0))
    whole = load_personal(files[".mask"], AlexNetCifar)
    small = compact(whole, images)
    export_program(small.module, files[".pt2"], [images])
    export_onnx(small.module, files[".onnx"], [images])
    runs: dict[str, Run] = {
        "whole": whole,
        "compact": small.module,
        "compact, torch.export": torch.export.load(files[".pt2"]).module(),
        "compact, onnxruntime": in_onnxruntime(files[".onnx"]),
        f"plain network of width {share:g}": AlexNetCifar(width=share).eval(),
    }
    sizes = [files[".mask"], None, files[".pt2"], files[".onnx"], None]
    used = {file: memory_of(suffix, file) for suffix, file in files.items() if args.memory}
    clock = CLOCKS[args.clock]
    times = {b: measure(runs, images[:b], clock, repeats=args.repeats) for b in BATCHES}
    print(f"{share:g} of the filters stay; {small}")
    heads = " ".join(f"batch {b:>2}: ms  of whole" for b in BATCHES)
    print(f"  {'':32} {'file':>10} {'memory':>9} {heads}")
    for name, file in zip(runs, sizes, strict=True):
        size = f"{file.stat().st_size / 1000:,.0f} kB" if file else ""
        peak = f"{used[file]:.0f} MB" if file in used else ""
        cells = [
            f"{1000 * statistics.median(of[name]):12.2f}   {ratio(of[name], of['whole']):8.2f}"
            for of in times.values()
        ]
        print(f"  {name:32} {size:>10} {peak:>9} {' '.join(cells)}")


def personal(share: float) -> nn.Module:
    """AlexNet-CIFAR under a mask that leaves this share of the filters."""
    module = with_weights(shared_module(AlexNetCifar, seed=SEED), SIGNED_CONSTANT, seed=SEED)
    generator = torch.Generator().manual_seed(1)
    *body, _ = find_maskable(module)
    for name in body:
        weight = module.get_parameter(name)
        order = torch.randperm(len(weight), generator=generator)
        weight.data[order[round(share * len(weight)) :]] = 0
        weight.data *= torch.rand(weight.shape, generator=generator) < RETENTION
    return module.eval().requires_grad_(False)


def in_onnxruntime(file: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def measure(
    runs: dict[str, Run], images: Tensor, clock: Callable[[], float], *, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(images)
    for _ in range(repeats):
        for name, run in runs.items():
            began = clock()
            run(images)
            seconds[name].append(clock() - began)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def memory_of(suffix: str, file: Path) -> float:
    """MB that loading the file and running 32 images takes in a process of its own."""
    packages, load = RUN[suffix]
    code = START.format(packages=packages, load=load)
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, check=True
    )
    return int(result.stdout) / 1000


if __name__ == "__main__":
    main()
