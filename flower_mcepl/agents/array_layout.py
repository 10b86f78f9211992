"""Layout of an app's arrays: names, types and shapes, in their order."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.errors import AnswerError, ConfigError

Arrays = Mapping[str, NDArray[Any]]
"""An app's arrays by name; the order counts, as apps without names go by it."""


@dataclass(frozen=True)
class ArrayLayout:
    """Names, types and shapes of an app's first arrays, and a digest of their bits.

    Parameters
    ----------
    arrays : mapping
        Name to NumPy type (such as ``"float32"``) and shape, in the app's order.
    fingerprint : str
        32 hex digits, which differ when a name, type, shape, the order or one bit of
        the first arrays differs.
    """

    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    fingerprint: str

    @classmethod
    def of(cls, arrays: Arrays) -> "ArrayLayout":
        """Describe the first arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in arrays.items():
            digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return cls(
            {name: (array.dtype.str, array.shape) for name, array in arrays.items()},
            digest.hexdigest(),
        )

    def to_json(self) -> str:
        """Return it as text; `from_json` takes it back."""
        arrays = [[name, dtype, list(shape)] for name, (dtype, shape) in self.arrays.items()]
        return json.dumps({"fingerprint": self.fingerprint, "arrays": arrays})

    @classmethod
    def from_json(cls, text: str) -> "ArrayLayout":
        """Take back what `to_json` gave."""
        layout = json.loads(text)
        return cls(
            {name: (dtype, tuple(shape)) for name, dtype, shape in layout["arrays"]},
            layout["fingerprint"],
        )

    def averaged(self) -> list[str]:
        """Names of the arrays that are averaged: those of floating-point numbers.

        Raises
        ------
        ConfigError
            If there are none, or an array is of a type that cannot be kept.
        """
        for name, (dtype, _) in self.arrays.items():
            if (
                np.dtype(dtype).kind not in "fiub"
                or not np.dtype(dtype).isnative
                or np.dtype(dtype).itemsize > 8
            ):
                raise ConfigError(
                    "an app's arrays must be of floats, integers or booleans of at most 64 bits, "
                    f"in the byte order of this machine; {name!r} is {np.dtype(dtype)}. Keep it "
                    "out of the ArrayRecord."
                )
        floats = [name for name, (dtype, _) in self.arrays.items() if np.dtype(dtype).kind == "f"]
        if not floats:
            raise ConfigError(
                "neighbors average arrays of floats, and the app has none; its initial arrays "
                f"are {self._names()}. Pass the model's arrays to "
                "GossipStrategy.start(initial_arrays=...), as to FedAvg."
            )
        return floats

    def take(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return what an app gave, in this order and of these types.

        A type is widened where that loses nothing (float32 to float64); nothing else is
        cast.

        Raises
        ------
        AnswerError
            If a name is missing or new, a shape differs, or a type cannot be had
            without loss.
        """
        if arrays.keys() != self.arrays.keys():
            raise AnswerError(
                f"the app must return the arrays that it got; got {self._names()}, returned "
                f"{_named(list(arrays))}. Return the whole model under the same names."
            )
        return {name: self._taken(name, arrays[name]) for name in self.arrays}

    def _taken(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        dtype, shape = np.dtype(self.arrays[name][0]), self.arrays[name][1]
        if array.shape != shape or not np.can_cast(array.dtype, dtype, "safe"):
            raise AnswerError(
                f"the app must return arrays of the shapes and types that it got; {name!r} was "
                f"{dtype} {shape} and came back as {array.dtype} {array.shape}. Let the app keep "
                "them, or begin with such arrays: GossipStrategy.start(initial_arrays=...)."
            )
        return array.astype(dtype, copy=False)

    def _names(self) -> str:
        return _named(list(self.arrays))


def _named(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:8])) or "none"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
