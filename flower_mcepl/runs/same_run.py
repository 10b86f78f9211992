"""What a resumed run must have in common with the run that its record began as."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from flower_mcepl.agents.registry import read_config
from flower_mcepl.config.checks import check
from flower_mcepl.config.engines import LOOP
from flower_mcepl.config.fields import free_keys
from flower_mcepl.config.schedules import ASYNC
from flower_mcepl.errors import ConfigError
from flower_mcepl.record.values import to_json
from flower_mcepl.runs.introductions import as_recorded, differences, shown
from flower_mcepl.runs.settings import DeviceSettings, RunSettings

# settings that records of earlier releases do not have
_BEFORE: Mapping[str, Any] = {
    **{"keep_best": False, "patience": 0, "engine": LOOP},
    **{"age_decay": 1.0, "schedule": "rounds", "speeds": "", "replayed": "", "time_budget": 0.0},
}
# keys of config.json that may differ when a run is resumed
_FREE = frozenset({"run_config", "num_rounds", "timeout", "min_agents", "agent_cache"})


def check_same_run(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse settings that are not those of the record, unless they are free.

    Parameters
    ----------
    recorded : mapping
        Config of the record.
    now : mapping
        What `RunRecord.create` would get for the new run.

    Raises
    ------
    ConfigError
        If a setting differs, by its name and with both values.
    """
    old, new = recorded.get("run_config") or {}, now.get("run_config", {})
    if "run_config" in now:  # a run without Flower is told agents, not a run config
        for key in sorted({*old, *new} - free_keys(RunSettings, DeviceSettings)):
            _check_same(f"run-config key {key}", old.get(key), new.get(key))
    for key in sorted(now.keys() - _FREE):
        _check_same(key, recorded.get(key, _BEFORE.get(key)), json.loads(to_json(now[key])))
    before, after = int(recorded.get("num_rounds") or 0), int(now["num_rounds"])
    check(
        after == before or now.get("schedule") != ASYNC,
        f"a run of schedule {ASYNC} is resumed with as many rounds as it had, since agents that "
        f"played them all have ended; it was num-rounds = {before}",
        after,
        "Resume it with these.",
    )
    check(
        after >= before,
        f"num-rounds may grow when a run is resumed, not shrink; it was {before}",
        after,
        "Resume it with as many rounds as it had, or more.",
    )
    if "run_config" in now and old.get("num-rounds") != new.get("num-rounds"):
        _check_no_schedule_moves(old, new)


def _check_no_schedule_moves(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse more rounds where a schedule of the algorithm lasts as long as they do."""
    algorithm = str(new.get("algorithm", RunSettings.algorithm))
    before, after = (
        dataclasses.asdict(read_config(algorithm, config, agent=0)) for config in (old, new)
    )
    for name, value in before.items():
        if value != after[name]:
            key = name.replace("_", "-")
            raise ConfigError(
                f"with num-rounds = {new['num-rounds']} in place of {old['num-rounds']}, {key} "
                f"would change from {value} to {after[name]}, and what was learned so far would "
                f"be of another run. Resume it with num-rounds = {old['num-rounds']}."
            )


def check_same_agents(recorded: Mapping[str, Any], now: Iterable[Mapping[str, Any]]) -> None:
    """Refuse agents whose parameters or data are not those of the record.

    Parameters
    ----------
    recorded : mapping
        Config of the record.
    now : iterable of mapping
        Introductions of the agents, as `introduction` gives them.

    Raises
    ------
    ConfigError
        If one differs, by its name and with both values.
    """
    before = {facts.get("agent"): facts for facts in recorded.get("agents") or []}
    for introduced in now:
        row = as_recorded(introduced)
        for name, was, has in differences(before.get(row["agent"], row), row):
            _check_same(f"{name} of agent {row['agent']}", was, has)


def _check_same(what: str, old: Any, new: Any) -> None:
    if old != new:
        raise ConfigError(
            f"a run is resumed with the settings it began with; {what} was {shown(old)} and is "
            f"now {shown(new)}. Resume it as it was, or start a new run (without resume)."
        )
