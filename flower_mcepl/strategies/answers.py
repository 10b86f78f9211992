"""Reading what a node answers; nothing in it is believed before it is checked."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from flower_mcepl.errors import AnswerError, FlowerMceplError
from flower_mcepl.exchange.parcels import Answer, Posted
from flower_mcepl.messages import keys
from flower_mcepl.messages.envelope import open_envelope

MAX_TEXT = 10_000  # characters of any text in an answer
_EVALUATION = ("accuracy", "loss", "num-examples", "density")


def read_answer(
    node: str, content: RecordDict, known: Mapping[str, Any] | None = None
) -> tuple[int, Answer[Array]]:
    """Check and read the answer of ``node`` (how to call it in an error): which agent it is, and the answer.

    ``known`` is the node's handshake from an earlier answer, which it need not repeat;
    if it does, the new one counts.

    Raises
    ------
    AnswerError
        If it is not a whole answer of an agent.
    """
    try:
        return _read(content, known or {})
    except Exception as error:  # whatever a foreign or damaged answer sets off in the parsers below
        reason = str(error) if isinstance(error, FlowerMceplError) else repr(error)
        raise AnswerError(
            f"{node} does not answer as an agent ({reason[:300]}); its records are "
            f"{', '.join(content)}. Let its ClientApp be one of make_client_app, of the same "
            "release of flower-mcepl as here."
        ) from error


def frame_bytes(array: Array) -> bytes:
    """Return the frame in an array as it came."""
    return open_envelope(array.data)


def frame_array(frame: bytes) -> Array:
    """Put a frame into an array, as the agents do: the same frame makes the same array."""
    return Array(np.frombuffer(frame, np.uint8))


def plain_reason(reason: str | None) -> str:
    """Cut off what Flower and Ray wrap around the text of a client's exception: classes and a traceback."""
    text = reason or "no reason given"
    wrapped = re.fullmatch(r"<class '.*?'>:<'(.*)'>", text, re.DOTALL)
    return (
        (wrapped[1] if wrapped else text)
        .rpartition("ClientAppException occurred. Message: ")[2]
        .strip()
    )


def _read(content: RecordDict, known: Mapping[str, Any]) -> tuple[int, Answer[Array]]:
    told: dict[str, Any] = dict(content.config_records[keys.AGENT])
    agent = _natural(told, "agent")
    lists = {key: _list(told, key, kind) for key, kind in _LISTS.items()}
    text = told.pop(keys.CONTENT, None)
    _check(
        text is None or (isinstance(text, str) and len(text) <= 64),
        f"{keys.CONTENT} must be short text",
        text,
    )
    introduces = keys.PARAMETERS in told
    if introduces:
        told[keys.PARAMETERS] = json.loads(told[keys.PARAMETERS])
    facts = {**({} if introduces or known.get("agent") != agent else known), **told}
    for key in ("num-weights", "kept-weights", "num-examples"):
        if key in facts:
            _natural(facts, key)
    _check(isinstance(facts["fingerprint"], str), "fingerprint must be text", facts["fingerprint"])
    for key, value in facts.items():
        _check(not isinstance(value, str) or len(value) <= MAX_TEXT, f"{key} is too long", "")
    fresh = facts.pop(keys.FRESH)
    _check(isinstance(fresh, bool), f"{keys.FRESH} must be a bool", fresh)
    held_agents, held_rounds = lists[keys.HELD_AGENTS], lists[keys.HELD_ROUNDS]
    _check(
        len(held_agents) == len(held_rounds),
        f"{keys.HELD_ROUNDS} must be as long as {keys.HELD_AGENTS}",
        held_rounds,
    )
    posts, raw = _frames(content, lists[keys.BUILDS_ON], lists[keys.HEADER_BYTES])
    return agent, Answer(
        facts,
        _metrics(content),
        posts,
        text,
        dict(zip(held_agents, held_rounds, strict=True)),
        lists[keys.REFUSED],
        lists[keys.LACKING],
        fresh,
        raw,
        introduces=introduces,
    )


_LISTS: dict[str, type] = {
    keys.REFUSED: str,
    keys.LACKING: int,
    keys.HELD_AGENTS: int,
    keys.HELD_ROUNDS: int,
    keys.BUILDS_ON: int,
    keys.HEADER_BYTES: int,
}


def _list(record: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = record.pop(key, [])
    _check(
        isinstance(values, list) and all(type(v) is kind for v in values),
        f"{key} must be a list",
        values,
    )
    return list(values)


def _metrics(content: RecordDict) -> dict[str, float]:
    metrics: dict[str, Any] = dict(content.metric_records[keys.METRICS])
    for key, value in metrics.items():
        _check(isinstance(value, (int, float)), f"metric {key} must be a number", value)
    if any(key in metrics for key in _EVALUATION):
        for key in _EVALUATION:
            _check(key in metrics, f"an evaluation needs {', '.join(_EVALUATION)}", sorted(metrics))
        _check(math.isfinite(metrics["accuracy"]), "accuracy must be finite", metrics["accuracy"])
        _natural(metrics, "num-examples")
    return metrics


def _frames(
    content: RecordDict, builds_on: list[int], header_bytes: list[int]
) -> tuple[list[Posted[Array]], list[bytes]]:
    record = content.array_records.get(keys.FRAME, ArrayRecord())
    arrays = [record[key] for key in (keys.FRAME, keys.KEY_FRAME) if key in record]
    _check(
        len(builds_on) == len(header_bytes) == len(arrays),
        f"{keys.BUILDS_ON} must tell of each frame",
        builds_on,
    )
    # counted; the frames themselves stay closed
    raw = [open_envelope(array.data) for array in arrays]
    for data, headers in zip(raw, header_bytes, strict=True):
        _check(
            0 <= headers <= len(data),
            f"{keys.HEADER_BYTES} must be in 0..{len(data)}, the frame's bytes",
            headers,
        )
    posts = [
        Posted(array, len(data), headers, None if reference < 0 else reference)
        for array, data, reference, headers in zip(
            arrays, raw, builds_on, header_bytes, strict=True
        )
    ]
    return posts, raw


def _natural(record: dict[str, Any], key: str) -> int:
    value = record[key]
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        f"{key} must be a number >= 0",
        value,
    )
    return int(value)


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise AnswerError(f"{rule}; got {str(value)[:100]!r}")
