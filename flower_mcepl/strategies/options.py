"""From the run config to a strategy's arguments."""

from collections.abc import Mapping
from typing import Any

from flower_mcepl.runs.settings import RunSettings


def common_settings(
    settings: RunSettings, run_config: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Return what the run config says to every strategy, as arguments."""
    return {
        "evaluate_every": settings.evaluate_every,
        "min_agents": settings.min_agents,
        "wait_timeout": settings.wait_timeout,
        "timeout_factor": settings.timeout_factor,
        "checkpoint_every": settings.checkpoint_every,
        "resume": settings.resume or None,
        "record": settings.record_dir,
        "name": name,
        "keep_frames": settings.keep_frames,
        "config": {"run_config": dict(run_config), "seed": settings.seed},
    }
