"""Limits of what a message may hold, and reading a record's fields within them."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.exchange.bounds import MOST_METRIC

Records = Mapping[str, Mapping[str, Any]]
"""A message's records by name: Flower's `RecordDict`, or plain dictionaries."""

MakeRecord = Callable[[dict[str, Any]], Any]
"""Makes one of Flower's records from its entries; `dict` leaves them as they are."""


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest values of the fields of a message; what lies beyond is refused unused.

    Honest agents of large networks stay far below them, and a message that exhausts all
    of them, frames aside, still fits into memory. What depends on the network is one of
    these with other values, such as ``replace(LIMITS, frame=...)``.
    """

    agent: int = 10**6  # number of an agent
    round: int = 10**9
    entries: int = 10_000  # of a list of numbers, one for each neighbor or round
    names: int = 100  # facts of a handshake, or metrics
    name: int = 200  # characters of such a name
    text: int = 10_000  # characters of a fact; a list of texts counts as one
    reason: int = 1_000  # characters of why a frame was refused, or an evaluation failed
    error: int = 20_000  # characters of why a node failed
    reasons: int = 1_000  # entries of such a list
    parameters: int = 200_000  # characters of an algorithm's parameters as JSON
    layout: int = 10_000_000  # characters of an app's array layout as JSON
    depth: int = 20  # of nested JSON
    frame: int = 2**31  # bytes of a frame with its envelope, or of another array
    arrays: int = 100_000  # of one record: frames, or those that an app begins with
    setting: int = 1_000_000  # characters or bytes of a setting of the user's own
    metric: float = MOST_METRIC  # magnitude of a metric


LIMITS = Limits()
MOST_WEIGHTS = 2**60  # of a layer, as in a frame
_INT64 = 2**63


class _Short(reprlib.Repr):
    """Shows a value in some dozen characters, and of an array no more than its type."""

    def repr_instance(self, x: object, level: int) -> str:
        if isinstance(x, bytes):
            return repr(x[: self.maxstring])
        return repr(x) if x is None or isinstance(x, float) else f"<{type(x).__name__}>"

    def repr_bool(self, x: bool, level: int) -> str:
        return repr(x)


_SHORT = _Short()


@final
class Fields:
    """Fields of one record, read one after the other.

    Every reader takes its field out of `rest`, and raises ``error`` unless it is of its
    type and within its limits. A field that may be absent is asked for with ``in``.

    Parameters
    ----------
    record : mapping
        The record; anything else is refused.
    name : str
        What it is called in an error.
    error : type of FlowerMceplError
        What is raised.
    limits : Limits
        What the readers of the fields go by.
    way_out : str (default: "")
        What stands behind the rule and the value.
    """

    def __init__(
        self,
        record: object,
        name: str,
        *,
        error: type[FlowerMceplError],
        limits: Limits,
        way_out: str = "",
    ) -> None:
        self.name, self.limits, self._error, self._way_out = name, limits, error, way_out
        self.rest: dict[str, Any] = {}
        self.check(isinstance(record, Mapping), f"{name} must be a record", record)
        assert isinstance(record, Mapping)
        self.rest.update(record)

    def of(self, record: object, name: str) -> "Fields":
        """Fields of another record of the same message."""
        return Fields(record, name, error=self._error, limits=self.limits, way_out=self._way_out)

    def __contains__(self, key: str) -> bool:
        return key in self.rest

    def check(self, holds: bool, rule: str, value: object) -> None:
        """Raise the error unless ``holds``."""
        if not holds:
            raise self._error(f"{rule}; got {_SHORT.repr(value)}{self._way_out}")

    def number(self, key: str, *, least: int = 0, most: int) -> int:
        """Whole number from ``least`` to ``most``."""
        value = self.rest.pop(key, None)
        rule = f"{key} must be a whole number in {least}..{most}"
        self.check(_is_whole(value, least, most), rule, value)
        return int(value)

    def round(self, key: str, *, least: int = 0) -> int:
        """Number of a round."""
        return self.number(key, least=least, most=self.limits.round)

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self.rest.pop(key, None)
        self.check(isinstance(value, bool), f"{key} must be true or false", value)
        return bool(value)

    def text(self, key: str, *, most: int) -> str:
        """Text of at most so many characters."""
        value = self.rest.pop(key, None)
        self.check(_is_text(value, most), f"{key} must be text of at most {most} characters", value)
        return str(value)

    def digest(self, key: str) -> str:
        """16 lower-case hex digits."""
        value = self.rest.pop(key, None)
        is_hex = _is_text(value, 16) and len(value) == 16 and set(value) <= set("0123456789abcdef")
        self.check(is_hex, f"{key} must be 16 lower-case hex digits", value)
        return str(value)

    def numbers(
        self, key: str, *, least: int = 0, most: int, entries: int | None = None
    ) -> tuple[int, ...]:
        """List of whole numbers, empty where it is absent."""
        entries = self.limits.entries if entries is None else entries
        values = self.rest.pop(key, [])
        rule = f"{key} must be a list of at most {entries} whole numbers in {least}..{most}"
        fits = _is_list(values, entries) and all(_is_whole(v, least, most) for v in values)
        self.check(fits, rule, values)
        return tuple(values)

    def agents(self, key: str) -> tuple[int, ...]:
        """List of agents, each of them once; empty where it is absent."""
        numbers = self.numbers(key, most=self.limits.agent)
        self.check(len({*numbers}) == len(numbers), f"{key} must name each only once", numbers)
        return numbers

    def texts(self, key: str, *, most: int, entries: int) -> tuple[str, ...]:
        """List of texts, empty where it is absent."""
        values = self.rest.pop(key, [])
        rule = f"{key} must be a list of at most {entries} texts of at most {most} characters"
        self.check(
            _is_list(values, entries) and all(_is_text(v, most) for v in values), rule, values
        )
        return tuple(values)

    def json(self, key: str, *, most: int, depth: int) -> dict[str, Any]:
        """JSON object, of at most so many characters and levels."""
        text = self.text(key, most=most)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.check(False, f"{key} must be JSON ({type(error).__name__})", text)
        rule = f"{key} must be a JSON object of at most {depth} levels, its numbers finite"
        self.check(isinstance(value, dict) and is_json(value, depth=depth), rule, text)
        return dict(value)

    def check_arrays(self) -> None:
        """Check how many fields are left, and that they are arrays within limits."""
        rule = f"{self.name} may hold {self.limits.arrays} arrays"
        self.check(len(self.rest) <= self.limits.arrays, rule, len(self.rest))
        for array in self.rest.values():
            rule = f"{self.name} must hold arrays of at most {self.limits.frame} bytes"
            self.check(is_array(array, most=self.limits.frame), rule, array)

    def check_names(self, *, entries: int, printable: bool = True) -> None:
        """Check how many fields are left, how long their names are, and printable."""
        self.check(
            len(self.rest) <= entries, f"{self.name} may have {entries} entries", len(self.rest)
        )
        for key in self.rest:
            rule = f"names in {self.name} must be texts of at most {self.limits.name} characters"
            self.check(_is_text(key, self.limits.name), rule, key)
            self.check(not printable or key.isprintable(), f"{rule}, printable ones", key)


def is_json(value: object, *, depth: int) -> bool:
    """Whether a value is JSON of so many levels; its numbers are finite, of 64 bits."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(is_json(item, depth=depth - 1) for item in inner)
    return value is None or _is_scalar(value)


