"""Reading what a node answers; nothing in it is believed before it is checked."""

import json
import math
import re
from typing import Any

from flwr.app import Array, RecordDict

from flower_mcepl import keys
from flower_mcepl.envelope import open_envelope
from flower_mcepl.errors import AnswerError, FlowerMceplError
from flower_mcepl.monitor import Answer, frame_digest

MAX_TEXT = 10_000  # characters of any text in an answer
_EVALUATION = ("accuracy", "loss", "num-examples", "density")


def read_answer(node: str, content: RecordDict) -> tuple[int, Answer[Array]]:
    """Check and read the answer of ``node`` (how to call it in an error): which agent it is, and the answer.

    Raises
    ------
    AnswerError
        If it is not a whole answer of an agent.
    """
    try:
        return _read(content)
    except Exception as error:  # whatever a foreign or damaged answer sets off in the parsers below
        reason = str(error) if isinstance(error, FlowerMceplError) else repr(error)
        raise AnswerError(
            f"{node} does not answer as an agent ({reason[:300]}); its records are {', '.join(content)}. "
            "Let its ClientApp be one of make_client_app, of the same release of flower-mcepl as here."
        ) from error


def plain_reason(reason: str | None) -> str:
    """Cut off what Flower and Ray wrap around the text of a client's exception: classes and a traceback."""
    text = reason or "no reason given"
    wrapped = re.fullmatch(r"<class '.*?'>:<'(.*)'>", text, re.DOTALL)
    return (wrapped[1] if wrapped else text).rpartition("ClientAppException occurred. Message: ")[2].strip()


def _read(content: RecordDict) -> tuple[int, Answer[Array]]:
    facts: dict[str, Any] = dict(content.config_records[keys.AGENT])
    agent = _natural(facts, "agent")
    for key in ("num-weights", "kept-weights", "num-examples"):
        if key in facts:
            _natural(facts, key)
    _check(isinstance(facts["fingerprint"], str), "fingerprint must be text", facts["fingerprint"])
    for key, value in facts.items():
        _check(not isinstance(value, str) or len(value) <= MAX_TEXT, f"{key} is too long", "")
    fresh = facts.pop(keys.FRESH)
    _check(isinstance(fresh, bool), f"{keys.FRESH} must be a bool", fresh)
    if keys.PARAMETERS in facts:
        facts[keys.PARAMETERS] = json.loads(facts[keys.PARAMETERS])
    refused = facts.pop(keys.REFUSED, [])
    _check(isinstance(refused, list) and all(isinstance(r, str) for r in refused), "refused must be texts", refused)
    array, raw = _frame(content)
    digest = None if array is None else frame_digest(raw)
    return agent, Answer(facts, _metrics(content), array, len(raw), digest, refused, fresh)


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


def _frame(content: RecordDict) -> tuple[Array | None, bytes]:
    if keys.FRAME not in content.array_records:
        return None, b""
    array = content.array_records[keys.FRAME][keys.FRAME]
    return array, open_envelope(array.data)  # counted and digested; the frame itself stays closed


def _natural(record: dict[str, Any], key: str) -> int:
    value = record[key]
    _check(isinstance(value, int) and not isinstance(value, bool) and value >= 0, f"{key} must be a number >= 0", value)
    return int(value)


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise AnswerError(f"{rule}; got {str(value)[:100]!r}")
