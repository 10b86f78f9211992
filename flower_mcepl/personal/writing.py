"""Writing of a personal model's file: the fewest bytes that give every bit again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl.errors import StateError
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.model import fingerprint as fingerprint_of
from flower_mcepl.personal.elements import dtype_name, to_bytes
from flower_mcepl.personal.layout import (
    LIVE,
    MASKED,
    RAW,
    TERNARY,
    Draw,
    Entry,
    Parts,
    draws_fit,
    join,
    masks_fit,
    tensors_digest,
)
from flower_mcepl.personal.network import named_tensors, structure
from flower_mcepl.personal.origins import Origin, with_recipe
from flower_mcepl.personal.probe import probe_of
from flower_mcepl.personal.reading import opened
from flower_mcepl.personal.recipes import Twisters, classes
from flower_mcepl.wire import encode_frame


def save_personal(
    module: nn.Module,
    path: str | Path,
    *,
    origin: Origin | None = None,
    facts: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> int:
    """Write a personal model as one small file, in one step; return its size in bytes.

    Parameters
    ----------
    module : nn.Module
        The network with its weights under their masks, as from
        `Agent.personal_model`: a weight that is 0 is off.
    path : str or Path
        The file; its folder must be there.
    origin : Origin, optional
        The run that it comes from. With it frozen weights that are drawn from the run's
        seed take no bytes, and masks fewer; without it weights are stored.
    facts : mapping, optional
        What the file is to say of the model, JSON-able; ``network`` (`reference_to`)
        lets `load_personal` do without a model function.
    fingerprint : str, optional
        Of the frozen network (default: that of ``module``).
    input_shape : tuple of int, optional
        Shape of a batch of inputs, by which a reader checks that its network calculates
        the same.

    Raises
    ------
    UnsupportedLayerError
        If there is nothing to mask, or a tensor of a type that the file does not know.
    """
    data = personal_bytes(
        module,
        origin=origin,
        facts=facts,
        fingerprint=fingerprint,
        input_shape=input_shape,
    )
    replace_file(Path(path), data)
    return len(data)


def personal_bytes(
    module: nn.Module,
    *,
    origin: Origin | None = None,
    facts: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> bytes:
    """The bytes that `save_personal` writes; they were read back and compared."""
    layers = find_maskable(module)
    tensors = named_tensors(module)
    told = {**(facts or {}), "structure": structure(module)}
    if input_shape is not None:
        told["probe"] = probe_of(module, input_shape)
    draft = _Draft.of(tensors, set(layers), origin)
    fingerprint = fingerprint or fingerprint_of(module, layers)
    known = [{}] if origin is None else [{}, *origin.scores(layers)]
    known = [scores for scores in known if draft.draws_fit(scores)]
    data = min((draft.file(told, fingerprint, scores) for scores in known), key=len)
    _check_same(opened(data, where="the file").tensors, tensors)
    return data


@dataclass(frozen=True)
class _Draft:
    """Everything of a file but how its masks are coded."""

    entries: Sequence[Entry]
    flat: Mapping[str, Tensor]  # elements of each tensor, those that are off +0

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], masked: set[str], origin: Origin | None) -> "_Draft":
        parameters = sum(tensor.numel() for tensor in tensors.values())
        entries, flat = [], {}
        for name, tensor in tensors.items():
            flat[name] = tensor.detach().cpu().contiguous().reshape(-1)
            entry = Entry(name, dtype_name(name, tensor), tuple(tensor.shape), RAW)
            if name in masked:
                flat[name] = torch.where(flat[name] == 0, torch.zeros_like(flat[name]), flat[name])
                entry = with_recipe(entry, flat[name], origin, parameters=parameters)
                entry = replace(entry, rows=_rows_off(flat[name].view(tensor.shape)))
            entries.append(entry)
        return cls(entries, flat)

    def file(self, facts: Mapping[str, Any], fingerprint: str, scores: Mapping[str, Draw]) -> bytes:
        """The file whose masks are coded by these first scores."""
        entries = self._coded_by(scores)
        masks = {e.name: (self.flat[e.name] != 0).view(e.shape) for e in entries if _masked(e)}
        prior = classes(entries, Twisters(entries))
        frame = encode_frame(masks, sender=0, round=0, fingerprint=fingerprint, prior=prior)
        if not masks_fit(sum(map(torch.numel, masks.values())), len(frame)):
            frame = encode_frame(
                masks, sender=0, round=0, fingerprint=fingerprint, prior=prior, packed=True
            )
        digest = tensors_digest((entry, to_bytes(self.flat[entry.name])) for entry in entries)
        return join(Parts(facts, entries, frame, b"".join(self._values()), digest))

    def draws_fit(self, scores: Mapping[str, Draw]) -> bool:
        """Whether a reader would draw the words of these first scores."""
        return draws_fit(self._coded_by(scores))

    def _coded_by(self, scores: Mapping[str, Draw]) -> list[Entry]:
        return [replace(entry, scores=scores.get(entry.name)) for entry in self.entries]

    def _values(self) -> Iterator[bytes]:
        for entry in self.entries:
            flat = self.flat[entry.name]
            if entry.recipe == RAW:
                yield to_bytes(flat)
            elif entry.recipe == LIVE:
                yield to_bytes(flat[flat != 0])
            elif entry.recipe == TERNARY:
                negative = flat[flat != 0] < 0
                yield _packed(negative)


def _masked(entry: Entry) -> bool:
    return entry.recipe in MASKED


def _rows_off(tensor: Tensor) -> bytes:
    """Which rows are all off, packed; nothing where none is, or all are."""
    if tensor.ndim < 2 or not tensor.numel():
        return b""
    off = (tensor == 0).flatten(1).all(1)
    return _packed(off) if 0 < int(off.sum()) < len(off) else b""


def _packed(bits: Tensor) -> bytes:
    return np.packbits(bits.numpy()).tobytes()


def _check_same(read: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    for name, tensor in written.items():
        here, there = read[name], tensor.detach().cpu()
        if not bool(((here == there) | (here.isnan() & there.isnan())).all()):
            raise StateError(
                f"the file would not give {name} again. This is an error of flower_mcepl: report "
                "it with the network."
            )
