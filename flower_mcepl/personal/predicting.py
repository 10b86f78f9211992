"""Predictions of a personal model for files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.tasks.network import one_output, taken
from flower_mcepl.errors import DataError
from flower_mcepl.personal.agents import PICKS
from flower_mcepl.personal.inputs import PIXELS, examples
from flower_mcepl.personal.reading import ModelFn, read_personal

AT_ONCE = 64  # inputs of a batch
Prediction = dict[str, Any]


def predict(
    model: str | Path,
    inputs: Iterable[str | Path],
    *,
    model_fn: ModelFn | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Iterator[Prediction]:
    """Predict for files with a personal model.

    Parameters
    ----------
    model : str or Path
        A ``.mask`` file.
    inputs : iterable of paths
        Arrays (``.npy``, ``.npz``) that are prepared as the app's data function does,
        one input or a batch each; images; folders of both.
    model_fn : callable, optional
        Builds the network, see `load_personal`.
    pixels : mapping, optional
        ``mean`` and ``std`` by which images become inputs (default: what the file
        says).

    Yields
    ------
    dict
        ``input``, its name; with a classification ``class`` and ``probability``, with a
        binary task ``probability``, else ``outputs``.

    Raises
    ------
    DataError
        If an input is not what the network takes.
    """
    file = read_personal(model)
    network = file.network(model_fn)
    probe = file.facts.get("probe")
    shape = tuple(probe["shape"][1:]) if probe else None
    if file.facts.get(PICKS):
        raise DataError(
            "what predict takes for the prediction is the network's one output, and the task of "
            "this file's run picks it by a function of its own, which no file holds. Call the "
            "network in Python: load_personal(path)(inputs); or export to .pt2, whose outputs are "
            "the predictions."
        )
    speak = _SPEAKERS.get(str(file.facts.get("task")), _outputs)
    found = examples(map(Path, inputs), shape, pixels or file.facts.get(PIXELS))
    for names, batch in _batches(found):
        outputs = _run(network, batch, names[0])
        for name, output in zip(names, outputs, strict=True):
            yield {"input": name, **speak(output)}


def _run(network: nn.Module, batch: Tensor, name: str) -> Tensor:
    # a network may squeeze a batch of one away
    given = batch if len(batch) > 1 else torch.cat([batch, batch])
    try:
        with torch.no_grad():
            outputs = one_output(network(taken(given, network)))
    except Exception as error:  # whatever a network says to an input that is not its own
        raise DataError(
            f"the network cannot take {name}, of shape {tuple(batch.shape[1:])} "
            f"({type(error).__name__}: {error}). Prepare inputs as the app's data function does."
        ) from error
    if outputs.shape[:1] != given.shape[:1]:
        raise DataError(
            f"the network must give an output for each input; for {len(given)}, {name} and those "
            f"with it, it gives {list(outputs.shape)}. Call it in Python: load_personal(path)."
        )
    outputs = outputs[: len(batch)]
    if not bool(outputs.isfinite().all()):
        raise DataError(f"the network's outputs for {name} and those with it are not finite.")
    return outputs


def _batches(found: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[list[str], Tensor]]:
    """Examples of one shape and type together, in their order."""
    names: list[str] = []
    rows: list[Tensor] = []
    for name, row in found:
        other = rows and (row.shape != rows[0].shape or row.dtype != rows[0].dtype)
        if other or len(rows) == AT_ONCE:
            yield names, torch.stack(rows)
            names, rows = [], []
        names.append(name)
        rows.append(row)
    if rows:
        yield names, torch.stack(rows)


def _class(output: Tensor) -> Prediction:
    if output.ndim != 1:
        return _outputs(output)
    probability, best = output.softmax(0).max(0)
    return {"class": int(best), "probability": float(probability)}


def _probability(output: Tensor) -> Prediction:
    if output.numel() != 1:
        return _outputs(output)
    return {"probability": float(output.sigmoid())}


def _outputs(output: Tensor) -> Prediction:
    return {"outputs": output.tolist()}


_SPEAKERS: dict[str, Callable[[Tensor], Prediction]] = {
    "classification": _class,
    "binary": _probability,
}
