"""A study file as it was read: TOML whose every complaint names file and line."""

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_mcepl.config.checks import closest
from flower_mcepl.errors import ConfigError
from flower_mcepl.studies.lines import Place, key_lines, line_of_error

TYPES = {
    "name": str,
    "app": str,
    "engine": str,
    "out": str,
    "target": float,
    "config": dict,
    "grid": dict,
    "runs": list,
}
SCALARS = (bool, int, float, str)  # what a run config holds in Flower
# first part of the places of settings that do not stand in the file
COMMAND_LINE = "--run-config"


@dataclass(frozen=True)
class Combination:
    """What a study sets for one run, and where it says so."""

    settings: dict[str, Any]  # run-config keys
    places: dict[str, Place]  # of each of these keys
    origin: Place  # the table that asks for this run
    label: str | None = None
    fixed: frozenset[str] = frozenset()  # keys that the label stands for


@dataclass(frozen=True)
class StudyFile:
    """The tables of a study file, and the lines on which their keys stand."""

    path: Path
    data: dict[str, Any]
    lines: dict[Place, int] = field(repr=False)
    # run-config keys for every run, before those of [config]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> "StudyFile":
        """Read a study file and check its keys and types.

        Raises
        ------
        ConfigError
            If it is no TOML, or no study.
        """
        if (path / "pyproject.toml").is_file():
            raise ConfigError(
                f"a study is a TOML file that names an app; {path} is an app. Run it once with "
                f"`python -m flower_mcepl.launch {path}`, or write a study (--help has one)."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"a study is a TOML file; {path} cannot be read: {error}.") from None
        try:
            file = cls(path, tomllib.loads(text), key_lines(text), overrides or {})
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"{path}, line {line_of_error(text, error)}: this is no TOML: {error}."
            ) from None
        file._check_top()
        return file

    def line(self, place: Place) -> int:
        """Line of a key, or of the innermost table around it that has one."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def error(self, place: Place, message: str) -> ConfigError:
        """Error that names file and line."""
        if place[:1] == (COMMAND_LINE,):
            return ConfigError(f"{COMMAND_LINE}: {message}")
        return ConfigError(f"{self.path}, line {self.line(place)}: {message}")

    def combinations(self) -> list[Combination]:
        """Settings of the study for each of its runs, in the order of the file."""
        config = self._config()
        grid, runs = self.data.get("grid"), self.data.get("runs", [])
        combinations: list[Combination] = []
        if grid or not runs:
            combinations += self._grid(config, grid or {})
        for number, table in enumerate(runs):
            combinations += self._explicit(config, ("runs", number), table)
        return combinations

    def _check_top(self) -> None:
        for key, value in self.data.items():
            kind = TYPES.get(key)
            if kind is None:
                raise self.error((key,), f"unknown key {key!r} in a study. {closest(key, TYPES)}")
            if not _is_a(value, kind):
                noun = {
                    dict: "a table",
                    list: "an array of tables ([[runs]])",
                    float: "a number",
                    str: "a string",
                }[kind]
                raise self.error((key,), f"{key} must be {noun}; got {value!r}.")
        if "app" not in self.data:
            raise self.error(
                (),
                'a study needs app = "FOLDER", a Flower app relative to the study file; it has '
                "none.",
            )
        if not all(isinstance(table, dict) for table in self.data.get("runs", [])):
            raise self.error(
                ("runs",), f"runs must be an array of tables ([[runs]]); got {self.data['runs']!r}."
            )

    def _config(self) -> Combination:
        settings, places = {}, {}
        for key, value, place in self._flat(self.data.get("config", {}), ("config",)):
            settings[key], places[key] = self._scalar(key, value, place), place
        for key, value, _ in _entries(self.overrides, "", ()):
            place = (COMMAND_LINE, key)
            settings[key], places[key] = self._scalar(key, value, place), place
        return Combination(settings, places, ("config",))

    def _grid(self, config: Combination, grid: Mapping[str, Any]) -> Iterator[Combination]:
        choices, places = {}, {}
        for key, value, place in self._flat(grid, ("grid",)):
            if key in self.overrides:
                raise self.error(
                    (COMMAND_LINE, key), f"{key} varies in this study. Change it in {self.path}."
                )
            if key in config.settings:
                also = self.line(config.places[key])
                raise self.error(
                    place,
                    f"{key} stands in [grid] and, on line {also}, in [config]. Leave one out.",
                )
            if not isinstance(value, list):
                raise self.error(
                    place,
                    f"a key of [grid] has a list of values; {key} has {value!r}. Write "
                    f"[{value!r}].",
                )
            choices[key], places[key] = self._choices(key, value, place), place
        yield from _product(config, choices, places, ("grid",))

    def _explicit(
        self, config: Combination, origin: Place, table: Mapping[str, Any]
    ) -> Iterator[Combination]:
        choices, places = {}, {}
        label = table.get("label")
        if label is not None and (not isinstance(label, str) or not label.strip()):
            raise self.error(
                (*origin, "label"), f"label must be a string that says something; got {label!r}."
            )
        fixed = set()
        for key, value, place in self._flat(
            {key: v for key, v in table.items() if key != "label"}, origin
        ):
            if key in self.overrides:
                raise self.error(
                    (COMMAND_LINE, key), f"{key} varies in this study. Change it in {self.path}."
                )
            places[key] = place
            if isinstance(value, list):
                choices[key] = self._choices(key, value, place)
            else:
                choices[key] = [self._scalar(key, value, place)]
                fixed.add(key)
        yield from _product(
            config, choices, places, origin, label=label, fixed=frozenset(fixed if label else ())
        )

    def _flat(self, table: Mapping[str, Any], place: Place) -> Iterator[tuple[str, Any, Place]]:
        """Keys of a table and of those inside it (``dsgd.lr``), values, places."""
        seen: dict[str, Place] = {}
        for key, value, where in _entries(table, "", place):
            if key in seen:
                raise self.error(
                    where, f"{key} is said twice; the other time on line {self.line(seen[key])}."
                )
            seen[key] = where
            yield key, value, where

    def _choices(self, key: str, values: list[Any], place: Place) -> list[Any]:
        if not values:
            raise self.error(place, f"the list of {key} must name at least one value; it is empty.")
        for number, value in enumerate(values):
            self._scalar(key, value, place)
            if any(type(value) is type(other) and value == other for other in values[:number]):
                raise self.error(
                    place, f"the values of {key} must differ; {value!r} is there twice."
                )
        return values

    def _scalar(self, key: str, value: Any, place: Place) -> Any:
        if not isinstance(value, SCALARS):
            raise self.error(
                place, f"a value must be a bool, int, float or str; {key} has {value!r}."
            )
        return value


def _entries(
    table: Mapping[str, Any], prefix: str, place: Place
) -> Iterator[tuple[str, Any, Place]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.", (*place, key))
        else:
            yield prefix + key, value, (*place, key)


def _product(
    config: Combination,
    choices: Mapping[str, list[Any]],
    places: Mapping[str, Place],
    origin: Place,
    *,
    label: str | None = None,
    fixed: frozenset[str] = frozenset(),
) -> Iterator[Combination]:
    # Its own keys first: an error names the first key that can mend it.
    everywhere = {
        **places,
        **{key: place for key, place in config.places.items() if key not in places},
    }
    for values in itertools.product(*choices.values()):
        settings = {**config.settings, **dict(zip(choices, values, strict=True))}
        yield Combination(settings, everywhere, origin, label, fixed)


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)
