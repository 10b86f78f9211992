"""Plan of a run: the app, its nodes, and the settings that ``flwr run`` takes."""

import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.errors import ConfigError, LaunchError

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # how flwr 1.41 reads --run-config


@dataclass(frozen=True)
class Plan:
    """One run that Flower has not seen yet."""

    app: Path
    num_supernodes: int
    run_config: list[str]  # one entry for each --run-config
    federation_config: str


def plan_run(
    app: Path,
    *,
    run_config: Mapping[str, object] | Sequence[str] = (),
    num_supernodes: int | None = None,
    federation_config: str = "",
) -> Plan:
    """Check what can be checked before anything starts; see ``run_app``."""
    refuse_windows()
    refuse_shadowed(app, Path.cwd())
    overrides = format_run_config(run_config)
    nodes = num_nodes(app, overrides) if num_supernodes is None else num_supernodes
    return Plan(app, nodes, overrides, federation_line(nodes, federation_config))


def format_run_config(run_config: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Values of ``--run-config``, one for each key; strings pass as they are."""
    if isinstance(run_config, str):
        return [run_config]
    if not isinstance(run_config, Mapping):
        return [entry for entry in run_config if entry.strip()]
    return [f"{key}={_toml_value(key, value)}" for key, value in run_config.items()]


def parse_run_config(entries: Sequence[str]) -> dict[str, Any]:
    """Settings in values of ``--run-config``, read as Flower reads them.

    Each is ``key=value ...`` or the path of a TOML file.

    Raises
    ------
    ConfigError
        If one is neither.
    """
    settings: dict[str, Any] = {}
    for entry in entries:
        if entry.strip().endswith(".toml"):
            settings |= _read_toml(Path(entry.strip()).expanduser())
            continue
        pairs = _PAIR.findall(entry)
        try:
            if not pairs or _PAIR.sub("", entry).strip():
                raise ValueError("it is no list of key=value")
            settings |= {key: tomllib.loads(f"value = {value}")["value"] for key, value in pairs}
        except ValueError as error:
            raise ConfigError(
                "a run config is 'key=value key=\"text\" ...' or the path of a TOML file; got "
                f"{entry!r}: {error}."
            ) from None
    return settings


def _toml_value(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and "\n" not in text:
            if "'" not in text:
                return f"'{text}'"
            if '"' not in text and "\\" not in text:
                return f'"{text}"'
    raise ConfigError(
        "a run-config value must be a bool, int, float, or a one-line str with one kind of quote "
        f"at most; `{key}` is {value!r}. Put other values into a TOML file and pass its path."
    )


def num_nodes(app: Path, run_config: Sequence[str]) -> int:
    """Number of nodes: ``num-agents`` over ``agents-per-node``, overrides first."""
    agents = _number("num-agents", None, app, run_config)
    return -(-agents // max(1, _number("agents-per-node", 1, app, run_config)))


def _number(key: str, default: int | None, app: Path, run_config: Sequence[str]) -> int:
    own = app_settings(app).get("config", {}).get(key, default)
    number: object = parse_run_config(run_config).get(key, own)
    try:
        return int(str(number))
    except ValueError:
        problem = "has no" if number is None else f"has {number!r} as its"
        raise ConfigError(
            f"the number of SuperNodes must be known; {app} {problem} `{key}` in "
            "[tool.flwr.app.config]. Say it with --num-supernodes."
        ) from None


def federation_line(num_supernodes: int, more: str = "") -> str:
    """Value of ``--federation-config``, with one CPU per client by default."""
    if num_supernodes < 1:
        raise ConfigError(f"a run needs at least one SuperNode; got {num_supernodes}.")
    given = dict(_PAIR.findall(more))
    if "num-supernodes" in given:
        raise ConfigError("num-supernodes is said twice; take it out of the federation config.")
    cpus = "" if "client-resources-num-cpus" in given else " client-resources-num-cpus=1"
    return f"num-supernodes={num_supernodes}{cpus} {more}".rstrip()


def refuse_windows() -> None:
    """Raise LaunchError on Windows, where Ray's processes cannot be ended for sure.

    Flower itself calls its simulation experimental there.
    """
    if sys.platform == "win32":
        raise LaunchError(
            "a private SuperLink needs Linux or macOS, as Flower's simulation is experimental on "
            'Windows. Run a study with engine = "in-process" (the same bits), or use WSL2.'
        )


def refuse_shadowed(app: Path, cwd: Path) -> None:
    """Raise when the current folder holds a foreign package of the app's name.

    Ray's workers search the current folder before the app, so the clients would
    silently run foreign code.
    """
    for reference in app_settings(app).get("components", {}).values():
        package = str(reference).partition(":")[0].partition(".")[0]
        for module in (cwd / package / "__init__.py", cwd / f"{package}.py"):
            if package and module.is_file() and not module.resolve().is_relative_to(app.resolve()):
                raise ConfigError(
                    f"the app's package `{package}` must not exist in the current folder too, "
                    f"because Ray would import that one; found {module}. Start from another folder "
                    "or rename the package."
                )


def app_settings(app: Path) -> dict[str, Any]:
    """Return ``[tool.flwr.app]`` of the app's ``pyproject.toml``."""
    try:
        settings = _read_toml(app / "pyproject.toml")["tool"]["flwr"]["app"]
    except KeyError:
        raise ConfigError(
            f"a Flower app has [tool.flwr.app] in its pyproject.toml; {app} has none."
        ) from None
    return dict(settings)


def flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Table without inner ones: ``{"dsgd": {"lr": 1}}`` becomes ``{"dsgd.lr": 1}``."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            entries |= {f"{key}.{inner}": item for inner, item in flat(value).items()}
        else:
            entries[key] = value
    return entries


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} must be a readable TOML file: {error}. Look at path and content."
        ) from error
