"""What bits depend on: named random streams, and the number of torch threads."""

import contextlib
import hashlib
import operator
import os
import pickle
import random
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from flower_mcepl.errors import ConfigError

SEEDS = 2**63  # a seed is below; TOML and Flower's messages carry no larger number

_AT_ONCE = 1 << 20  # words that are skipped in one go

# The global generators and torch's number of threads belong to the process. One thread
# at a time may set them; it may do so again inside.
_process_state = threading.RLock()


def _forget_holder() -> None:
    """Free the lock in a forked process, where the thread that held it is not."""
    global _process_state
    _process_state = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_holder)


@contextlib.contextmanager
def _process_alone() -> Iterator[None]:
    """Keep other threads from generators and thread number, refusing them at once."""
    lock = _process_state
    if not lock.acquire(blocking=False):
        raise ConfigError(
            "one thread of a process calculates at a time: torch's, NumPy's and Python's global "
            f"generators are common to all; got {threading.current_thread().name!r} while another "
            "thread is at it, and either would change the other's results. Run simulations one "
            "after the other or in processes of their own, as `flower-mcepl run --jobs` does."
        )
    try:
        yield
    finally:
        lock.release()


def check_seed(seed: object) -> int:
    """Return the seed of a run as a number; the same rule holds wherever one is given.

    Raises
    ------
    ConfigError
        If it is no whole number in 0..2**63 - 1.
    """
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(seed, bool | np.bool_) or not 0 <= number < SEEDS:
        raise ConfigError(
            f"seed must be a whole number in 0..2**63 - 1; got {seed!r}. Choose one, 0 say: there "
            "is no seed that means another one for each run."
        )
    return number


def stream_seed(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> int:
    """Return the 63-bit seed of one named stream.

    It is the head of ``blake2b("seed/purpose/agent/round")``, so it is the same on
    every machine, Python version and process, and neighboring names give unrelated
    streams.

    Raises
    ------
    ConfigError
        If the run's seed is out of range, see `check_seed`.
    """
    parts = ["-" if part is None else int(part) for part in (agent, round)]
    name = f"{check_seed(seed)}/{purpose}/{parts[0]}/{parts[1]}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(
    seed: int, purpose: str, *, agent: int | None = None, round: int | None = None
) -> torch.Generator:
    """Return a CPU generator at the start of one named stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, agent=agent, round=round))


def mersenne_seed(seed: int) -> int:
    """Return what torch's CPU generator takes of a stream's seed: its low 32 bits."""
    return seed & 0xFFFFFFFF


def mersenne_words(seed: int, count: int, *, skip: int = 0) -> NDArray[np.uint32]:
    """Words ``skip .. skip + count - 1`` of the Mersenne twister MT19937, uint32.

    They are those of ``std::mt19937(seed)`` in C++, of NumPy's ``RandomState``, whose
    streams never change, and of torch's CPU generator: ``randint(0, 2)`` is a word's
    lowest bit there, ``uniform_`` of float32 its low 24 bits. So what was drawn with
    them is drawn again without torch, in any language.
    """
    (words,) = mersenne_pieces(seed, [(skip, count)])
    return words


def mersenne_pieces(seed: int, pieces: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.uint32]]:
    """Yield several `mersenne_words`, ``(skip, count)`` each, one behind the other."""
    twister, at = np.random.RandomState(seed), 0

    def draw(count: int) -> NDArray[np.uint32]:
        return twister.randint(0, 2**32, count, dtype=np.uint32)

    for skip, count in pieces:
        assert skip >= at
        for start in range(at, skip, _AT_ONCE):
            draw(min(_AT_ONCE, skip - start))
        yield draw(count)
        at = skip + count


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

    Raises
    ------
    ConfigError
        If another thread is inside such a block or `torch_threads`.
    """
    start = stream_seed(seed, purpose, agent=agent, round=round)
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else []
    with _process_alone(), torch.random.fork_rng(devices=devices):
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        _seed_torch(start, cuda=used)
        random.seed(start)
        np.random.seed(start % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


SHARED_GENERATORS = "Python's, NumPy's or torch's global generator"


def noting_draws() -> Callable[[], bool]:
    """Return a function that says whether a shared generator was drawn from since.

    Shared are those of `SHARED_GENERATORS`, torch's on the CPU. Watch no more
    than is meant: type checkers such as beartype draw from Python's, too.
    """

    def state() -> bytes:
        shared = random.getstate(), np.random.get_state()  # noqa: NPY002
        return pickle.dumps((*shared, torch.get_rng_state().numpy()))

    before = state()
    return lambda: state() != before


def _seed_torch(start: int, *, cuda: bool) -> None:
    """Seed torch, without the call stacks that ``torch.manual_seed`` formats."""
    torch.default_generator.manual_seed(start)
    if cuda:
        torch.cuda.manual_seed_all(start)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(start)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with so many torch threads (0: as it is), then restore the number.

    Raises
    ------
    ConfigError
        If the number is negative, or another thread is inside such a block or
        `isolated_rng`.
    """
    if threads < 0:
        raise ConfigError(f"threads must be >= 0 (0: torch's own choice); got {threads}.")
    with _process_alone():
        before = torch.get_num_threads()
        if threads and threads != before:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
