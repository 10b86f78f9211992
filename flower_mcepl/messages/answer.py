"""An agent's answer, in Flower's records and back; nothing in it is used unchecked.

The class is `flower_mcepl.exchange.parcels.Answer`: what an agent says and what a relay
takes in are one thing. Two of its fields do not travel: ``raw`` follows from the
frames, and ``late_of`` is for the relay to say. What a simulated agent hands over for
the run record stands in a record of its own, which it gets when all else is done.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flower_mcepl.agents.handshake import (
    DEPTH,
    KEPT_BY_LAYER,
    LAYERS_BY_DEPTH,
    PARAMETERS,
    WEIGHTS_BY_DEPTH,
)
from flower_mcepl.agents.parts.pace import check_decision
from flower_mcepl.errors import AnswerError, CorruptFrameError, visible, visible_json
from flower_mcepl.exchange.bounds import MOST_EXAMPLES
from flower_mcepl.exchange.parcels import Answer, FrameT, Posted
from flower_mcepl.messages import keys
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.messages.limits import (
    LIMITS,
    MOST_WEIGHTS,
    Fields,
    Limits,
    MakeRecord,
    Records,
    is_array,
    is_fact,
    is_number,
)

_WHOLE = -1  # in the place of the round that a frame builds on
_EVALUATION = ("accuracy", "loss", "num-examples", "density")
_MEASURES = frozenset({"accuracy", "loss"})  # one of them is enough
_COUNTS = (  # of a handshake
    *("num-weights", "kept-weights"),
    *("num-examples", "num-validation-examples", "num-test-examples"),
)
_HANDED = 2  # a state, and an exported model
_FRACTIONS = ("accuracy", "density")
_OWN = frozenset(
    {keys.FRESH, keys.REFUSED, keys.LACKING, keys.HELD_AGENTS, keys.HELD_ROUNDS}
    | {keys.BUILDS_ON, keys.HEADER_BYTES, keys.CONTENT, keys.EVALUATION_ERROR}
)
# Facts of which log, record and pictures make use; the others are an algorithm's own.
# Names of metrics become names of files and titles of axes.
_METRIC = re.compile(r"[^\W_][\w .,%+@()-]{0,99}")
_UNIT = re.compile(r"[^$\\\[\]]{0,40}")
_TEXTS = (
    *("algorithm", "task", "retention", "first-mask", "prior", "frozen-weights"),
    *("train-counts", "validation-counts", "test-counts"),
)
_KNOWN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_TEXTS, ("text", lambda value: isinstance(value, str))),
    "classes": ("text or a list", lambda value: isinstance(value, str | list)),
    "seed": ("a whole number", lambda value: type(value) is int),
    "higher-is-better": ("true or false", lambda value: isinstance(value, bool)),
    "frozen-share": ("in 0..1", lambda value: is_number(value) and 0 <= value <= 1),
    "main-metric": (
        "a name of letters, digits, spaces and .,%+@()-",
        lambda value: isinstance(value, str) and bool(_METRIC.fullmatch(value)),
    ),
    "metric-unit": (
        "at most 40 characters, none of $\\[]",
        lambda value: isinstance(value, str) and bool(_UNIT.fullmatch(value)),
    ),
}


def to_records(
    answer: Answer[FrameT],
    arrays: MakeRecord = dict,
    configs: MakeRecord = dict,
    metrics: MakeRecord = dict,
) -> dict[str, Any]:
    """Records of an answer, made by ``arrays``, ``configs`` and ``metrics``.

    Raises
    ------
    AnswerError
        If a fact of the handshake has the name of a field of every answer.
    """
    facts = dict(answer.facts)
    if taken := sorted(_OWN & facts.keys()):
        raise AnswerError(
            f"facts of a handshake must not be called {', '.join(sorted(_OWN))}; got "
            f"{', '.join(taken)}. Rename them in Agent.describe."
        )
    if answer.introduces:
        facts[PARAMETERS] = json.dumps(facts[PARAMETERS])
    lists = {
        keys.REFUSED: answer.refused,
        keys.LACKING: answer.lacking,
        keys.HELD_AGENTS: answer.held,
        keys.HELD_ROUNDS: answer.held.values(),
        keys.BUILDS_ON: [_WHOLE if p.builds_on is None else p.builds_on for p in answer.posts],
        keys.HEADER_BYTES: [post.header_bytes for post in answer.posts],
    }
    agent = {
        keys.NUMBER: facts[keys.NUMBER],
        keys.FRESH: answer.fresh,
        **facts,
        # Flower's tools trip over empty lists
        **{key: list(values) for key, values in lists.items() if values},
        **({} if answer.content is None else {keys.CONTENT: answer.content}),
        **({keys.EVALUATION_ERROR: answer.evaluation_error} if answer.evaluation_error else {}),
    }
    records = {keys.AGENT: configs(agent), keys.METRICS: metrics(dict(answer.metrics))}
    if answer.posts:
        names = (keys.FRAME, keys.KEY_FRAME)
        frames = {name: post.frame for name, post in zip(names, answer.posts, strict=False)}
        records[keys.FRAME] = arrays(frames)
    return records


def from_records(records: Records, limits: Limits = LIMITS) -> Answer[Any]:
    """Check and read the records of a message, as `to_records` writes them.

    Raises
    ------
    AnswerError
        If they are not a whole answer: a field is missing, of another type or beyond
        its limits.
    """
    fields = Fields(records.get(keys.AGENT), keys.AGENT, error=AnswerError, limits=limits)
    number = fields.number(keys.NUMBER, most=limits.agent)
    fresh = fields.flag(keys.FRESH)
    refused = fields.texts(keys.REFUSED, most=limits.reason, entries=limits.reasons)
    lacking = fields.agents(keys.LACKING)
    held = _read_held(fields)
    posts = _read_frames(fields, records.get(keys.FRAME, {}))
    fields.check(
        bool(posts) == (keys.CONTENT in fields),
        f"{keys.CONTENT} must stand beside frames, and nowhere else",
        fields.rest.get(keys.CONTENT),
    )
    content = fields.digest(keys.CONTENT) if posts else None
    evaluation_error = ""
    if keys.EVALUATION_ERROR in fields:
        error = fields.text(keys.EVALUATION_ERROR, most=limits.reason)
        evaluation_error = visible(error, lines=True)
    state, exported = _read_handed(fields.of(records.get(keys.HANDED, {}), keys.HANDED))
    introduces = PARAMETERS in fields
    facts = _read_handshake(fields) if introduces else {}
    if not introduces:
        rule = f"facts must come as a whole handshake, {PARAMETERS} included"
        fields.check(not fields.rest, rule, [*fields.rest])
    return Answer(
        facts={keys.NUMBER: number, **facts},
        metrics=_read_metrics(fields.of(records.get(keys.METRICS), keys.METRICS)),
        posts=tuple(post for post, _ in posts),
        content=content,
        held=held,
        refused=tuple(map(visible, refused)),
        lacking=lacking,
        fresh=fresh,
        raw=tuple(frame for _, frame in posts),
        introduces=introduces,
        evaluation_error=evaluation_error,
        state=state,
        exported=exported,
    )


def handed_records(
    state: FrameT, exported: Mapping[str, FrameT], arrays: MakeRecord = dict
) -> dict[str, Any]:
    """Record that is added to the answer of a simulated agent, for the run record."""
    return {keys.HANDED: arrays({keys.GENERATION: state, **exported})}


def _read_handed(fields: Fields) -> tuple[bytes, dict[str, bytes]]:
    fields.check_names(entries=_HANDED)
    fields.check_arrays()
    arrays = {name: array.data for name, array in fields.rest.items()}
    return arrays.pop(keys.GENERATION, b""), arrays


def _read_held(fields: Fields) -> dict[int, int]:
    agents = fields.agents(keys.HELD_AGENTS)
    rounds = fields.numbers(keys.HELD_ROUNDS, most=fields.limits.round)
    fields.check(
        len(agents) == len(rounds),
        f"{keys.HELD_ROUNDS} must be as long as {keys.HELD_AGENTS}",
        rounds,
    )
    return dict(zip(agents, rounds, strict=True))


def _read_frames(fields: Fields, record: object) -> list[tuple[Posted[Any], bytes]]:
    """Frames as they came, and their bytes to be counted; a frame stays closed."""
    builds_on = fields.numbers(keys.BUILDS_ON, least=_WHOLE, most=fields.limits.round, entries=2)
    header_bytes = fields.numbers(keys.HEADER_BYTES, most=fields.limits.frame, entries=2)
    frames = fields.of(record, keys.FRAME).rest
    names = (keys.FRAME, keys.KEY_FRAME)[: len(frames)]
    fields.check(
        tuple(frames) == names and len(builds_on) == len(header_bytes) == len(names),
        f"{keys.BUILDS_ON} and {keys.HEADER_BYTES} must tell of each frame",
        [builds_on, header_bytes, *frames],
    )
    return [
        _read_frame(fields, frames[name], reference, headers)
        for name, reference, headers in zip(names, builds_on, header_bytes, strict=True)
    ]


def _read_frame(
    fields: Fields, array: Any, reference: int, headers: int
) -> tuple[Posted[Any], bytes]:
    rule = f"a frame must be an array of at most {fields.limits.frame} bytes"
    fields.check(is_array(array, most=fields.limits.frame), rule, array)
    try:
        frame = open_envelope(array.data)
    except CorruptFrameError as error:
        raise AnswerError(str(error)) from error
    rule = f"{keys.HEADER_BYTES} must be in 0..{len(frame)}, the frame's bytes"
    fields.check(headers <= len(frame), rule, headers)
    post = Posted(array, len(frame), headers, None if reference == _WHOLE else reference)
    return post, frame


def _read_handshake(fields: Fields) -> dict[str, Any]:
    """What is left: facts of `Agent.describe`, which algorithms choose; parameters."""
    fields.check_names(entries=fields.limits.names)
    facts = dict(fields.rest)
    facts[PARAMETERS] = fields.json(
        PARAMETERS, most=fields.limits.parameters, depth=fields.limits.depth
    )
    for key in fields.rest:  # else the record, in snake_case, would have a fact twice
        fields.check("_" not in key, "names of facts must be in kebab-case, without _", key)
    for key in [key for key in fields.rest if key in _COUNTS]:
        fields.number(key, most=MOST_EXAMPLES)
    if KEPT_BY_LAYER in fields:
        fields.numbers(KEPT_BY_LAYER, most=MOST_WEIGHTS)
    if WEIGHTS_BY_DEPTH in fields or LAYERS_BY_DEPTH in fields:
        stages = len(fields.numbers(WEIGHTS_BY_DEPTH, most=MOST_EXAMPLES))
        fields.numbers(LAYERS_BY_DEPTH, most=MOST_EXAMPLES)
        fields.number(DEPTH, least=1, most=stages)
    fields.text("fingerprint", most=fields.limits.text)
    for key, value in fields.rest.items():
        rule = f"{key} must be a finite number, bool, text, or list of one of these"
        fits = is_fact(value, most=fields.limits.text)
        fields.check(fits, f"{rule}, of at most {fields.limits.text} characters", value)
        known, is_right = _KNOWN.get(key, ("", lambda value: True))
        fields.check(is_right(value), f"{key} must be {known}", value)
    return {key: visible_json(value) for key, value in facts.items()}


def _read_metrics(fields: Fields) -> dict[str, float]:
    fields.check_names(entries=fields.limits.names)
    metrics = fields.rest
    if any(key in metrics for key in _EVALUATION):
        whole = {"num-examples", "density"} <= metrics.keys() and metrics.keys() & _MEASURES
        rule = "an evaluation needs num-examples, density, and an accuracy or a loss"
        fields.check(bool(whole), rule, sorted(metrics))
        metrics = {**metrics, "loss": _loss(metrics.get("loss", math.nan))}
    for key, value in metrics.items():
        fits = is_number(value) and abs(value) <= fields.limits.metric
        rule = f"metric {key} must be a finite number up to {fields.limits.metric:g}"
        fields.check(fits or (key == "loss" and value != value), rule, value)
    for key in _FRACTIONS:
        fields.check(0 <= metrics.get(key, 0) <= 1, f"{key} must be in 0..1", metrics.get(key))
    if "num-examples" in metrics:
        fields.of(metrics, keys.METRICS).number("num-examples", most=MOST_EXAMPLES)
    if (broken := check_decision(metrics)) is not None:
        fields.check(False, *broken)
    seconds = metrics.get("seconds", 0)
    fields.check(seconds >= 0, "seconds must be >= 0", seconds)
    return metrics


def _loss(value: Any) -> Any:
    """Loss of an evaluation; not a number where an app has none, or it is infinite.

    An evaluation that went wrong must not cost what was learned.
    """
    return math.nan if isinstance(value, float) and not math.isfinite(value) else value
