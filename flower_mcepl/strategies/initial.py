"""Input of an app written for FedAvg: the server's initial arrays and settings."""

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord
from numpy.typing import NDArray

from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.messages.order import AppInput


class InitialArrays:
    """Initial arrays of a run: once to every node, then their layout alone.

    A node that fails gets them again with its next message: it may be one that has lost
    its state. Agents of `make_client_app` make their own weights from the run's seed,
    and refuse initial arrays.

    Parameters
    ----------
    arrays : ArrayRecord
        As given to ``start``; with an empty one nothing is sent.
    train_config, evaluate_config : ConfigRecord
        As given to ``start``, for the app's train and evaluate functions.
    ledger : Ledger
        Where the bytes are counted, apart from those of the links.
    """

    def __init__(
        self,
        arrays: ArrayRecord,
        *,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        ledger: Ledger,
    ) -> None:
        self._arrays, self._ledger = arrays, ledger
        self._train_config, self._evaluate_config = train_config, evaluate_config
        self._layout = ArrayLayout.of(_numpy(arrays))
        self._have: set[int] = set()  # nodes whose last answer was sound

    def input_for(self, node: int) -> AppInput[Array] | None:
        """Part of this that a message for ``node`` needs; arrays are counted."""
        if not self._arrays:
            return None
        lacks = node not in self._have
        if lacks:
            self._ledger.add_initial(sum(len(array.data) for array in self._arrays.values()))
        return AppInput(
            layout=self._layout,
            arrays=self._arrays if lacks else None,
            train_config=self._train_config,
            evaluate_config=self._evaluate_config,
        )

    def about(self) -> dict[str, Any]:
        """Names, types and shapes for the record's config; empty without arrays."""
        return (
            {"initial_arrays": json.loads(self._layout.to_json())["arrays"]} if self._arrays else {}
        )

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts and arrays that a resumed run needs; none where there are no arrays."""
        return ({"layout": self._layout.to_json()} if self._arrays else {}), _numpy(self._arrays)

    def restore(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Take back what the run began with; tell whether that has the bits given now.

        The agents' states were learned from the former and bear their fingerprint.
        """
        if "layout" not in facts:
            return True
        given, self._layout = self._layout, ArrayLayout.from_json(facts["layout"])
        shapes = {name: shape for name, (_, shape) in self._layout.arrays.items()}
        self._arrays = ArrayRecord(
            {name: Array(arrays[name].reshape(shape)) for name, shape in shapes.items()}
        )
        return given == self._layout

    def note(self, node: int, *, sound: bool) -> None:
        """Note that the node answered as an agent, or that it failed."""
        if sound:
            self._have.add(node)
        else:
            self._have.discard(node)


def _numpy(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    return {name: array.numpy() for name, array in record.items()}
