"""Checkpoints: what must survive a round, each in one sealed file."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from flower_mcepl.errors import RecordError, StateError
from flower_mcepl.sealed import DamagedError, Kind, read_sealed, write_sealed

SEAL = Kind(b"FMCECKPT", 1, "a checkpoint")
KEPT = 2  # the newest and the one before
_NAME = re.compile(r"round-(\d{6,})\.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """What must survive ``round``: JSON-able facts, and arrays by name."""

    round: int
    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint below ``folder`` in one step, and drop all but it and the one before.

    When this returns, the file survives a loss of power.

    Raises
    ------
    RecordError
        If it cannot be written.
    """
    path = _path(folder, checkpoint.round)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, _encode(checkpoint), SEAL)
        for round in sorted(checkpoint_rounds(folder))[:-KEPT]:
            _path(folder, round).unlink()
    except OSError as error:
        raise RecordError(f"cannot write the checkpoint {path}: {error}") from error


def newest_checkpoint(folder: Path, log: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """Read the newest checkpoint below ``folder``; ``log`` is told of each damaged one that was passed over.

    Raises
    ------
    RecordError
        If there is none, or none that is whole.
    """
    rounds = sorted(checkpoint_rounds(folder), reverse=True)
    reasons = []
    for round in rounds:
        try:
            return _load(_path(folder, round))
        except RecordError as error:
            log(f"{error} Going back to the checkpoint before it.")
            reasons.append(str(error))
    if reasons:
        raise RecordError(f"no checkpoint in {folder} is whole: {' '.join(reasons)} Start the run anew.")
    raise RecordError(
        f"a run is resumed from a checkpoint, and {folder} holds none. Start the run anew; checkpoint-every says after "
        "how many rounds one is written."
    )


def drop_checkpoints(folder: Path, *, after: int = -1) -> None:
    """Delete the checkpoints of rounds ``> after``, and the folder if none is left."""
    for round in checkpoint_rounds(folder):
        if round > after:
            _path(folder, round).unlink()
    if folder.is_dir():
        for draft in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
            draft.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def checkpoint_rounds(folder: Path) -> list[int]:
    """Return the rounds of which ``folder`` holds a checkpoint, in no order."""
    files = folder.iterdir() if folder.is_dir() else ()
    return [int(match[1]) for file in files if (match := _NAME.fullmatch(file.name))]


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}.checkpoint"


def _encode(checkpoint: Checkpoint) -> bytes:
    """Return the length of the facts in 8 bytes, the facts as JSON, and the arrays in the safetensors format."""
    facts = json.dumps({"round": checkpoint.round, **checkpoint.facts}).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in checkpoint.arrays.items()}
    return len(facts).to_bytes(8, "big") + facts + safetensors.numpy.save(arrays)


def _load(path: Path) -> Checkpoint:
    try:
        body = read_sealed(path, SEAL)
        end = 8 + int.from_bytes(body[:8], "big")
        facts: dict[str, Any] = json.loads(bytes(body[8:end]))
        arrays = safetensors.numpy.load(bytes(body[end:]))
        return Checkpoint(facts.pop("round"), facts, arrays)
    except DamagedError as error:
        raise RecordError(f"the checkpoint {path} is damaged: {error}.") from error
    except (StateError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise RecordError(f"the checkpoint {path} cannot be used: {error}") from error
