"""Values of a run record: standard JSON, times, versions, byte counts for a person."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from flower_mcepl.errors import RecordError


def human_bytes(count: float | None) -> str:
    """Bytes in decimal units: ``1_234_567`` is ``"1.23 MB"``, None is ``"-"``."""
    if count is None:
        return "-"
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if abs(count) < 999.5:  # three digits would round more than this up to 1000
            return f"{count:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:.0f} PB"


_PACKAGES = (
    *("flower-mcepl", "torch", "numpy", "networkx", "safetensors", "flwr", "ray"),
    # where they are installed, they may draw the data
    *("torchvision", "flwr-datasets", "datasets", "scikit-learn"),
)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON of a record's value; a number that is not finite is ``null``."""
    return json.dumps(_jsonable(value), allow_nan=False, indent=indent)


def _jsonable(value: Any) -> Any:
    """The value in the types of standard JSON."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _jsonable(asdict(value))
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays, tensors
        return _jsonable(value.tolist())
    raise RecordError(f"a run record holds JSON values; got {type(value).__name__}: {value!r:.60}.")


def utc_now() -> str:
    """Time of now as records have it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that matter to a run."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
