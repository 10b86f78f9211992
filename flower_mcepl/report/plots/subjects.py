"""Subjects of the pictures: the records of each combination of settings, labeled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flower_mcepl.record.pools import LABEL, RUN, Pool, pool
from flower_mcepl.record.reading import Run

_SAY_ALONE = (LABEL, RUN, "algorithm", "app")  # keys whose values speak for themselves

_LONGEST = 90  # characters of a label


@dataclass(frozen=True)
class Subject:
    """One line of a picture: the runs of one combination of settings."""

    label: str
    runs: tuple[Run, ...]  # one a seed

    @property
    def run(self) -> Run:
        """The run of the first seed, for what is drawn of one run alone."""
        return self.runs[0]


def subjects_of(runs: Sequence[Run]) -> tuple[list[Subject], tuple[str, ...]]:
    """Group runs by their settings; also what was left out, and why.

    One record alone is taken as it is, of several only those that are finished. A label
    is what the study calls the runs, where it calls all combinations by different
    names; else it names the settings that are not the same everywhere, or, where these
    are too many, the folder of the first run.

    Raises
    ------
    ConfigError
        If there are several records, and none is finished.
    """
    if len(runs) == 1:
        damage = runs[0].damage
        notes = (f"WARNING: {runs[0].path.name}: {damage}",) if damage else ()
        return [Subject(runs[0].name, tuple(runs))], notes
    pooled = pool(runs)
    labels = [
        str(one.settings[LABEL]) for one in pooled.pools if one.settings.get(LABEL) is not None
    ]
    if len(set(labels)) < len(pooled.pools):
        labels = [_label(one) for one in pooled.pools]
    if max(map(len, labels)) > _LONGEST or len(set(labels)) < len(labels):
        labels = [one.runs[0].path.name for one in pooled.pools]
    return [
        Subject(label, one.runs) for label, one in zip(labels, pooled.pools, strict=True)
    ], pooled.notes


def settings_label(settings: Mapping[str, Any]) -> str:
    """Settings as a picture names them; those that are not given are left out."""
    return ", ".join(_part(key, value) for key, value in settings.items() if value is not None)


def _label(one: Pool) -> str:
    return settings_label(one.settings) or one.runs[0].name


def _part(key: str, value: Any) -> str:
    text = f'"{value}"' if "," in str(value) else str(value)
    return text if key in _SAY_ALONE else f"{key} {text}"
