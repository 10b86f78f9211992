"""Meters of what a local step takes: seconds, or joules where the machine tells."""

import time
from collections.abc import Callable
from pathlib import Path

from flower_mcepl.errors import ConfigError

SECONDS, JOULES = "seconds", "joules"
UNITS = (SECONDS, JOULES)
POWERCAP = Path("/sys/class/powercap")

Meter = Callable[[], float]
"""Reading of a counter that never falls; a step took the difference of two."""


def find_meter(unit: str, *, powercap: Path = POWERCAP) -> Meter:
    """Meter of a unit on this machine.

    Joules are those of the processors' packages (RAPL), whatever runs on them.

    Raises
    ------
    ConfigError
        If the machine has no such counter that this user may read.
    """
    return time.perf_counter if unit == SECONDS else _energy(powercap)


def _energy(powercap: Path) -> Meter:
    packages = sorted(powercap.glob("intel-rapl:[0-9]*"))
    packages = [package for package in packages if package.name.count(":") == 1]
    try:
        ranges = [_microjoules(package, "max_energy_range_uj") for package in packages]
        before = [_microjoules(package, "energy_uj") for package in packages]
    except (OSError, ValueError) as error:
        raise ConfigError(_missing(powercap, str(error))) from error
    if not packages:
        raise ConfigError(_missing(powercap, "there are none"))
    total = 0

    def read() -> float:
        nonlocal total
        for place, package in enumerate(packages):
            now = _microjoules(package, "energy_uj")
            total += now - before[place] + (ranges[place] if now < before[place] else 0)
            before[place] = now
        return total / 1e6

    return read


def _microjoules(package: Path, name: str) -> int:
    return int((package / name).read_text(encoding="ascii"))


def _missing(powercap: Path, why: str) -> str:
    return (
        "step-budget-unit joules needs energy counters that this user may read, "
        f"{powercap}/intel-rapl:*/energy_uj ({why}). Set it to seconds."
    )
