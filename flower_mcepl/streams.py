"""What bits depend on: named random streams, and the number of torch threads."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from flower_mcepl.errors import ConfigError


def stream_seed(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> int:
    """Return the 63-bit seed of one named stream.

    It is the head of ``blake2b("seed/purpose/agent/round")``, so it is the same on
    every machine, Python version and process, and neighboring names give unrelated
    streams.
    """
    parts = ["-" if part is None else int(part) for part in (agent, round)]
    name = f"{int(seed)}/{purpose}/{parts[0]}/{parts[1]}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> torch.Generator:
    """Return a CPU generator at the start of one named stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, agent=agent, round=round))


def numpy_stream(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> np.random.Generator:
    """Return a NumPy generator at the start of one named stream."""
    return np.random.default_rng(stream_seed(seed, purpose, agent=agent, round=round))


@contextlib.contextmanager
def isolated_rng(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> Iterator[None]:
    """Run other people's code (initialisers, dropout, transforms) on one named stream.

    Such code draws from the global generators of torch, NumPy and Python. Inside the
    block these stand at the start of the named stream; afterwards they are where they
    were before.
    """
    start = stream_seed(seed, purpose, agent=agent, round=round)
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        _seed_torch(start, cuda=used)
        random.seed(start)
        np.random.seed(start % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _seed_torch(start: int, *, cuda: bool) -> None:
    """Seed torch, without the call stacks that ``torch.manual_seed`` formats."""
    torch.default_generator.manual_seed(start)
    if cuda:
        torch.cuda.manual_seed_all(start)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(start)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with so many torch threads (0: as it is), then restore the number."""
    if threads < 0:
        raise ConfigError(f"threads must be >= 0 (0: torch's own choice); got {threads}.")
    before = torch.get_num_threads()
    if threads and threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
