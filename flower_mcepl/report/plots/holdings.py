"""Numbers of examples by agent, class and split, from the agents' handshakes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# as in handshakes; as we say
SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_COUNTS = re.compile(r"(-?[0-9]{1,18}:[0-9]{1,12}( -?[0-9]{1,18}:[0-9]{1,12})*)?")


@dataclass(frozen=True)
class Holdings:
    """Numbers of examples, agents by classes."""

    agents: tuple[int, ...]  # that tell them
    classes: tuple[int, ...]  # that any of these holds in any split
    # by split: a row for each agent, a number for each class
    counts: dict[str, tuple[tuple[int, ...], ...]]
    silent: tuple[int, ...]  # agents that tell nothing

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and rows of a table: rows are agents, columns classes and sums."""
        titles = ["agent", *(str(name) for name in self.classes), "all"]
        by_agent = zip(self.agents, zip(*self.counts.values(), strict=True), strict=True)
        return titles, [
            [str(agent), *map(_cell, zip(*own, strict=True)), _cell(list(map(sum, own)))]
            for agent, own in by_agent
        ]

    def legend(self) -> str:
        """Legend of the table's numbers."""
        splits = " / ".join(SPLITS[split] for split in self.counts)
        silent = f"; agents {', '.join(map(str, self.silent))} do not tell" if self.silent else ""
        return f"{splits} examples of each class{silent}"


def holdings_of(entries: Iterable[Mapping[str, Any]]) -> Holdings | None:
    """Holdings from handshakes, such as a run's; None where no agent tells."""
    by_agent: dict[int, dict[str, dict[int, int]]] = {}
    for entry in entries:
        # kebab-case, but in records
        facts = {key.replace("_", "-"): str(value) for key, value in entry.items()}
        texts = {split: facts.get(f"{split}-counts") for split in SPLITS}
        if "agent" in entry:
            by_agent[int(entry["agent"])] = {
                split: _read(text)
                for split, text in texts.items()
                if text is not None and _COUNTS.fullmatch(text)
            }
    agents = tuple(sorted(agent for agent, splits in by_agent.items() if splits))
    classes = sorted(
        {name for agent in agents for counts in by_agent[agent].values() for name in counts}
    )
    if not classes:
        return None
    counts = {
        split: tuple(
            tuple(by_agent[agent].get(split, {}).get(name, 0) for name in classes)
            for agent in agents
        )
        for split in SPLITS
        if any(split in by_agent[agent] for agent in agents)
    }
    return Holdings(agents, tuple(classes), counts, tuple(sorted(set(by_agent) - set(agents))))


def _read(text: str) -> dict[int, int]:
    pairs = (pair.split(":") for pair in text.split())
    return {int(name): int(count) for name, count in pairs}


def _cell(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts)) if any(counts) else ""
