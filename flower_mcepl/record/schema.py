"""Schema of a run record: type and range of the fields that readers rely on.

A field that may be absent may be ``null``, too. Unknown further fields are kept as they
are; what is looked at is where something is calculated or drawn from it.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from flower_mcepl.errors import RecordError

Check = Callable[[Any, str], None]
"""Raises `RecordError` unless a value, at a place, is what it has to be."""

DEPTH = 50  # of nested JSON
MOST = 1e100  # magnitude of a number: sums of squares stay finite
_AGENTS, _ROUNDS, _COUNT = 10**6, 10**9, 2**63
_TEXT = 1_000_000  # characters of a text


def check_depth(value: Any, depth: int = DEPTH) -> None:
    """Check that JSON is nested no deeper than anything that reads it can go."""
    if isinstance(value, dict | list):
        if depth == 0:
            raise RecordError(f"it must be nested at most {DEPTH} levels deep")
        for item in value.values() if isinstance(value, dict) else value:
            check_depth(item, depth - 1)


# --- kinds of values ---


def _refuse_unless(holds: bool, value: Any, place: str, rule: str) -> None:
    if not holds:
        raise RecordError(f"{place} must be {rule}; got {value!r:.60}")


def _whole(most: int) -> Check:
    rule = f"a whole number in 0..{most}"

    def check(value: Any, place: str) -> None:
        # no bool, which is an int, too
        _refuse_unless(type(value) is int and 0 <= value <= most, value, place, rule)

    return check


def _number(least: float = -MOST, most: float = MOST) -> Check:
    rule = f"a number in {least:g}..{most:g}"

    def check(value: Any, place: str) -> None:
        fits = type(value) in (int, float) and least <= value <= most
        _refuse_unless(fits, value, place, rule)

    return check


def _flag(value: Any, place: str) -> None:
    _refuse_unless(isinstance(value, bool), value, place, "true or false")


def _text(value: Any, place: str) -> None:
    fits = isinstance(value, str) and len(value) <= _TEXT
    _refuse_unless(fits, value, place, f"text of at most {_TEXT} characters")


def _time(value: Any, place: str) -> None:
    _text(value, place)
    try:
        datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        raise RecordError(f"{place} must be a time in ISO 8601; got {value!r:.60}") from None


def _scalar(value: Any, place: str) -> None:
    if isinstance(value, bool):
        return
    (_text if isinstance(value, str) else _number())(value, place)


def _scalar_or_list(value: Any, place: str) -> None:
    (_list(_scalar) if isinstance(value, list) else _scalar)(value, place)


def _list(item: Check, *, exactly: int | None = None) -> Check:
    rule = f"a list{f' of {exactly}' if exactly else ''}"

    def check(value: Any, place: str) -> None:
        fits = isinstance(value, list) and exactly in (None, len(value))
        _refuse_unless(fits, value, place, rule)
        for number, one in enumerate(value):
            item(one, f"{place}[{number}]")

    return check


def _object(
    fields: Mapping[str, Check] | None = None,
    *,
    others: Check | None = None,
    required: tuple[str, ...] = (),
) -> Check:
    """Check of an object: known fields by name, in kebab-case too; others alike."""
    known = fields or {}
    rule = f"an object{' with ' if required else ''}{', '.join(required)}"

    def check(value: Any, place: str) -> None:
        fits = isinstance(value, dict) and all(value.get(key) is not None for key in required)
        _refuse_unless(fits, value, place, rule)
        for key, item in value.items():
            field = known.get(key.replace("-", "_"), others)
            if field is not None and item is not None:
                field(item, key if place == _WHOLE else f"{place}.{key}")

    return check


# --- the files ---

_WHOLE = "it"  # the place of a file's whole value

_AGENT, _ROUND, _BYTES = _whole(_AGENTS), _whole(_ROUNDS), _whole(_COUNT)
_LENGTH, _SECONDS, _SHARE = _whole(10**15), _number(0.0), _number(0.0, 1.0)

_HANDSHAKE = _object(
    {
        "agent": _AGENT,
        "parameters": _object(),  # an algorithm's own: who calculates with one looks at it
        "main_metric": _text,
        "metric_unit": _text,
        "higher_is_better": _flag,
        "task": _text,
        "classes": _scalar_or_list,
        "num_examples": _LENGTH,
        "num_validation_examples": _LENGTH,
        "num_test_examples": _LENGTH,
        "train_counts": _text,
        "validation_counts": _text,
        "test_counts": _text,
        "frozen_share": _SHARE,
        "frozen_weights": _text,
    }
)
CONFIG_FILE = _object(
    {
        "name": _text,
        "started": _time,
        "seed": _scalar,
        "run": _text,
        "run_config": _object(others=_scalar),
        "num_rounds": _ROUND,
        "study": _object({"name": _scalar, "label": _scalar, "app": _scalar}),
        "versions": _object(),
        "topology": _object(
            {"num_agents": _AGENT, "directed": _flag, "edges": _list(_list(_AGENT, exactly=2))}
        ),
        "server": _object({"number": _AGENT}, required=("number",)),
        "agents": _list(_HANDSHAKE),
        "resumptions": _list(_object({"after_round": _ROUND, "answered": _AGENT})),
    }
)
ROUNDS_LINE = _object(
    {
        "round": _ROUND,
        "agent": _AGENT,
        "accuracy": _number(),
        "loss": _number(),
        "metrics": _object(others=_number()),
        "num_examples": _LENGTH,
        "density": _number(),
        "sent_bytes": _BYTES,
        "received_bytes": _BYTES,
        "uplink_bytes": _BYTES,
        "seconds": _SECONDS,
        "clock": _SECONDS,
        "closing": _flag,
        "best_round": _ROUND,
        "best_value": _number(),
    },
    required=("round", "agent"),
)
RELAY_LINE = _object(
    {
        "round": _ROUND,
        "answered": _AGENT,
        "agents": _AGENT,
        "train_loss": _number(),
        "decisions": _list(
            _object(
                {
                    "agent": _AGENT,
                    "round": _ROUND,
                    "share": _number(0.0, 1.0),
                    "spent": _number(),
                    "reason": _text,
                },
                required=("agent", "round", "share"),
            )
        ),
        "link_bytes": _BYTES,
        "local_bytes": _BYTES,
        "uplink_bytes": _BYTES,
        "seconds": _SECONDS,
        "clock": _SECONDS,
    },
    required=("round",),
)


def _entry(value: Any, place: str) -> None:
    """Check a sender, a list of receivers or none, and four counts."""
    rule = "a list of a sender, its receivers and four counts"
    _refuse_unless(isinstance(value, list) and len(value) == 6, value, place, rule)
    sender, receivers, *counts = value
    _AGENT(sender, place)
    if receivers is not None:
        _list(_AGENT)(receivers, place)
    for count in counts:
        _COUNTED(count, place)


_COUNTED = _whole(_COUNT)
TRAFFIC_LINE = _object(
    {
        "round": _ROUND,
        "links": _list(_entry),
        "local": _list(_entry),
        "uplinks": _list(_list(_COUNTED, exactly=5)),
    },
    required=("round", "links", "uplinks"),
)
EVENTS_LINE = _object(
    {
        "clock": _SECONDS,
        "answered": _list(_AGENT),
        "given": _list(_AGENT),
        "failed": _list(_AGENT),
    },
    required=("clock",),
)
_SPREAD = _object(others=_number())
_LINKS = _list(_object({"sender": _AGENT, "receiver": _AGENT}, required=("sender", "receiver")))
SUMMARY_FILE = _object(
    {
        "status": _text,
        "num_rounds": _ROUND,
        "seconds": _SECONDS,
        "accuracy": _SPREAD,
        "result": _SPREAD,
        "bytes": _object(others=_number(0.0, float(_COUNT))),
        "links": _LINKS,
        "local": _LINKS,
        "stopped_early": _object(others=_scalar),
        "lines": _object(others=_LENGTH),
    }
)


def check_value(value: Any, check: Check) -> None:
    """Check a file's or line's value; raise `RecordError` that names the field."""
    check_depth(value)
    check(value, _WHOLE)
