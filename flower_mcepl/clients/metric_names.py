"""What an app calls its metrics: accuracy, loss and number of examples have no fixed names in Flower."""

import re
from collections.abc import Mapping
from typing import Any

from flower_mcepl.errors import AnswerError

NUM_EXAMPLES = "num-examples"  # the one name that FedAvg itself asks for
_ACCURACY = re.compile(r"((eval|evaluation|test|val|validation)-)?(accuracy|acc)")
_LOSS = re.compile(r"((eval|evaluation|test|val|validation)-)?(loss|log-?loss)")
_TRAIN_LOSS = re.compile(r"((train|training)-)?(loss|log-?loss)")


def read_training(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return ``train-loss`` and ``num-examples`` of an app's train metrics, where they are found."""
    loss = _find("train loss", metrics, None, _TRAIN_LOSS)
    found = {} if loss is None else {"train-loss": float(metrics[loss])}
    return {**found, **_num_examples(metrics)}


def read_evaluation(
    metrics: Mapping[str, Any], *, accuracy: str | None, loss: str | None
) -> dict[str, float]:
    """Return ``accuracy``, ``loss`` and ``num-examples`` of an app's evaluate metrics.

    Parameters
    ----------
    metrics : mapping
        As the app answered.
    accuracy, loss : str, optional
        Their names; None looks for a known one: ``accuracy`` or ``acc``, ``loss`` or
        ``logloss``, each also with ``eval``, ``test`` or ``val`` before it, with
        hyphens or underscores.

    Raises
    ------
    AnswerError
        If the accuracy or the number of examples is not there, two names fit, or the
        accuracy is no fraction. A loss that is not there is not a number.
    """
    name = _find("accuracy", metrics, accuracy, _ACCURACY)
    if name is None:
        raise AnswerError(
            f"an evaluation needs an accuracy; the app's evaluate metrics are {_told(metrics)}. "
            "Say which one it is: "
            'NeighborAverageMod(accuracy="NAME"); where there is none, '
            "NeighborAverageMod(evaluate=False)."
        )
    if not 0 <= float(metrics[name]) <= 1:
        raise AnswerError(
            f"an accuracy is a fraction in 0..1; the app's {name} is {metrics[name]}. Divide it."
        )
    examples = _num_examples(metrics)
    if not examples:
        raise AnswerError(
            f"FedAvg and this mod need {NUM_EXAMPLES!r} among the metrics; got {_told(metrics)}. "
            "Add it."
        )
    told = _find("loss", metrics, loss, _LOSS)
    return {
        "accuracy": float(metrics[name]),
        "loss": float("nan" if told is None else metrics[told]),
        **examples,
    }


def _find(
    what: str, metrics: Mapping[str, Any], name: str | None, known: re.Pattern[str]
) -> str | None:
    if name is not None:
        if not _is_number(metrics.get(name)):
            raise AnswerError(
                f"the {what} was said to be {name!r}; the app's metrics are {_told(metrics)}. "
                "Name another."
            )
        return name
    fits = [
        key for key, value in metrics.items() if known.fullmatch(_plain(key)) and _is_number(value)
    ]
    if len(fits) > 1:
        raise AnswerError(
            f"several of the app's metrics may be the {what}: {', '.join(fits)}. Say which one it "
            "is: NeighborAverageMod(accuracy=..., loss=...)."
        )
    return fits[0] if fits else None


def _num_examples(metrics: Mapping[str, Any]) -> dict[str, float]:
    told = [metrics[key] for key in (NUM_EXAMPLES, "num_examples") if _is_number(metrics.get(key))]
    return {NUM_EXAMPLES: int(told[0])} if told else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _told(metrics: Mapping[str, Any]) -> str:
    return ", ".join(metrics) or "empty"
