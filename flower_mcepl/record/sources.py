"""Run records that belong together, and the study that they are of."""

from dataclasses import dataclass
from pathlib import Path

from flower_mcepl.record.reading import Run


@dataclass(frozen=True)
class Source:
    """Run records, and what is known of the study that they belong to."""

    name: str
    folder: Path  # where what is made of them belongs
    runs: tuple[Run, ...]
    study: str | None = None  # the text of the study file
    target: float | None = None  # the study's target accuracy
    notes: tuple[str, ...] = ()  # which records were left out, and why
