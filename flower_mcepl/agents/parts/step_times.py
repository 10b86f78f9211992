"""Cost of a step on a device, measured once for a network and kept on its disk."""

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flower_mcepl.agents.parts.learner import Learner
from flower_mcepl.agents.parts.meters import Meter
from flower_mcepl.agents.parts.notices import warn_once
from flower_mcepl.agents.parts.training import gradients_of
from flower_mcepl.data.batches import BatchSource
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.files.user_folders import user_folder
from flower_mcepl.masks.model import MaskedModel

REPEATS, MOST_SECONDS = 5, 10.0
VERSION = 1  # raise it when what is measured changes


def cache_folder() -> Path:
    """Where measured times lie; it may be emptied at any time.

    Raises
    ------
    OSError
        If this user has no home folder.
    """
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "flower-mcepl" / "step-times"
    except RuntimeError as error:
        raise OSError("this user has no home folder") from error


def machine() -> dict[str, Any]:
    """What the time of a step depends on, besides the network and its settings."""
    return {
        "version": VERSION,
        "machine": f"{platform.node()} {platform.machine()} {platform.processor()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cached_cost(settings: Mapping[str, Any], measure: Callable[[], float]) -> float:
    """What ``measure`` gives, from disk if it was measured before.

    A file that is damaged is measured anew; where none can be written, the log says so.

    Parameters
    ----------
    settings : mapping
        What the time depends on, JSON-able, besides the `machine`.
    measure : callable
        Measures; called only where there is no file.
    """
    name = json.dumps({**settings, **machine()}, sort_keys=True)
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    spent: float | None = None
    try:
        path = cache_folder() / f"{digest}.json"
        spent = _read(path, name)
        if spent is None:
            spent = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"of": name, "spent": spent}).encode())
    except OSError as error:
        warn_once(f"step times are not kept, so each process measures anew: {error}")
    return measure() if spent is None else spent


class PacedConfig(Protocol):
    """Settings that the cost of a step and its budget are read from."""

    @property
    def filters_layers(self) -> str:
        """Shares of single layers."""
        ...

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        ...

    @property
    def arithmetic(self) -> str:
        """Class of arithmetic."""
        ...

    @property
    def step_budget(self) -> float:
        """What a step may take."""
        ...

    @property
    def step_budget_unit(self) -> str:
        """Unit of what is measured."""
        ...


def facts_of(model: MaskedModel, config: PacedConfig) -> dict[str, Any]:
    """What the time of a step of a masked model depends on, besides the machine."""
    return {
        "network": type(model.module).__qualname__,
        "layers": {name: list(spec.shape) for name, spec in model.layers.items()},
        "retention": dict(model.retention),
        "filters-layers": config.filters_layers,
        "batch-size": config.batch_size,
        "arithmetic": config.arithmetic,
        "unit": config.step_budget_unit,
    }


def step_cost(
    network: Callable[..., Any],
    model: MaskedModel,
    learner: Learner,
    split: BatchSource,
    *,
    meter: Meter,
) -> float:
    """What the gradients of one training batch take: the median of five, in 10 s.

    ``network`` is what is called: the model, or a compact one of it.
    """

    def measure(inputs: Any, labels: Tensor) -> float:
        spent: list[float] = []
        end = time.perf_counter() + MOST_SECONDS
        while len(spent) < 2 or (len(spent) <= REPEATS and time.perf_counter() < end):
            start = meter()
            gradients_of(learner.loss(network, inputs, labels), model.scores)
            spent.append(meter() - start)
        return statistics.median(spent[1:])  # the first one allocates

    return learner.on_one_batch(split, model.module, measure)


def _read(path: Path, name: str) -> float | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    spent = kept.get("spent") if isinstance(kept, dict) and kept.get("of") == name else None
    fits = isinstance(spent, float) and math.isfinite(spent) and spent > 0
    return spent if fits else None
