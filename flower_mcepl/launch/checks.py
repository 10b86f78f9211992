"""Checks before anything starts: one clear line now, no traceback a minute later."""

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError, LaunchError
from flower_mcepl.files.room import refuse_unusable
from flower_mcepl.launch.plan import Plan, app_settings, flat, parse_run_config

# an app whose run config has all of these reads it by `RunSettings`
_OWN_KEYS = frozenset({"algorithm", "num-agents", "num-rounds", "topology", "record-dir"})
_LONGEST = 120.0  # seconds


def check_plan(plan: Plan) -> None:
    """Check the run config of a plan, and the folder of its records.

    Raises
    ------
    ConfigError
        If a key is none of the app's, or a value is none that the run takes.
    LaunchError
        If the folder of the run records cannot be written, or is full.
    """
    own = flat(app_settings(plan.app).get("config", {}))
    overrides = flat(parse_run_config(plan.run_config))
    refuse_unknown(overrides, own, app=plan.app)
    config = {**own, **overrides}
    if own.keys() >= _OWN_KEYS:
        refuse_unwritable(Path(str(config["record-dir"])), "record-dir")
        check_settings(config, own)


def refuse_unknown(overrides: Mapping[str, Any], own: Mapping[str, Any], *, app: Path) -> None:
    """Raise ConfigError for a key that the app has not: Flower would, but later."""
    for key in overrides:
        if key not in own:
            near = difflib.get_close_matches(key, own, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Its keys: {', '.join(sorted(own))}."
            raise ConfigError(
                f"Flower takes no run-config key that {app / 'pyproject.toml'} does not have; got "
                f"{key!r}. {hint}"
            )


def refuse_unwritable(folder: Path, what: str) -> None:
    """Raise LaunchError for a folder that cannot be made or written, or has no room."""
    refuse_unusable(folder, what, error=LaunchError)


def check_settings(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that the run's settings refuse.

    Another process looks: this one stays free of torch.
    """
    asked = json.dumps({"config": dict(config), "app_keys": list(own)}, default=str)
    answer = subprocess.run(
        [sys.executable, "-m", "flower_mcepl.runs.check"],
        input=asked,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=_LONGEST,
        check=False,
    )
    if answer.returncode == 1 and answer.stdout:
        raise ConfigError(answer.stdout.partition(": ")[2])
