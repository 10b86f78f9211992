"""Traffic of a record: grouped by sender on disk, and row by row when it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import RecordError, RunRecord, read_run
from flower_mcepl.record.traffic import TrafficLines, read_traffic

AGENTS = st.integers(0, 5)
COUNTS = st.sampled_from([(1, 1, 90, 8), (1, 0, 20, 8), (2, 1, 110, 16)])
LINES = st.lists(st.dictionaries(st.tuples(AGENTS, AGENTS), COUNTS, max_size=12), max_size=6)


def rows_of(links: dict[tuple[int, int], tuple[int, ...]]) -> list[list[int]]:
    return [[*ends, *counts] for ends, counts in sorted(links.items())]


@given(LINES)
def test_what_is_packed_is_unpacked(lines: list[dict[Any, Any]]) -> None:
    writer, reader = TrafficLines(), TrafficLines()
    for links in lines:
        entries = json.loads(json.dumps(writer.packed(rows_of(links))))
        assert reader.unpacked(entries) == rows_of(links)


@given(LINES, st.data())
def test_a_writer_that_has_read_goes_on_as_one_that_has_written(
    lines: list[dict[Any, Any]], data: st.DataObject
) -> None:
    one, other = TrafficLines(), TrafficLines()
    after = data.draw(st.integers(0, len(lines)))
    packed = [one.packed(rows_of(links)) for links in lines]
    reader = TrafficLines()
    for entries in packed[:after]:
        other.packed(reader.unpacked(entries))
    assert [other.packed(rows_of(links)) for links in lines[after:]] == packed[after:]


def test_a_frame_to_all_neighbors_is_one_short_entry() -> None:
    lines = TrafficLines()
    rows = [[3, receiver, 1, 0, 500, 40] for receiver in (1, 2, 7)]
    assert lines.packed(rows) == [[3, [1, 2, 7], 1, 0, 500, 40]]
    assert lines.packed(rows) == [[3, None, 1, 0, 500, 40]]
    one_lacks = [[3, 1, 2, 1, 900, 80], *rows[1:]]
    assert lines.packed(one_lacks) == [[3, [2, 7], 1, 0, 500, 40], [3, [1], 2, 1, 900, 80]]
    assert lines.packed(rows) == [[3, [1, 2, 7], 1, 0, 500, 40]]


def test_a_resumed_record_goes_on_where_its_lines_end(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    rows = [{"round": n, "links": [[0, 1, 1, 0, 5, 2]], "uplinks": []} for n in (1, 2, 3)]
    record.log_traffic(rows[0])
    RunRecord(record.path).log_traffic(rows[1])
    RunRecord(record.path).log_traffic(rows[2])
    assert read_run(record.path).traffic == rows
    assert (record.path / "traffic.jsonl").read_text().count("null") == 2


def test_what_went_over_no_link_stands_apart(tmp_path: Path) -> None:
    record = RunRecord.create(name="x", config={}, path=tmp_path / "run")
    rows: list[dict[str, Any]] = [
        {"round": n, "links": [[0, 2, 1, 0, 5, 2]], "local": [[0, 1, 1, 0, 5, 2]], "uplinks": []}
        for n in (1, 2)
    ]
    rows.append({"round": 3, "links": [[0, 2, 1, 0, 5, 2]], "uplinks": []})
    record.log_traffic(rows[0])
    for row in rows[1:]:
        RunRecord(record.path).log_traffic(row)
    assert read_run(record.path).traffic == rows
    assert (record.path / "traffic.jsonl").read_text().count("null") == 3


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ({"links": [[0, None, 1, 0, 5, 2]]}, "round 1: no line names the receivers of agent 0"),
        ({"links": [[0, 1, 1, 0, 5, 2]]}, "must be a list"),
        ({"links": [[0, [1], 1, 0, 5]]}, "a list of a sender, its receivers and four counts"),
        ({"links": [[0, [-1], 1, 0, 5, 2]]}, "must be a whole number in 0"),
        ({"links": [[0, [1], 1, 0, 5.5, 2]]}, "must be a whole number in 0"),
        ({"links": None}, "links"),
        ({"links": [], "local": [[0, None, 1, 0, 5, 2]]}, "no line names the receivers of agent 0"),
        ({"links": [], "local": [[0, 1]]}, "a list of a sender, its receivers and four counts"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: dict[str, Any], rule: str) -> None:
    text = json.dumps({"round": 1, "uplinks": [], **line})
    (tmp_path / "traffic.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match=rule) as refused:
        list(read_traffic(tmp_path))
    assert "traffic.jsonl" in str(refused.value)
