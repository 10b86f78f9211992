"""Lines of ``traffic.jsonl``: what went over the links, those of a sender together.

A sender's frame goes to all its neighbors, round after round. So an entry holds a
sender, a list of receivers, and what went to each of them; ``null`` in place of the
list repeats that of the sender's first entry in an earlier line. What went between
agents of one node, over no link, stands apart in the same form.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from flower_mcepl.errors import RecordError
from flower_mcepl.record.layout import TRAFFIC, Row
from flower_mcepl.record.parsing import read_lines
from flower_mcepl.record.schema import TRAFFIC_LINE

Counts = list[int]  # frames, keys, bytes, header_bytes
GROUPED = ("links", "local")  # keys of a line whose rows are put together by sender


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


@final
class GroupedTraffic:
    """Lines of ``traffic.jsonl``, one after the other, with all that is in them."""

    def __init__(self) -> None:
        self._lines = {key: TrafficLines() for key in GROUPED}

    def packed(self, row: Mapping[str, Any]) -> Row:
        """The next line, as it is written."""
        return {**row, **{key: self._lines[key].packed(row[key]) for key in GROUPED if key in row}}

    def unpacked(self, line: Mapping[str, Any]) -> Row:
        """The next line, with a row for each link; see `TrafficLines.unpacked`."""
        rows = {key: self._lines[key].unpacked(line[key]) for key in GROUPED if key in line}
        return {**line, **rows}


def read_traffic(path: Path) -> Iterator[Row]:
    """Lines of the record at ``path``, with a row for each link, as `Run.traffic`.

    Raises
    ------
    RecordError
        If a line is damaged, or one that it builds on is missing.
    """
    lines = GroupedTraffic()
    for row in read_lines(path / TRAFFIC, TRAFFIC_LINE)[0]:
        try:
            yield lines.unpacked(row)
        except RecordError as error:
            raise RecordError(
                f"{path / TRAFFIC}, round {row['round']}: {error}. Take a whole copy of the record."
            ) from error
