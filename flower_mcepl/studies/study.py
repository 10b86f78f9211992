"""Studies: one Flower app, many run configs, all of them checked before the first run.

What the checks need of agents and runs loads torch, so it is imported as they begin.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.config.checks import closest
from flower_mcepl.errors import ConfigError, FlowerMceplError
from flower_mcepl.launch.plan import format_run_config
from flower_mcepl.launch.restarts import RESUME
from flower_mcepl.record.metric import MainMetric
from flower_mcepl.record.pools import varied
from flower_mcepl.studies.flower_app import (
    FLOWER,
    FlowerApp,
    read_app,
    refuse_export,
    refuse_resume,
    refuse_schedule,
)
from flower_mcepl.studies.study_file import Combination, StudyFile

OWN_KEY = "record-dir"  # the study says where the records go
_PART, _SLUG = 40, 120  # most characters of one value, most bytes of all, in a folder's name


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    # folder of its record: what is particular about it, and the digest's first
    # characters
    slug: str
    label: str | None
    settings: dict[str, Any]  # run-config keys that the study sets
    config: dict[str, Any]  # the whole run config, the app's defaults included; without OWN_KEY
    digest: str  # of the app's name and the whole config


@dataclass(frozen=True)
class Study:
    """A study whose every run is known to be possible."""

    file: Path
    name: str
    app: FlowerApp
    engine: str  # one of ENGINES
    out: Path  # folder of the records
    target: float | None  # accuracy for the tables' column of bytes
    varied: tuple[str, ...]  # keys whose value is not the same in all runs
    runs: tuple[PlannedRun, ...]


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study file and check every one of its runs.

    ``overrides`` are run-config keys for every run; they win over those of
    ``[config]``.

    Raises
    ------
    ConfigError
        If anything in it is unknown, impossible or of the wrong type; the message names
        file and line.
    """
    from flower_mcepl.studies.engines import ENGINES

    file = StudyFile.read(path, overrides)
    name, engine = file.data.get("name", path.stem), file.data.get("engine", FLOWER)
    if engine not in ENGINES:
        raise file.error(
            ("engine",), f"engine must be one of {', '.join(ENGINES)}; got {engine!r}."
        )
    if not name.strip():
        raise file.error(("name",), f"name must say something; got {name!r}.")
    try:
        app = read_app((path.parent / file.data["app"]).resolve())
    except ConfigError as error:
        raise file.error(("app",), str(error)) from None
    combinations = file.combinations()
    for combination in combinations:
        _check(file, app, combination, engine)
    configs = [_whole(app, combination.settings) for combination in combinations]
    _refuse_duplicates(file, combinations, configs)
    target = file.data.get("target")
    _check_target(file, target, configs)
    keys = varied(configs)
    runs = [_plan(app, *pair, keys) for pair in zip(combinations, configs, strict=True)]
    out = Path(file.data.get("out", Path("studies") / _folder_name(name)))
    return Study(path, name, app, engine, out.absolute(), target, keys, tuple(runs))


