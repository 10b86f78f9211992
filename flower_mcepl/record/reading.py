"""Reading of run records: of finished runs, killed ones and those that go on.

Whoever wrote a record, what was read of it can be relied on: every field that is used
has its type and range (`schema`), and no text holds a control character.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flower_mcepl.errors import RecordError
from flower_mcepl.record.layout import AGENTS, CONFIG, EVENTS, RELAY, ROUNDS, SUMMARY, Row
from flower_mcepl.record.metric import (
    MainMetric,
    final_rows,
    last_evaluated,
    last_rows,
    metric_summary,
    of_agents,
    rows_by_round,
)
from flower_mcepl.record.parsing import read_lines, read_object
from flower_mcepl.record.schema import (
    CONFIG_FILE,
    EVENTS_LINE,
    RELAY_LINE,
    ROUNDS_LINE,
    SUMMARY_FILE,
)
from flower_mcepl.record.selection import best_states
from flower_mcepl.record.traffic import read_traffic

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run record as it was read; what it does not hold is empty or None."""

    path: Path
    config: Row
    rounds: list[Row]  # lines of rounds.jsonl, in the order they were written
    relay: list[Row]  # lines of relay.jsonl
    summary: Row | None  # None: the run was killed, or is still going on
    agents: dict[int, Path]  # final state of each agent that left one
    truncated: bool = False  # an incomplete last line was dropped
    # best state of each agent that left one, where the run kept them
    best_agents: dict[int, Path] = field(default_factory=dict)
    # lines of events.jsonl; only a run without a barrier has any
    events: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called; the folder's name where the config does not say."""
        return str(self.config.get("name") or self.path.name)

    @property
    def started(self) -> str:
        """Start of the run, UTC in ISO 8601; empty where the config does not say."""
        return str(self.config.get("started") or "")

    @property
    def settings(self) -> Row:
        """Run config of the run, by key."""
        return _part(self.config, "run_config", dict)

    def setting(self, key: str, default: Any = None) -> Any:
        """Value of a key of the run config."""
        value = self.settings.get(key)
        return default if value is None else value

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        seed: int | None = self.setting("seed", self.config.get("seed"))
        return seed

    @property
    def evaluated_on(self) -> str:
        """Split of the agents' data that accuracy and loss are of."""
        told = any("num_validation_examples" in facts for facts in self.handshakes.values())
        return str(self.setting("evaluate-on", "validation" if told else "test"))

    @property
    def study(self) -> Row:
        """Study of the run: ``name`` and ``engine``, the run's ``label``."""
        return _part(self.config, "study", dict)

    @property
    def versions(self) -> Row:
        """Versions of Python, the platform and packages, by name."""
        return _part(self.config, "versions", dict)

    @property
    def topology(self) -> Row:
        """Communication graph: ``num_agents``, ``directed``; if fixed, ``edges``."""
        return _part(self.config, "topology", dict)

    @property
    def server(self) -> int | None:
        """Number under which the server of a server-based algorithm is counted."""
        number = _part(self.config, "server", dict).get("number")
        return None if number is None else int(number)

    @cached_property
    def traffic(self) -> list[Row]:
        """Lines of ``traffic.jsonl``: frames and bytes of each round, by link.

        ``links`` has rows ``[sender, receiver, frames, keys, bytes, header_bytes]``,
        ``uplinks`` rows ``[agent, frames, keys, bytes, header_bytes]``. Where a node
        plays several agents, ``local`` has rows like those of ``links``, of what went
        over none.

        Raises
        ------
        RecordError
            If the file is damaged.
        """
        return list(read_traffic(self.path))

    @cached_property
    def handshakes(self) -> dict[int, Row]:
        """Handshake of each agent in snake_case, its ``parameters`` among them."""
        return {
            int(entry["agent"]): {
                "parameters": {},
                **{k.replace("-", "_"): v for k, v in entry.items() if v is not None},
            }
            for entry in _part(self.config, "agents", list)
            if entry.get("agent") is not None
        }

    @property
    def decisions(self) -> dict[int, dict[int, float]]:
        """Share of filters by agent, by round, where devices chose it."""
        shares: dict[int, dict[int, float]] = {}
        for line in self.relay:
            for entry in _part(line, "decisions", list):
                shares.setdefault(entry["agent"], {})[entry["round"]] = float(entry["share"])
        return shares

    @property
    def status(self) -> str | None:
        """Status of the run; None as long as it has no summary."""
        return None if self.summary is None else str(self.summary.get("status") or "-")

    @property
    def finished(self) -> bool:
        """Whether the run came to its planned end."""
        return self.status == "finished"

    @property
    def num_agents(self) -> int:
        """Agents of the graph; where the config does not say, those that have lines."""
        known = {*self.handshakes, *self.final()}
        return max(int(self.topology.get("num_agents") or 0), len(known))

    @property
    def num_rounds(self) -> int:
        """Rounds of the run; without a summary, the last one that has a line.

        The line of the closing exchange is none of a round.
        """
        planned = (self.summary or {}).get("num_rounds")
        return self.rounds_played if planned is None else int(planned)

    @property
    def rounds_played(self) -> int:
        """Last round that has a line: of a run that broke off, fewer than planned."""
        last = max((row["round"] for row in (*self.rounds, *self.relay)), default=0)
        return int(last if self.planned_rounds is None else min(last, self.planned_rounds))

    @property
    def planned_rounds(self) -> int | None:
        """Rounds of the run, had it not broken off; None where nothing says so."""
        planned = (self.summary or {}).get("num_rounds", self.config.get("num_rounds"))
        return None if planned is None else int(planned)

    @property
    def damage(self) -> str:
        """Which lines its files have lost; empty: none, as far as anybody can tell."""
        kept = {ROUNDS: len(self.rounds), RELAY: len(self.relay)}
        written = _part(self.summary, "lines", dict)
        lost = [
            f"{file} has lost {written[file] - count} of its {written[file]} lines"
            for file, count in kept.items()
            if (written.get(file) or 0) > count
        ]
        if self.truncated and not lost:
            lost = ["its last line is incomplete"]
        return "; ".join(lost)

    @property
    def totals(self) -> Row:
        """Byte counts of the summary; without one, those of the last lines."""
        if self.summary is not None:
            return _part(self.summary, "bytes", dict)
        if self.relay:  # written after every round, the agents' lines only after evaluated ones
            last = self.relay[-1]
            counts = {"links_total": "link_bytes", "uplink_total": "uplink_bytes"}
            local = {"local_total": last["local_bytes"]} if "local_bytes" in last else {}
            return {**{total: last.get(key) for total, key in counts.items()}, **local}
        rows = list(self.final().values())
        columns = {"links_total": "sent_bytes", "uplink_total": "uplink_bytes"} if rows else {}
        return {
            total: sum(row.get(column) or 0 for row in rows) for total, column in columns.items()
        }

    @property
    def links(self) -> list[Row]:
        """Traffic over each directed link during the whole run."""
        return _part(self.summary, "links", list)

    @property
    def local(self) -> list[Row]:
        """The same between agents of one node, over no link."""
        return _part(self.summary, "local", list)

    @property
    def stopped_early(self) -> Row:
        """Why the run stopped before its planned end; empty: it did not."""
        return _part(self.summary, "stopped_early", dict)

    def best_states(self) -> list[Row]:
        """Agent, round and value of every best state that was kept (`keep-best`)."""
        return best_states(self.rounds)

    @property
    def metric(self) -> MainMetric:
        """Main metric of the run: what `result`, curves and pictures are of."""
        return MainMetric.of(self.handshakes.values(), self.rounds)

    def result(self) -> Row:
        """Mean, spread and extremes of the main metric (`metric_summary`)."""
        return metric_summary(final_rows(self.rounds), self.metric)

    def accuracy(self) -> Row:
        """Mean, spread and extremes of the accuracy, whatever the main metric is."""
        return metric_summary(final_rows(self.rounds))

    def final(self) -> dict[int, Row]:
        """Last line of each agent, by agent."""
        return last_rows(self.rounds)

    def last_evaluated(self) -> dict[int, Row]:
        """Lines of the agents that `result` is of, by agent."""
        return last_evaluated(final_rows(self.rounds), self.metric)

    def coverage(self) -> str:
        """Of how many agents the mean of `result` is: ``"9 of 10 agents"``."""
        return of_agents(len(self.last_evaluated()), self.num_agents)

    def partial_rounds(self) -> dict[int, int]:
        """Evaluated rounds without all agents of the graph, and how many they have."""
        metric = self.metric
        counts = {t: len(last_evaluated(rows, metric)) for t, rows in self.by_round().items()}
        return {round: count for round, count in counts.items() if 0 < count < self.num_agents}

    def by_round(self) -> dict[int, list[Row]]:
        """Lines of the agents by evaluated round, in the order of the rounds.

        Without a barrier the last one is that of the closing exchange, of all agents.
        """
        return {t: [*map(dict, rows)] for t, rows in rows_by_round(self.rounds).items()}

    def curve(self) -> list[tuple[int, float, float, float, float]]:
        """Main metric by evaluated round: ``(round, mean, std, worst, best)``."""
        metric = self.metric
        points = ((t, metric_summary(rows, metric)) for t, rows in self.by_round().items())
        return [
            (t, s["mean"], s["std"], s["worst"], s["best"])
            for t, s in points
            if s["mean"] is not None
        ]


