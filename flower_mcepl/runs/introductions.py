"""What the agents of a run say of themselves, and what of it changes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, final

from flower_mcepl.agents.agent import CLASS_FACTS, DATA_FACTS
from flower_mcepl.agents.handshake import PARAMETERS
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.record.layout import Row
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import to_json

_LISTED = 5  # differences of an agent that are listed
Difference = tuple[str, Any, Any]
"""Name of a setting, its value before, and now."""


def as_recorded(facts: Mapping[str, Any]) -> Row:
    """Introduction of an agent as the record has it, in snake_case."""
    row: Row = json.loads(to_json({key.replace("-", "_"): fact for key, fact in facts.items()}))
    return row


def differences(before: Row, now: Row) -> Iterator[Difference]:
    """Parameters and numbers of examples in which two introductions differ.

    Classes are compared where both tell them. Both are `as_recorded`.
    """
    yield from parameter_differences(before.get(PARAMETERS) or {}, now.get(PARAMETERS) or {})
    for key in DATA_FACTS:
        was, has = (facts.get(key.replace("-", "_")) for facts in (before, now))
        secret = key in CLASS_FACTS and (was is None or has is None)
        if was != has and not secret:
            yield key, was, has


# What a later release adds, or an earlier one had, is not compared, so that records of
# other releases can still be used.
def parameter_differences(before: Row, now: Row) -> Iterator[Difference]:
    """Parameters that both of two agents have, and that differ, in JSON's types."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield name.replace("_", "-"), before[name], now[name]


def shown(value: Any) -> str:
    """A value in an error or in the log, of at most 100 characters."""
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@final
class Introductions:
    """Introductions of a run's agents so far, each agent's newest."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def rows(self) -> list[Row]:
        """Return them as the record has them, by agent."""
        return [self._rows[agent] for agent in sorted(self._rows)]

    def restore(self, run: Run) -> None:
        """Know the agents of a record."""
        entries = run.config.get("agents") or []
        self._rows = {row["agent"]: row for row in entries if row.get("agent") is not None}

    def take(self, answers: Mapping[int, Answer[FrameT]]) -> dict[int, str]:
        """Take note of the introductions in a round's answers.

        Return by agent what is new: the settings and data that are no longer those of
        its last introduction, or "" where there is nothing to say of them.
        """
        introduced = {
            agent: as_recorded(answer.facts)
            for agent, answer in answers.items()
            if answer.introduces or agent not in self._rows
        }
        new = {agent: row for agent, row in introduced.items() if row != self._rows.get(agent)}
        changes = {agent: _changes(self._rows.get(agent, row), row) for agent, row in new.items()}
        self._rows.update(new)
        return changes


def _changes(before: Row, now: Row) -> str:
    texts = [
        f"{name} was {shown(was)}, now {shown(has)}" for name, was, has in differences(before, now)
    ]
    more = [f"and {len(texts) - _LISTED} more"] if len(texts) > _LISTED else []
    return "; ".join([*texts[:_LISTED], *more])
