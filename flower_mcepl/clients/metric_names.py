"""Names of an app's metrics, for which Flower has no rule: accuracy, loss, examples."""

import math
import re
from collections.abc import Mapping
from typing import Any

from flower_mcepl.agents.parts.own_metrics import further_metrics
from flower_mcepl.errors import AnswerError

NUM_EXAMPLES = "num-examples"  # the one name that FedAvg itself asks for
_EXAMPLES = (NUM_EXAMPLES, "num_examples")
_ACCURACY = re.compile(r"((eval|evaluation|test|val|validation)-)?(accuracy|acc)")
_LOSS = re.compile(r"((eval|evaluation|test|val|validation)-)?(loss|log-?loss)")
_TRAIN_LOSS = re.compile(r"((train|training)-)?(loss|log-?loss)")


def read_training(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``train-loss`` and ``num-examples`` of an app's train metrics, if they are there.

    A loss that is not finite is left out: there would be no mean over the agents. Where
    there are ``train_loss`` and ``loss``, the former counts.
    """
    named = {key: value for key, value in metrics.items() if key.lower().startswith("train")}
    only_one = "Let the train function return one of them."
    name = _find("train loss", named, None, _TRAIN_LOSS, only_one)
    name = name or _find("train loss", metrics, None, _TRAIN_LOSS, only_one)
    loss = math.nan if name is None else float(metrics[name])
    return {**({"train-loss": loss} if math.isfinite(loss) else {}), **_num_examples(metrics)}


def read_evaluation(
    metrics: Mapping[str, Any], *, accuracy: str | None, loss: str | None
) -> dict[str, float]:
    """``accuracy``, ``loss``, ``num-examples`` and what else an app measures.

    One of the first two is enough. Further metrics that are finite numbers keep their
    names; others are left out (`further_metrics`).

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
        If neither accuracy nor loss is there, or no number of examples, two names fit,
        or the accuracy is no fraction. It costs the evaluation alone. An accuracy that
        is not a number, as of no examples, is none where there is a loss.
    """
    name = _find("accuracy", metrics, accuracy, _ACCURACY)
    named = _find("loss", metrics, loss, _LOSS)
    if name is not None and math.isnan(metrics[name]) and named is not None:
        name = None  # not defined, as of no examples
    if name is None and named is None:
        raise AnswerError(
            "an evaluation needs an accuracy or a loss, one number; the app's metrics are "
            f"{_names(metrics)}. "
            'Say which it is: NeighborAverageMod(accuracy="NAME"), or none: (evaluate=False).'
        )
    if name is not None and not 0 <= float(metrics[name]) <= 1:
        raise AnswerError(
            f"an accuracy is a fraction in 0..1; the app's {name} is {metrics[name]}. Divide it."
        )
    examples = _num_examples(metrics)
    if not examples:
        raise AnswerError(
            f"FedAvg and this mod need {NUM_EXAMPLES!r} among the metrics; got {_names(metrics)}. "
            "Add it, a number >= 0."
        )
    return {
        **further_metrics(metrics, besides=(name, named, *_EXAMPLES)),
        **({} if name is None else {"accuracy": float(metrics[name])}),
        "loss": math.nan if named is None else float(metrics[named]),
        **examples,
    }


def _find(
    what: str,
    metrics: Mapping[str, Any],
    name: str | None,
    known: re.Pattern[str],
    way_out: str = "Say which one it is: NeighborAverageMod(accuracy=..., loss=...).",
) -> str | None:
    if name is not None:
        if not _is_number(metrics.get(name)):
            raise AnswerError(
                f"the {what} was said to be {name!r}; the app's metrics are {_names(metrics)}. "
                "Name another."
            )
        return name
    fits = [
        key
        for key, value in metrics.items()
        if known.fullmatch(_in_kebab_case(key)) and _is_number(value)
    ]
    if len(fits) > 1:
        raise AnswerError(
            f"several of the app's metrics may be the {what}: {', '.join(fits)}. {way_out}"
        )
    return fits[0] if fits else None


def _num_examples(metrics: Mapping[str, Any]) -> dict[str, float]:
    values = [metrics[key] for key in _EXAMPLES if _is_number(metrics.get(key))]
    counts = [int(value) for value in values if math.isfinite(value) and value >= 0]
    return {NUM_EXAMPLES: counts[0]} if counts else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_kebab_case(name: str) -> str:
    return name.lower().replace("_", "-")


def _names(metrics: Mapping[str, Any]) -> str:
    return ", ".join(metrics) or "empty"
