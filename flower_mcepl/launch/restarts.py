"""Resumption of a run that lost a process of Flower's simulation, in a new one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flower_mcepl.launch.plan import Plan, app_settings, flat, format_run_config, parse_run_config

RESUME = "resume"  # run-config key: the record of a run that broke off
_CAUSE = "LostWorkerError"  # what the summary of such a run names


def plan_of_resumption(plan: Plan, record: Path | None) -> Plan | None:
    """Plan that goes on with the run of a record, or begins it anew.

    None where another attempt would end as this one did: Flower's simulation lost none
    of its processes. A run without a checkpoint begins anew, to the same bits.
    """
    if record is None or _cause(record) != _CAUSE:
        return None
    if not has_checkpoint(record):
        return plan
    if RESUME not in flat(app_settings(plan.app).get("config", {})):
        return None  # Flower takes no key that the app does not have
    return with_resume(plan, record)


def with_resume(plan: Plan, record: Path) -> Plan:
    """The same plan, which resumes the run of a record."""
    entries = plan.run_config
    if any(entry.strip().endswith(".toml") for entry in entries):
        # beside a file Flower takes no other setting
        entries = format_run_config(flat(parse_run_config(entries)))
    return replace(plan, run_config=[*entries, *format_run_config({RESUME: record})])


def has_checkpoint(record: Path) -> bool:
    """Whether there is a checkpoint that a run could go on from."""
    return any((record / "checkpoint").glob("*.checkpoint"))


def status_of(record: Path) -> str | None:
    """Status in the summary of a run; None as long as it has none."""
    status = _summary(record).get("status")
    return None if status is None else str(status)


def _cause(record: Path) -> str | None:
    error = _summary(record).get("error")
    return error.get("type") if isinstance(error, dict) else None


def _summary(record: Path) -> dict[str, Any]:
    try:
        summary = json.loads((record / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}
