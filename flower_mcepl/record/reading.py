"""Reading of run records: of finished runs, killed ones and those that go on."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_mcepl.errors import RecordError
from flower_mcepl.record.accuracy import accuracy_summary, last_rows
from flower_mcepl.record.layout import (
    AGENTS,
    CONFIG,
    RELAY,
    ROUNDS,
    SUMMARY,
    Row,
)


@dataclass(frozen=True)
class Run:
    """A run record as it was read."""

    path: Path
    config: Row
    rounds: list[Row]  # lines of rounds.jsonl, in the order they were written
    relay: list[Row]  # lines of relay.jsonl
    summary: Row | None  # None: the run was killed, or is still going on
    agents: dict[int, Path]  # final state of each agent that left one
    truncated: bool = False  # an incomplete last line was dropped

    @property
    def name(self) -> str:
        """What the run is called; the folder's name where the config does not say."""
        return str(self.config.get("name", self.path.name))

    def final(self) -> dict[int, Row]:
        """Last line of each agent, by agent."""
        return last_rows(self.rounds)

    def curve(self) -> list[tuple[int, float, float, float, float]]:
        """Accuracy over the agents: ``(round, mean, std, worst, best)`` per evaluated round, in order."""
        by_round: dict[int, list[Row]] = {}
        for row in self.rounds:
            by_round.setdefault(row["round"], []).append(row)
        points = ((number, accuracy_summary(by_round[number])) for number in sorted(by_round))
        return [
            (t, s["mean"], s["std"], s["worst"], s["best"])
            for t, s in points
            if s["mean"] is not None
        ]


def read_run(path: str | Path) -> Run:
    """Read a run record, of a finished, a killed or a running run.

    An incomplete last line, as a killed run leaves it, is dropped and shows in
    ``Run.truncated``.

    Raises
    ------
    RecordError
        `path` is no run record, or one of its files is damaged; the message names file
        and line.
    """
    folder = Path(path).absolute()
    if not (folder / CONFIG).is_file():
        raise RecordError(
            f"a run record is a folder with {CONFIG} and {ROUNDS}; {folder} has no {CONFIG}."
        )
    rounds, cut_rounds = _read_lines(folder / ROUNDS, ("round", "agent", "accuracy"))
    relay, cut_relay = _read_lines(folder / RELAY, ("round",))
    return Run(
        path=folder,
        config=read_object(folder / CONFIG),
        rounds=rounds,
        relay=relay,
        summary=read_object(folder / SUMMARY) if (folder / SUMMARY).is_file() else None,
        agents=_agent_states(folder / AGENTS),
        truncated=cut_rounds or cut_relay,
    )


def _read_lines(path: Path, keys: Sequence[str]) -> tuple[list[Row], bool]:
    if not path.exists():
        return [], False
    # tail: what follows the last line's end, usually nothing
    *lines, tail = path.read_bytes().split(b"\n")
    rows = [
        _parse(line, f"{path}, line {number}", keys) for number, line in enumerate(lines, start=1)
    ]
    if tail:
        try:
            rows.append(_parse(tail, str(path), keys))
        except RecordError:
            return rows, True
    return rows, False


def read_object(path: Path) -> Row:
    """JSON object in a file of a run record."""
    return _parse(path.read_bytes(), str(path), ())


def _parse(text: bytes, where: str, keys: Sequence[str]) -> Row:
    try:
        value = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise RecordError(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        needed = f" with {', '.join(keys)}" if keys else ""
        raise RecordError(f"{where} is damaged: expected a JSON object{needed}, got {text[:60]!r}.")
    return value


def _agent_states(folder: Path) -> dict[int, Path]:
    names = {
        file: re.fullmatch(r"agent-(\d+)\.safetensors", file.name)
        for file in folder.glob("agent-*")
    }
    return dict(sorted((int(match[1]), file) for file, match in names.items() if match))
