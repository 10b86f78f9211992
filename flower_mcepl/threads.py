"""How many threads torch calculates with: sums of floats depend on it."""

import contextlib
from collections.abc import Iterator

import torch

from flower_mcepl.errors import ConfigError


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with so many torch threads (0: as it is), then set the old number again."""
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
