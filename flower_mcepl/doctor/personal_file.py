"""Check of what an agent's personal model will be: its masks, and its file's size."""

from collections.abc import Mapping
from typing import Any

from flower_mcepl.agents import Agent
from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.errors import first_line
from flower_mcepl.record.values import human_bytes


def check_personal_model(agent: Agent, handshake: Mapping[str, Any]) -> Finding:
    """Finding on retention, share of filters and size of the ``.mask`` file.

    The agent must be untrained; it stays as it is.
    """
    from flower_mcepl.personal.sizing import expected_size

    with Examination("personal-model", remedy="") as check:
        parts: list[str] = []
        values: dict[str, Any] = {}
        try:
            expected = expected_size(agent)
            parts.append(f"a .mask file of {human_bytes(expected.nbytes)} ({expected.how})")
            values |= {"file_bytes": expected.nbytes, "file_bytes_are": expected.how}
        except Exception as error:  # whatever a network does; a run goes without the file
            parts.append(f"no .mask file can be made of it: {first_line(str(error))}")
        shares = _shares(agent)
        if shares:
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            parts.insert(0, f"filters that stay in the end: {listed}")
            values["filters"] = shares
        if "retention" in handshake:
            parts.insert(0, f"retention {handshake['retention']}")
            values["retention"] = handshake["retention"]
        check.ok("; ".join(parts), **values)
    return check.finding


def _shares(agent: Agent) -> dict[str, float]:
    """Share ρ of each layer that has gates."""
    rules = getattr(getattr(agent, "model", None), "rules", None)
    return dict(getattr(rules, "filters", {}))