def is_fact(value: object, *, most: int) -> bool:
    """Whether a value is a JSON scalar, or a list of them, of so many characters."""
    items = _items(value)
    return _is_alike(items, most) and all(_is_scalar(item) for item in items)


def is_setting(value: object, *, most: int) -> bool:
    """Whether a value is one of Flower's `ConfigRecord`, of so many characters."""
    items = _items(value)
    return _is_alike(items, most) and all(
        isinstance(item, bytes | float) or _is_scalar(item) for item in items
    )


def is_array(value: object, *, most: int) -> bool:
    """Whether a value is an array of Flower, or another carrier, of so many bytes."""
    data = getattr(value, "data", None)
    return isinstance(data, bytes) and len(data) <= most


def is_number(value: object) -> bool:
    """Whether a value is a finite number of at most 64 bits, and no bool."""
    return _is_scalar(value) and isinstance(value, int | float) and not isinstance(value, bool)


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_alike(items: list[Any], most: int) -> bool:
    """Whether items are of one type, and together of so many characters or bytes."""
    sizes = (len(item) if isinstance(item, str | bytes) else 8 for item in items)
    return len({type(item) for item in items}) <= 1 and sum(sizes) <= most


def _is_scalar(value: object) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return _is_whole(value, -_INT64, _INT64 - 1)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) and _is_text(value, len(value))


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: object, most: int) -> bool:
    """Whether a value is text that UTF-8 can hold: JSON can name half a surrogate."""
    if not isinstance(value, str) or len(value) > most:
        return False
    return value.isascii() or not any(0xD800 <= ord(char) <= 0xDFFF for char in value)


def _is_list(value: object, entries: int) -> bool:
    return isinstance(value, list) and len(value) <= entries
