"""The numbers behind the picture of who holds what: each agent's examples by class, from the agents' handshakes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# as in handshakes; as we say
SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_TOLD = re.compile(r"(-?\d{1,18}:\d{1,18}( -?\d{1,18}:\d{1,18})*)?")


@dataclass(frozen=True)
class Holdings:
    """Numbers of examples, agents by classes."""

    agents: tuple[int, ...]  # that tell them
    classes: tuple[int, ...]  # that any of these holds in any split
    # by split: a row for each agent, a number for each class
    counts: dict[str, tuple[tuple[int, ...], ...]]
    silent: tuple[int, ...]  # agents that tell nothing

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows of a table: a row for each agent, a column for each class, then the sums."""
        titles = ["agent", *(str(name) for name in self.classes), "all"]
        rows = []
        for place, agent in enumerate(self.agents):
            own = [counts[place] for counts in self.counts.values()]
            rows.append(
                [
                    str(agent),
                    *map(_cell, zip(*own, strict=True)),
                    _cell([sum(counts) for counts in own]),
                ]
            )
        return titles, rows

    def legend(self) -> str:
        """Say what the numbers of the table are."""
        told = " / ".join(SPLITS[split] for split in self.counts)
        silent = f"; agents {', '.join(map(str, self.silent))} do not tell" if self.silent else ""
        return f"{told} examples of each class{silent}"


def holdings_of(entries: Iterable[Mapping[str, Any]]) -> Holdings | None:
    """Read who holds what from handshakes, such as a record's ``agents``; None where no agent tells."""
    told: dict[int, dict[str, dict[int, int]]] = {}
    for entry in entries:
        # kebab-case, but in records
        facts = {key.replace("_", "-"): str(value) for key, value in entry.items()}
        texts = {split: facts.get(f"{split}-counts") for split in SPLITS}
        if "agent" in entry:
            told[int(entry["agent"])] = {
                split: _read(text)
                for split, text in texts.items()
                if text is not None and _TOLD.fullmatch(text)
            }
    agents = tuple(sorted(agent for agent, splits in told.items() if splits))
    classes = sorted(
        {name for agent in agents for counts in told[agent].values() for name in counts}
    )
    if not classes:
        return None
    counts = {
        split: tuple(
            tuple(told[agent].get(split, {}).get(name, 0) for name in classes) for agent in agents
        )
        for split in SPLITS
        if any(split in told[agent] for agent in agents)
    }
    return Holdings(agents, tuple(classes), counts, tuple(sorted(set(told) - set(agents))))


def _read(text: str) -> dict[int, int]:
    pairs = (pair.split(":") for pair in text.split())
    return {int(name): int(count) for name, count in pairs}


def _cell(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts)) if any(counts) else ""