def _check_target(
    file: StudyFile, target: float | None, configs: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a target that no run can reach: most main metrics are in 0..1."""
    from flower_mcepl.agents.tasks.task import find_task

    if target is None:
        return
    tasks = {str(config.get("task", "classification")) for config in configs}
    for task in map(find_task, sorted(tasks)):
        metric = MainMetric(task.main, task.higher_is_better, task.unit)
        if (problem := metric.target_problem(target)) is not None:
            raise file.error(("target",), problem)


def _whole(app: FlowerApp, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**app.config, **settings}.items() if key != OWN_KEY}


def _plan(
    app: FlowerApp, combination: Combination, config: dict[str, Any], keys: Sequence[str]
) -> PlannedRun:
    text = json.dumps({"app": app.name, "config": config}, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    parts = [] if combination.label is None else [_folder_name(combination.label)]
    parts += [_part(key, config[key]) for key in keys if key not in combination.fixed]
    slug = "_".join([*(parts or ["run"]), digest[:8]])
    if len(slug.encode()) > _SLUG:
        slug = f"{slug.encode()[: _SLUG - 9].decode(errors='ignore')}_{digest[:8]}"
    return PlannedRun(slug, combination.label, combination.settings, config, digest)


def _part(key: str, value: Any) -> str:
    words = _folder_name(str(value))[:_PART]
    return words if isinstance(value, str) and words[:1].isalpha() else f"{key}-{words}"


def _folder_name(text: str) -> str:
    """A text as it may stand in the name of a folder."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "-"


# --- what can be wrong ---


def _check(file: StudyFile, app: FlowerApp, combination: Combination, engine: str) -> None:
    for key, value in combination.settings.items():
        place = combination.places[key]
        if key == OWN_KEY:
            raise file.error(
                place, f"a study sets {OWN_KEY} itself, below its folder. Say `out` instead."
            )
        if key not in app.config:
            raise file.error(
                place,
                f"{key!r} is not in the app's config, and Flower takes no other keys. "
                f"{closest(key, app.config)} Or add it to [tool.flwr.app.config] in "
                f"{app.folder / 'pyproject.toml'}.",
            )
        if (problem := _wrong_type(key, value, app.config[key])) is not None:
            raise file.error(place, problem)
        if engine == FLOWER:
            try:
                format_run_config({key: value})
            except ConfigError as error:
                raise file.error(place, str(error)) from None
    problem = _problem(app, combination.settings)
    if problem is not None:
        raise _explain(file, app, combination, problem)
    rules: dict[str, Callable[[Mapping[str, Any]], None]] = {RESUME: refuse_resume}
    if engine != FLOWER:
        rules |= {"export": refuse_export, "schedule": refuse_schedule}
    for key, refuse in rules.items():
        try:
            refuse({**app.config, **combination.settings})
        except ConfigError as error:
            place = combination.places.get(key, combination.origin)
            raise file.error(place, str(error)) from None


def _wrong_type(key: str, value: Any, default: Any) -> str | None:
    """Fault in the type of a key that only the app reads: its default has the type."""
    from flower_mcepl.agents.registry import algorithm_keys
    from flower_mcepl.config.fields import field_keys
    from flower_mcepl.runs.settings import DeviceSettings, RunSettings

    if key in field_keys(RunSettings, DeviceSettings) | algorithm_keys():
        return None  # their readers know better: a ratio may be a number or a text
    if type(value) is type(default) or (type(value) is int and isinstance(default, float)):
        return None
    kind = type(default).__name__
    return f"{key} must be {kind}, as in the app's config ({default!r}); got {value!r}."


def _problem(app: FlowerApp, settings: Mapping[str, Any]) -> str | None:
    """Reason why a run with these settings is impossible."""
    from flower_mcepl.runs.settings import RunSettings

    try:
        RunSettings.from_run_config(_whole(app, settings), app_keys=app.config)
    except (FlowerMceplError, OSError) as error:
        return str(error)
    return None


def _explain(
    file: StudyFile, app: FlowerApp, combination: Combination, problem: str
) -> ConfigError:
    """Error at the line of the key at fault: without it, the run would be possible."""
    settings = combination.settings
    guilty = [
        key
        for key in combination.places
        if _problem(app, {k: v for k, v in settings.items() if k != key}) is None
    ]
    if not guilty:
        guilty = [
            key
            for key in combination.places
            if re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", problem)
        ]
    if not guilty:
        return file.error(
            combination.origin,
            f"{problem} (with the other settings of {app.folder / 'pyproject.toml'})",
        )
    first, *others = guilty
    also = [
        f"{key} = {settings[key]!r} on line {file.line(combination.places[key])}" for key in others
    ]
    beside = f" (beside {', '.join(also)})" if also else ""
    return file.error(
        combination.places[first], f"{first} = {settings[first]!r}{beside}: {problem}"
    )


def _refuse_duplicates(
    file: StudyFile, combinations: Sequence[Combination], configs: Sequence[Mapping[str, Any]]
) -> None:
    seen: dict[frozenset[Any], Combination] = {}
    for combination, config in zip(combinations, configs, strict=True):
        key = frozenset((name, type(value), value) for name, value in config.items())
        if key in seen:
            settings = ", ".join(f"{k} = {value!r}" for k, value in combination.settings.items())
            raise file.error(
                combination.origin,
                f"this asks for a run that the table on line {file.line(seen[key].origin)} asks "
                f"for, too: {settings}. Leave one out.",
            )
        seen[key] = combination
