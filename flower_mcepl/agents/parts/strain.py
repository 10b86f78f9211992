"""Strain of a device: what it is short of, as psutil tells."""

import importlib
from collections.abc import Iterator
from typing import Any

from flower_mcepl.agents.parts.notices import warn_once
from flower_mcepl.agents.parts.pace import BATTERY, MEMORY, TEMPERATURE

LEAST_MEMORY = 0.05  # share of the memory that is available
LEAST_CHARGE = 20.0  # percent of a battery that is not being charged


def find_strain(psutil: Any = None) -> str:
    """What this device is short of, or too hot; empty: nothing that it can tell.

    Parameters
    ----------
    psutil : module, optional
        In place of the package psutil. Without it, and where a sensor is missing, the
        log says so once.
    """
    if psutil is None:
        try:
            psutil = importlib.import_module("psutil")
        except ImportError:
            warn_once(
                "psutil is not installed, so filters = auto goes by step times alone, without "
                'memory, battery and temperature (pip install "flower-mcepl[sensors]")'
            )
            return ""
    return next(_strains(psutil), "")


def _strains(psutil: Any) -> Iterator[str]:
    memory = psutil.virtual_memory()
    if memory.available < LEAST_MEMORY * memory.total:
        yield MEMORY
    battery = _read(psutil, "sensors_battery")
    if battery is not None and not battery.power_plugged and battery.percent < LEAST_CHARGE:
        yield BATTERY
    sensors = (_read(psutil, "sensors_temperatures") or {}).values()
    if any(s.high and s.current >= s.high for group in sensors for s in group):
        yield TEMPERATURE


def _read(psutil: Any, sensor: str) -> Any:
    """What a sensor says; None where there is none, or it cannot be read."""
    try:
        value = getattr(psutil, sensor)()
    except (AttributeError, OSError, RuntimeError):
        value = None
    if not value:
        warn_once(f"this machine has no {sensor}: filters = auto goes without")
    return value or None
