"""Lines of ``traffic.jsonl``: what went over the links, those of a sender together.

A sender's frame goes to all its neighbors, round after round. So an entry holds a
sender, a list of receivers, and what went to each of them; ``null`` in place of the
list repeats that of the sender's first entry in an earlier line.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import RecordError
from flower_mcepl.record.layout import TRAFFIC, Row
from flower_mcepl.record.parsing import read_lines
from flower_mcepl.record.schema import TRAFFIC_LINE

Counts = list[int]  # frames, keys, bytes, header_bytes


@final
class TrafficLines:
    """Entries of links, line after line: to be written, or as they were read."""

    def __init__(self) -> None:
        self._receivers: dict[int, list[int]] = {}  # of each sender's last first entry

    def packed(self, links: Sequence[Sequence[int]]) -> list[list[Any]]:
        """Entries of rows ``[sender, receiver, *counts]``, the next line's."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for sender, receiver, *counts in links:
            groups.setdefault((sender, *counts), []).append(receiver)
        # a sender's largest group first: most rounds, the only one
        order = sorted(groups, key=lambda key: (key[0], -len(groups[key]), groups[key]))
        entries: list[list[Any]] = []
        for key in order:
            sender, receivers = key[0], sorted(groups[key])
            first = not entries or entries[-1][0] != sender
            again = first and self._receivers.get(sender) == receivers
            if first:
                self._receivers[sender] = receivers
            entries.append([sender, None if again else receivers, *key[1:]])
        return entries

    def unpacked(self, entries: Sequence[Sequence[Any]]) -> list[list[int]]:
        """Rows of the next line's entries, by sender and receiver.

        Raises
        ------
        RecordError
            If an entry repeats receivers that no line has named.
        """
        rows: list[list[int]] = []
        before = None
        for sender, named, *counts in entries:
            receivers = self._receivers.get(sender) if named is None else named
            if receivers is None:
                raise RecordError(f"no line names the receivers of agent {sender}")
            if sender != before:
                self._receivers[sender] = list(receivers)
            before = sender
            rows += [[sender, receiver, *counts] for receiver in receivers]
        return sorted(rows)


def read_traffic(path: Path) -> Iterator[Row]:
    """Lines of the record at ``path``, with a row for each link, as `Run.traffic`.

    Raises
    ------
    RecordError
        If a line is damaged, or one that it builds on is missing.
    """
    lines = TrafficLines()
    for row in read_lines(path / TRAFFIC, TRAFFIC_LINE)[0]:
        try:
            yield {**row, "links": lines.unpacked(row["links"])}
        except RecordError as error:
            raise RecordError(
                f"{path / TRAFFIC}, round {row['round']}: {error}. Take a whole copy of the record."
            ) from error
