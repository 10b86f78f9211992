"""Lines of a TOML file on which its keys stand: ``tomllib`` reads values only."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

# keys from the top down; a table of an array of tables has its number among them
Place = tuple[str | int, ...]


def key_lines(text: str) -> dict[Place, int]:
    """Line, from 1, of every table and key of a TOML text that is in order.

    A dotted key and the keys of an inline table have the line on which their statement
    begins.
    """
    lines: dict[Place, int] = {}
    header: Place = ()
    for line, statement in _statements(text):
        value = tomllib.loads(statement)
        if statement.startswith("["):
            header = _absolute(_innermost(value), lines, array=statement.startswith("[["))
            lines.setdefault(header, line)
        else:
            for place in _places(value):
                lines.setdefault((*header, *place), line)
    return lines


def line_of_error(text: str, error: tomllib.TOMLDecodeError) -> int:
    """Line on which a TOML text is broken."""
    if at := re.search(r"at line (\d+)", str(error)):
        return int(at[1])
    *_, (line, _statement) = _statements(text)  # what is not closed runs to the end of the text
    return line


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Table headers and keys, each with its line.

    Whatever spans several lines is no TOML until its last one has been read, so the
    parser itself says where a statement ends; the rest of a broken text is the last
    statement.
    """
    pending: list[str] = []
    began = 1
    for number, line in enumerate(text.split("\n"), start=1):
        if not pending:
            began = number
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        pending.append(line)
        statement = "\n".join(pending).strip()
        if _is_toml(statement):
            yield began, statement
            pending = []
    if pending:
        yield began, "\n".join(pending)


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _innermost(header: dict[str, Any]) -> Place:
    """Keys of a table header that was read on its own."""
    keys: list[str | int] = []
    value: Any = header
    while value:
        if isinstance(value, list):
            value = value[0]
        else:
            ((key, value),) = value.items()
            keys.append(key)
    return tuple(keys)


def _absolute(keys: Place, known: dict[Place, int], *, array: bool) -> Place:
    """Put in the numbers of the tables of arrays that a header speaks of."""
    place: Place = ()
    for depth, key in enumerate(keys, start=1):
        place = (*place, key)
        count = sum(1 for other in known if other[:-1] == place and isinstance(other[-1], int))
        if array and depth == len(keys):
            place = (*place, count)
        elif count:
            place = (*place, count - 1)
    return place


def _places(value: dict[str, Any]) -> Iterator[Place]:
    for key, inner in value.items():
        yield (key,)
        if isinstance(inner, dict):
            yield from ((key, *place) for place in _places(inner))
