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
from flower_mcepl.files.atomic import remove_leftovers
from flower_mcepl.files.sealed import DamagedError, Kind, read_sealed, set_aside, write_sealed
from flower_mcepl.record.values import to_json

SEAL = Kind(b"FMCECKPT", 1, "a checkpoint")
KEPT = 2  # the newest and the one before
_NAME = re.compile(r"round-(\d{6,})\.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """What must survive ``round``: JSON-able facts, and arrays by name."""

    round: int
    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays whose names begin with ``name/``, without that."""
        return {
            place.removeprefix(f"{name}/"): array
            for place, array in self.arrays.items()
            if place.startswith(f"{name}/")
        }


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
        If there is none, none that is whole, or a whole one cannot be used: it may not
        be read, or is of another format version. Going back further would throw away
        what it holds.
    """
    rounds = sorted(checkpoint_rounds(folder), reverse=True)
    reasons = []
    for round in rounds:
        try:
            return _load(_path(folder, round))
        except DamagedError as error:
            reasons.append(f"the checkpoint {_path(folder, round)} is damaged: {error}.")
            log(f"{reasons[-1]} Going back to the checkpoint before it.")
    if reasons:
        raise RecordError(
            f"no checkpoint in {folder} is whole: {' '.join(reasons)} Start the run anew."
        )
    raise RecordError(
        f"a run is resumed from a checkpoint, and {folder} holds none. Start the run anew; "
        "checkpoint-every says after how many rounds one is written."
    )


def set_damaged_aside(folder: Path, *, after: int) -> None:
    """Rename the checkpoints of rounds ``> after``, the damaged ones, to ``*.damaged``: they come again.

    Raises
    ------
    RecordError
        If that is impossible.
    """
    for round in checkpoint_rounds(folder):
        if round > after and set_aside(_path(folder, round)) is None:
            raise RecordError(
                f"cannot rename the damaged checkpoint {_path(folder, round)}. Move it away."
            )


def drop_checkpoints(folder: Path) -> None:
    """Delete all checkpoints, damaged ones included, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for pattern in ("round-*.checkpoint", "round-*.damaged"):
        for file in folder.glob(pattern):
            file.unlink()
    remove_leftovers(folder, "round-")
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
    facts = to_json({"round": checkpoint.round, **checkpoint.facts}).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in checkpoint.arrays.items()}
    return len(facts).to_bytes(8, "big") + facts + safetensors.numpy.save(arrays)


def _load(path: Path) -> Checkpoint:
    """Read one checkpoint; raise DamagedError, or RecordError where it is whole and still of no use."""
    try:
        body = read_sealed(path, SEAL)
        end = 8 + int.from_bytes(body[:8], "big")
        facts: dict[str, Any] = json.loads(bytes(body[8:end]))
        arrays = safetensors.numpy.load(bytes(body[end:]))
        return Checkpoint(facts.pop("round"), facts, arrays)
    except (StateError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise RecordError(f"the checkpoint {path} cannot be used: {error}") from error
