"""Reading of a personal model's file: tensors, and the network that they make."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flower_mcepl.errors import FingerprintError, FrameError, StateError
from flower_mcepl.masks.model import shared_module
from flower_mcepl.personal.elements import from_bytes, to_bytes
from flower_mcepl.personal.layout import (
    MASKED,
    RAW,
    Entry,
    Parts,
    damaged,
    split,
    tensors_digest,
)
from flower_mcepl.personal.network import named_tensors, network_of, part_of, seed_of, structure
from flower_mcepl.personal.probe import check_probe
from flower_mcepl.personal.recipes import Twisters, classes, restored
from flower_mcepl.wire import decode_frame

ModelFn = Callable[[], nn.Module]


@final
@dataclass(frozen=True)
class PersonalFile:
    """A personal model as its file has it.

    Parameters
    ----------
    facts : dict
        What the file says of it: ``algorithm``, ``agent``, ``task``, ``network``, ...
    tensors : dict
        Every parameter and buffer by name, the masked ones under their mask.
    masks : dict
        The mask of each masked weight, bool.
    fingerprint : str
        Of the frozen network that it was learned over, 32 hex digits.
    stored : int
        Bytes of weights that no recipe draws again.
    size : int
        Of the file in bytes.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    fingerprint: str
    stored: int
    size: int

    def network(self, model_fn: ModelFn | None = None) -> nn.Module:
        """The network in eval mode, with these tensors; see `load_personal`."""
        build = network_of(self.facts) if model_fn is None else model_fn
        whole = shared_module(build, seed=seed_of(self.facts))
        module = part_of(whole, self.facts).requires_grad_(False).eval()
        self._check_fits(module)
        with torch.no_grad():
            for name, tensor in named_tensors(module).items():
                tensor.copy_(self.tensors[name])
        check_probe(self.facts.get("probe"), module)
        return module

    def _check_fits(self, module: nn.Module) -> None:
        here, there = _kinds(named_tensors(module)), _kinds(self.tensors)
        if here != there:
            differ = sorted({name for name, _ in here.items() ^ there.items()})
            raise FingerprintError(
                "the model function must build the network that the file is of; they differ in "
                f"{', '.join(differ[:4])}{', ...' if len(differ) > 4 else ''}. Pass the model "
                "function of the run, with its settings."
            )
        if self.facts.get("structure") not in (None, structure(module)):
            raise FingerprintError(
                "the model function must build the network that the file is of; its layers are of "
                "other types. Pass the model function of the run, with its settings."
            )


def load_personal(path: str | Path, model_fn: ModelFn | None = None) -> nn.Module:
    """Load a personal model: an ordinary network in eval mode, ready to run.

    Parameters
    ----------
    path : str or Path
        A file that `save_personal` or ``flower-mcepl export`` wrote.
    model_fn : callable, optional
        ``model_fn()`` builds the network; its weights do not matter (default: what the
        file names, which must be importable here).

    Raises
    ------
    StateError
        If the file is damaged, or of a newer version.
    FingerprintError
        If the network is another one than the file's.
    ConfigError
        If no model function is known, or it fails.

    Examples
    --------
    >>> network = load_personal("agent-3.mask", AlexNetCifar)  # doctest: +SKIP
    """
    return read_personal(path).network(model_fn)


def read_personal(path: str | Path) -> PersonalFile:
    """Read a personal model's file without building its network.

    Raises
    ------
    StateError
        If it cannot be read, is damaged, or of a newer version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error}). Check the path.") from error
    return opened(data, where=str(path))


def opened(data: bytes, *, where: str) -> PersonalFile:
    """A personal model from the bytes of its file."""
    parts = split(data, where=where)
    masked = {entry.name: entry.shape for entry in parts.entries if entry.recipe in MASKED}
    twisters = Twisters(parts.entries)
    try:
        frame = decode_frame(
            bytes(parts.frame),
            layers=masked,
            dtype=torch.bool,
            prior=classes(parts.entries, twisters),
        )
    except FrameError as error:
        raise damaged(where, f"its masks cannot be read ({error})") from error
    masks = {name: frame.tensors[name] for name in masked}
    tensors, stored = _tensors(parts, masks, twisters, where)
    return PersonalFile(
        facts=dict(parts.facts),
        tensors=tensors,
        masks=masks,
        fingerprint=str(frame.header.fingerprint),
        stored=stored,
        size=parts.size,
    )


def _tensors(
    parts: Parts, masks: dict[str, Tensor], twisters: Twisters, where: str
) -> tuple[dict[str, Tensor], int]:
    """Every tensor, and the bytes of weights under masks that the file holds."""
    bits = {name: mask.numpy().reshape(-1) for name, mask in masks.items()}
    sizes = {e.name: e.value_bytes(int(bits.get(e.name, _NONE).sum())) for e in parts.entries}
    if sum(sizes.values()) != len(parts.values):
        raise damaged(where, "its values are too few or too many")
    tensors, at = {}, 0
    for entry in parts.entries:
        piece = memoryview(parts.values)[at : at + sizes[entry.name]]
        at += len(piece)
        flat = (
            from_bytes(piece, entry.dtype)
            if entry.recipe == RAW
            else restored(entry, bits[entry.name], piece, twisters)
        )
        tensors[entry.name] = flat.view(entry.shape)
    if tensors_digest(_elements(parts.entries, tensors)) != parts.digest:
        raise damaged(where, "its weights are not those that were written")
    return tensors, sum(sizes[name] for name in masks)


_NONE: NDArray[np.bool_] = np.zeros(0, np.bool_)


def _elements(
    entries: Sequence[Entry], tensors: dict[str, Tensor]
) -> Iterator[tuple[Entry, bytes]]:
    for entry in entries:
        yield entry, to_bytes(tensors[entry.name])


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
