"""Facts and arrays that are saved together, as safetensors with metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from flower_mcepl.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, NDArray[Any]]
_FACTS = "facts"  # key of the metadata


@dataclass(frozen=True)
class Bundle:
    """What survives a round, of an agent, a server, an exchange or a whole run.

    Names of arrays are paths: ``"inbox/3/bits"`` is ``"3/bits"`` in the group
    ``"inbox"``.

    Parameters
    ----------
    facts : dict
        JSON-able; after `decode` keys are texts, tuples lists, NumPy's numbers plain.
    arrays : dict
        NumPy arrays of booleans, integers or floats by name.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @classmethod
    def joined(
        cls, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, NDArray[Any]]]
    ) -> "Bundle":
        """Bundle of groups of arrays; `group` takes each apart again."""
        arrays = {
            f"{group}/{name}": array
            for group, named in groups.items()
            for name, array in named.items()
        }
        return cls(dict(facts), arrays)

    def group(self, name: str) -> Arrays:
        """Arrays of one group, under their names in it; empty if there is none."""
        return self.groups().get(name, {})

    def groups(self) -> dict[str, Arrays]:
        """Arrays by group and by name in it."""
        groups: dict[str, Arrays] = {}
        for path, array in self.arrays.items():
            group, _, name = path.partition("/")
            groups.setdefault(group, {})[name] = array
        return groups

    @classmethod
    def of_tensors(cls, facts: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "Bundle":
        """Bundle of torch tensors on the CPU, whose memory it shares."""
        return cls(dict(facts), {name: tensor.numpy() for name, tensor in tensors.items()})

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """Arrays as torch tensors on the CPU, which share their memory."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    def encode(self) -> bytes:
        """Bytes of a safetensors file; equal bundles have equal bytes."""
        arrays = {
            name: array if array.flags.c_contiguous else array.copy()
            for name, array in self.arrays.items()
        }
        facts = json.dumps(self.facts, sort_keys=True, default=_jsonable)
        return safetensors.numpy.save(arrays, metadata={_FACTS: facts})

    @classmethod
    def decode(cls, data: bytes) -> "Bundle":
        """Bundle from what `encode` gave, its arrays sorted by name.

        Raises
        ------
        StateError
            If the bytes are anything else.
        """
        try:
            # safetensors gives them in another order each time
            return cls(_facts(data), dict(sorted(safetensors.numpy.load(data).items())))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                "a saved state must be what this release of flower-mcepl saves; it cannot be "
                f"read ({error!r}). Use another copy, or start afresh without it."
            ) from error


def _jsonable(value: Any) -> Any:
    """What JSON can hold of a NumPy scalar or array."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"facts are values that JSON knows; got {type(value).__name__}: {value!r:.60}")


def _facts(data: bytes) -> dict[str, Any]:
    """Facts in the metadata of a safetensors file: 8 bytes of length, then JSON."""
    length = int(np.frombuffer(data, "<u8", count=1)[0])
    facts = json.loads(json.loads(bytes(data[8 : 8 + length]))["__metadata__"][_FACTS])
    if not isinstance(facts, dict):
        raise ValueError("its facts are no table")
    return facts
