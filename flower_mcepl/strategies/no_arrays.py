"""Arrays of a result without a global model: whoever asks for them is told the way."""

from collections.abc import Callable
from logging import WARNING, getLogger
from typing import Any, NoReturn

from flwr.app import ArrayRecord, MetricRecord

from flower_mcepl.errors import ConfigError
from flower_mcepl.record.writing import RunRecord

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
logger = getLogger("flwr")


class _NoGlobalModelError(ConfigError):
    """Somebody asked for the arrays of a global model, which there is none of."""


class NoArrays(ArrayRecord):
    """An empty record that says where the agents' models are, instead of being saved.

    Parameters
    ----------
    place : str
        Where they are.
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def to_torch_state_dict(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: there is no global model."""
        self._refuse()

    def to_numpy_ndarrays(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: there is no global model."""
        self._refuse()

    def __missing__(self, key: object) -> NoReturn:
        """Refuse: there is no global model."""
        self._refuse()

    def __getitem__(self, key: Any) -> NoReturn:
        """Refuse: there is no global model."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise _NoGlobalModelError(
            "a run in which every agent has its own model has no global one: result.arrays holds "
            f"none. {self._place} Take out of the server app what evaluates or saves them."
        )


def place_of_models(record: RunRecord | None) -> str:
    """Where the agents' models are."""
    if record is None:
        return "Each agent keeps its own; a strategy with a record collects simulated ones."
    return (
        f"Simulated agents' models are in {record.agents_dir} (flower-mcepl show {record.path}); "
        "a device keeps its own in its state-dir."
    )


class CentralEvaluation:
    """The user's ``evaluate_fn``, called between rounds while it asks for no model."""

    def __init__(self, evaluate_fn: EvaluateFn | None, arrays: NoArrays) -> None:
        self._evaluate_fn, self._arrays = evaluate_fn, arrays

    def __call__(self, round: int) -> MetricRecord | None:
        """Metrics of the user's function; None where there are none, or no function."""
        if self._evaluate_fn is None:
            return None
        try:
            return self._evaluate_fn(round, self._arrays)
        except _NoGlobalModelError as error:
            self._evaluate_fn = None
            logger.log(
                WARNING,
                "evaluate_fn is not called again: %s Agents evaluate their own (evaluate-every).",
                error,
            )
            return None