def _part(file: Row | None, key: str, kind: type[T]) -> T:
    """Object or list under a key of a file; empty if it is absent or null."""
    value: T | None = (file or {}).get(key)
    return kind() if value is None else value


def read_run(path: str | Path) -> Run:
    """Read a run record, of a finished, a killed or a running run.

    An incomplete last line, as a killed run leaves it, is dropped and shows in
    ``Run.truncated``; which lines are missing says ``Run.damage``.

    Raises
    ------
    RecordError
        `path` is no run record, or one of its files is damaged or holds a value of the
        wrong type or range; the message names file and line.
    """
    folder = Path(path).absolute()
    if not (folder / CONFIG).is_file():
        raise RecordError(
            f"a run record is a folder with {CONFIG} and {ROUNDS}; {_what_it_is(folder)}"
        )
    rounds, cut_rounds = read_lines(folder / ROUNDS, ROUNDS_LINE)
    relay, cut_relay = read_lines(folder / RELAY, RELAY_LINE)
    events, cut_events = read_lines(folder / EVENTS, EVENTS_LINE)
    summary = folder / SUMMARY
    return Run(
        path=folder,
        config=read_object(folder / CONFIG, CONFIG_FILE),
        rounds=rounds,
        relay=relay,
        summary=read_object(summary, SUMMARY_FILE) if summary.is_file() else None,
        agents=_agent_states(folder / AGENTS, ""),
        truncated=cut_rounds or cut_relay or cut_events,
        events=events,
        best_agents=_agent_states(folder / AGENTS, "-best"),
    )


def _agent_states(folder: Path, kind: str) -> dict[int, Path]:
    name = re.compile(rf"agent-([0-9]{{1,7}}){kind}\.safetensors")
    files = ((name.fullmatch(file.name), file) for file in folder.glob("agent-*"))
    return dict(sorted((int(match[1]), file) for match, file in files if match))


def _what_it_is(folder: Path) -> str:
    """What stands where a run record was expected, and the way out."""
    if not folder.exists():
        return f"{folder} does not exist. Check the path."
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if inside:
        return (
            f"{folder} holds {len(inside)} of them. Name one, such as {folder / inside[0]}, or put "
            "them side by side with flower-mcepl compare."
        )
    return f"{folder} has no {CONFIG}. Check the path."
