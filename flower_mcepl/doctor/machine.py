"""Checks of the machine: where an agent calculates, and where it keeps its state."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from flower_mcepl.agents import AgentState
from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.record.values import human_bytes
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.runs.store import StateStore

# bytes: below the first nothing runs, below the second not long
LEAST_FREE, ENOUGH_FREE = 50_000_000, 1_000_000_000
_ENOUGH_SHARED = 200_000_000  # bytes; a container has 64 MB unless told otherwise
_RAY_SECONDS = 2.0
_FREE_SOMETHING = "Free some, or choose a folder on another disk"


def check_torch(settings: DeviceSettings) -> Finding:
    """Calculate something on the device that the agent would use."""
    with Examination(
        "torch", remedy='Choose a device that torch finds, such as device = "cpu".'
    ) as check:
        name = _device(settings)
        cores, threads = os.cpu_count() or 1, settings.threads or torch.get_num_threads()
        values = {
            "device": name,
            "threads": threads,
            "cores": cores,
            "cuda_devices": torch.cuda.device_count(),
        }
        square = torch.ones(8, 8, device=name)
        if float((square @ square).sum()) != 512.0:
            raise RuntimeError(f"{name} calculates wrongly")
        if torch.device(name).type == "cuda":
            free, total = torch.cuda.mem_get_info(name)
            gpu = torch.cuda.get_device_name(name)
            values |= {"gpu": gpu, "gpu_free_bytes": free, "gpu_bytes": total}
            check.ok(f"{name}: {gpu}, {human_bytes(free)} of {human_bytes(total)} free", **values)
        elif threads > cores:
            check.warn(
                f"{name}: {threads} threads on {cores} cores",
                "Set threads to the number of cores at most.",
                **values,
            )
        else:
            check.ok(f"{name}: {threads} of {cores} cores in use (threads)", **values)
    return check.finding


def check_disk(
    check_name: str, folder: Path, what: str, key: str, *, needed: bool = True
) -> Finding:
    """Check the free space where a folder is or would be; fail where it is `needed`."""
    remedy = f"{_FREE_SOMETHING}: {key}."
    with Examination(check_name, remedy=remedy) as check:
        place = existing(folder)
        free = shutil.disk_usage(place).free
        state = f"{human_bytes(free)} free for {what} in {folder}"
        values = {"folder": str(folder), "free_bytes": free}
        fail = check.fail if needed else check.warn
        if not place.is_dir() or not os.access(place, os.W_OK):
            remedy = f"Give this process the right to write there, or choose another folder: {key}."
            reason = "cannot be written to" if place.is_dir() else "is no folder"
            fail(f"{place}, where {what} would go, {reason}", remedy, **values)
        elif free < LEAST_FREE:
            fail(state, remedy, **values)
        elif free < ENOUGH_FREE:
            check.warn(state, remedy, **values)
        else:
            check.ok(state, **values)
    return check.finding


def check_state_folder(settings: DeviceSettings) -> Finding:
    """Write a tiny state into the state folder, read it back, and remove it."""
    remedy = (
        "Give this process the right to write there and room on that disk, or set state-dir to "
        "another absolute path in the SuperNode's --node-config."
    )
    with Examination("state-folder", remedy=remedy) as check:
        folder = settings.state_folder()
        if folder is None:
            check.ok(
                'none: with state-dir = "none" a SuperNode that stops loses its agent\'s state',
                folder=None,
            )
        else:
            with (
                _made(folder),
                tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch,
            ):
                _write_and_read_back(Path(scratch))
            check.ok(f"a state was written to {folder} and read back", folder=str(folder))
    return check.finding


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding | None:
    """Check the shared memory through which Ray, if installed, passes messages."""
    if find_spec("ray") is None or not folder.is_dir():
        return None
    with Examination("shared-memory", remedy="Mount it, or run where it is mounted.") as check:
        free = shutil.disk_usage(folder).free
        state = f"{human_bytes(free)} free in {folder}, through which Ray's workers exchange"
        if free < _ENOUGH_SHARED:
            check.warn(
                state,
                "Give a container more, for example `--shm-size=1g`; devices do not need it.",
                free_bytes=free,
            )
        else:
            check.ok(state, free_bytes=free)
    return check.finding


# Ray notes the address of the cluster that it last started on a machine, and `flwr
# run` joins that one. Where it was killed, the note stays, and `flwr run` waits without
# a word.
def check_ray_cluster() -> Finding | None:
    """Check that the Ray cluster noted on this machine, if any, still answers."""
    note = _ray_folder() / "ray" / "ray_current_cluster"
    if find_spec("ray") is None or not note.is_file():
        return None
    remedy = f"Remove {note}, or start runs by `python -m flower_mcepl.launch`, which reads none."
    with Examination("ray-cluster", remedy=remedy) as check:
        address = note.read_text(encoding="utf-8").strip()
        host, _, port = address.rpartition(":")
        values = {"address": address, "file": str(note)}
        try:
            socket.create_connection((host, int(port)), timeout=_RAY_SECONDS).close()
        except (OSError, ValueError) as error:
            check.warn(
                f"{note} names a Ray cluster, {address!r}, that does not answer ({error}); "
                "`flwr run` would wait for it",
                remedy,
                **values,
            )
        else:
            check.ok(f"{address} answers, the cluster that `flwr run` would join", **values)
    return check.finding


def _ray_folder() -> Path:
    """Folder in which Ray makes its own, as Ray itself finds it."""
    places = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    named = (os.environ[name] for name in places if name in os.environ)
    return Path(next(named, "/tmp" if os.name == "posix" else tempfile.gettempdir()))


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _device(settings: DeviceSettings) -> str:
    """Return the torch device that ``device`` means on this machine."""
    if settings.device != "auto":
        return settings.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _write_and_read_back(folder: Path) -> None:
    state = AgentState({"algorithm": "doctor"}, {"scores": np.arange(8, dtype=np.float32)})
    written = Generation("0" * 16, 1, 0, state, {}, {"1/bits": np.arange(8, dtype=np.uint8)})
    warnings: list[str] = []
    store = StateStore(folder, log=warnings.append)
    with store.hold(0):
        store.save(written)
        read = store.load(0, run=written.run, before=2)
    if read is None or read.encode() != written.encode():
        raise OSError(f"what was written is not what is read back. {' '.join(warnings)}".strip())


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Let the folder exist while the block runs; remove what it made for that."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    finally:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
