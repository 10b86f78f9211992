"""Checkpoints: what of a run must survive a round, each a bundle in one sealed file."""

from collections.abc import Callable
from pathlib import Path

from flower_mcepl.errors import RecordError, StateError
from flower_mcepl.files.atomic import remove_leftovers
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.files.sealed import DamagedError, Kind, read_sealed, set_aside, write_sealed
from flower_mcepl.record.layout import checkpoint_file, checkpoint_rounds

SEAL = Kind(b"FMCECKPT", 2, "a checkpoint")
ROUND = "round"  # key of a checkpoint's facts
KEPT = 2  # the newest and the one before


def save_checkpoint(folder: Path, round: int, checkpoint: Bundle) -> None:
    """Write the checkpoint of a round in one step; keep it and the one before.

    When this returns, the file survives a loss of power.

    Raises
    ------
    RecordError
        If it cannot be written.
    """
    path = _path(folder, round)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(
            path, Bundle({ROUND: round, **checkpoint.facts}, checkpoint.arrays).encode(), SEAL
        )
        for earlier in checkpoint_rounds(folder)[:-KEPT]:
            _path(folder, earlier).unlink()
    except OSError as error:
        raise RecordError(f"cannot write the checkpoint {path}: {error}") from error


def newest_checkpoint(folder: Path, log: Callable[[str], None] = lambda line: None) -> Bundle:
    """Read the newest checkpoint below ``folder``.

    ``log`` gets a line on each damaged one that was passed over.

    Raises
    ------
    RecordError
        If there is none, none that is whole, or a whole one cannot be used: it may not
        be read, or is of another format version. Going back further would throw away
        what it holds.
    """
    rounds = checkpoint_rounds(folder)[::-1]
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
    """Rename the damaged checkpoints of rounds ``> after``: these rounds come again.

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
    """Delete all checkpoints, damaged ones too, and the folder if it is empty then."""
    if not folder.is_dir():
        return
    for pattern in ("round-*.checkpoint", "round-*.damaged"):
        for file in folder.glob(pattern):
            file.unlink()
    remove_leftovers(folder, "round-")
    if not any(folder.iterdir()):
        folder.rmdir()


def _path(folder: Path, round: int) -> Path:
    return folder / checkpoint_file(round)


def _load(path: Path) -> Bundle:
    """Read one checkpoint; raise RecordError where it is whole and of no use."""
    try:
        checkpoint = Bundle.decode(bytes(read_sealed(path, SEAL)))
        int(checkpoint.facts[ROUND])
    except (StateError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the checkpoint {path} cannot be used: {error}") from error
    return checkpoint
