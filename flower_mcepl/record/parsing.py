"""Parsing of a run record's files: JSON that was checked, its texts made visible."""

import json
from pathlib import Path
from typing import NoReturn

from flower_mcepl.errors import RecordError, visible_json
from flower_mcepl.record.layout import Row
from flower_mcepl.record.schema import Check, check_value


def read_object(path: Path, check: Check) -> Row:
    """Checked JSON object of a whole file, its texts made visible.

    Raises
    ------
    RecordError
        If the file is damaged, or cannot be read.
    """
    return _parse(_bytes(path), str(path), check)


def read_raw(path: Path) -> Row:
    """JSON object of a whole file as it stands there, for who writes it again."""
    text = _bytes(path)
    try:
        return _json_object(text)
    except (ValueError, RecursionError, RecordError) as error:
        raise RecordError(f"{path} is damaged: {error}.") from error


def read_lines(path: Path, check: Check) -> tuple[list[Row], bool]:
    """Checked objects of a file of lines, and whether an incomplete last line is gone.

    Raises
    ------
    RecordError
        If another line is damaged, or the file cannot be read.
    """
    if not path.exists():
        return [], False
    # tail: what follows the last line's end, usually nothing
    *lines, tail = _bytes(path).split(b"\n")
    rows = [
        _parse(line, f"{path}, line {number}", check) for number, line in enumerate(lines, start=1)
    ]
    if tail:
        try:
            json.loads(tail)
        except (ValueError, RecursionError):
            return rows, True
        rows.append(_parse(tail, f"{path}, line {len(lines) + 1}", check))
    return rows, False


def _parse(text: bytes, where: str, check: Check) -> Row:
    try:
        row = _json_object(text)
        # JSON spells control characters with a backslash, or they are no ASCII
        if b"\\" in text or b"\x7f" in text or not text.isascii():
            row = visible_json(row)
        check_value(row, check)
    except (ValueError, RecursionError, RecordError) as error:
        raise RecordError(f"{where} is damaged: {error}.") from error
    return row


def _json_object(text: bytes) -> Row:
    value = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise RecordError(f"expected a JSON object, got {text[:60]!r}")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise RecordError(f"{constant} is no number of standard JSON")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
