"""Answers as Flower brings them, and its wrapping of frames, arrays and errors."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from flower_mcepl.errors import AnswerError, FlowerMceplError, visible
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.messages.answer import from_records
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.messages.limits import LIMITS

# what an app, or a mod before ours, says that looks for FedAvg's records
_OF_FEDAVG = ("KeyError: 'arrays'", "KeyError: 'config'", "KeyError: 'fitins.parameters'")
_WITHOUT_MOD = (
    "That is a record of FedAvg's messages: the ClientApp needs mods=[neighbor_average_mod, ...], "
    "before its other mods (docs/existing-apps.md)"
)


def read_answer(
    node: str, content: RecordDict, known: Mapping[str, Any] | None = None
) -> tuple[int, Answer[Array]]:
    """Agent that answers, and its answer, checked.

    Parameters
    ----------
    node : str
        How to call the node in an error.
    content : RecordDict
        What it sent.
    known : mapping, optional
        Its handshake from an earlier answer, which it need not repeat; if it does, the
        new one counts.

    Raises
    ------
    AnswerError
        If it is not a whole answer of an agent.
    """
    try:
        answer = from_records(content)
        return int(answer.facts["agent"]), _with_handshake(answer, known or {})
    except Exception as error:  # one node must not end the run, whatever it has found to send
        reason = str(error) if isinstance(error, FlowerMceplError) else repr(error)
        raise AnswerError(
            f"{node} does not answer as an agent ({visible(reason[:300])}); its records are "
            f"{visible(', '.join(content)[:300])}. Let its ClientApp be one of make_client_app, of "
            "the same release of flower-mcepl as here."
        ) from error


def _with_handshake(answer: Answer[Array], known: Mapping[str, Any]) -> Answer[Array]:
    if answer.introduces:
        return answer
    if known.get("agent") != answer.facts["agent"]:
        raise AnswerError(
            f"agent {answer.facts['agent']} must introduce itself; got no handshake of it"
        )
    return replace(answer, facts={**known, **answer.facts})


def frame_bytes(array: Array) -> bytes:
    """Frame in an array, as it came."""
    return open_envelope(array.data)


def frame_array(frame: bytes) -> Array:
    """Array around a frame, as the agents make it: equal frames give equal arrays."""
    return Array(np.frombuffer(frame, np.uint8))


def array_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Record of the arrays themselves.

    Flower's own constructor makes new ones, of which it then hashes every byte again,
    for each receiver.
    """
    record = ArrayRecord()
    record.update(arrays)
    return record


def plain_reason(reason: str | None) -> str:
    """Class and text of a client's exception, without Flower's and Ray's wrapping.

    The errors of this package stand alone: their text says all, the agent included. It
    is cut, and its control characters are made visible.
    """
    text = visible((reason or "no reason given")[-LIMITS.error :], lines=True)
    wrapped = re.fullmatch(r"<class '(.*?)'>:<'(.*)'>", text, re.DOTALL)
    kind, text = (wrapped[1], wrapped[2]) if wrapped else ("", text)
    trace, in_ray, text = text.rpartition("ClientAppException occurred. Message: ")
    text = text.strip()
    if in_ray:  # the class that counts is that of the cause, in the traceback
        ending = f": {re.escape(text)}" if text else ""
        raised = re.search(rf"^([\w.]+){ending}$", trace, re.MULTILINE)
        kind = raised[1] if raised else ""
    name = "" if kind.startswith("flower_mcepl.") else kind.rpartition(".")[2]
    plain = ": ".join(part for part in (name, text) if part)
    return f"{plain}. {_WITHOUT_MOD}" if plain in _OF_FEDAVG else plain
