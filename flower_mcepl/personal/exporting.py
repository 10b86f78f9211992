"""Export to ``torch.export`` and ONNX, checked on real inputs before it counts."""

import contextlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.tasks.network import described, one_output, taken
from flower_mcepl.config.extras import needs_extra
from flower_mcepl.errors import ConfigError, UnsupportedLayerError
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.personal.agents import Picked

TOLERANCE = 1e-4  # of outputs in another runtime, relative to the largest, at least 1
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree on the same inputs."""

    num_inputs: int
    difference: float  # the largest, of any output
    scale: float  # the largest output, at least 1
    num_other: int  # inputs whose largest output is another one

    def holds(self, tolerance: float) -> bool:
        """Whether they give the same for some inputs: outputs and predictions."""
        near = self.difference <= tolerance * self.scale
        return self.num_inputs > 0 and near and not self.num_other

    def __str__(self) -> str:
        same = f"{self.num_inputs - self.num_other} of {self.num_inputs}"
        return f"outputs within {self.difference:.1e}, the same prediction for {same} inputs"


def agreement(one: Run, other: Run, batches: Iterable[Tensor]) -> Agreement:
    """Compare the outputs of two networks for all batches."""
    count, difference, scale, others = 0, 0.0, 1.0, 0
    with torch.no_grad():
        for inputs in batches:
            left, right = one(inputs), other(inputs)
            if left.shape != right.shape:
                return Agreement(len(inputs), math.inf, 1.0, len(inputs))
            gap = (left - right).abs()
            count += len(inputs)
            # not a number counts as infinitely far
            difference = max(difference, float(gap.nan_to_num(math.inf).max()))
            scale = max(scale, float(left.abs().max()))
            others += _num_other(left, right)
    return Agreement(count, difference, scale, others)


def _num_other(left: Tensor, right: Tensor) -> int:
    if left.ndim < 2:
        return 0
    return int((left.argmax(1) != right.argmax(1)).reshape(len(left), -1).any(1).sum())


def tensor_batches(batches: Iterable[tuple[Any, Any]], network: nn.Module) -> list[Tensor]:
    """Inputs of the batches of a split, as the network takes them.

    Raises
    ------
    ConfigError
        If they are not one tensor each.
    """
    inputs = [given for given, _ in batches]
    if not inputs:
        raise ConfigError(
            "an exported graph is checked on the agent's evaluated split, which gave no batch. "
            "Export to .mask."
        )
    for given in inputs:
        if not isinstance(given, Tensor):
            raise ConfigError(
                "torch.export and ONNX are for networks with one input tensor; got "
                f"{described(given)}. Export to .mask, which holds any network."
            )
    return [taken(given, network) for given in inputs]


def export_program(module: nn.Module, path: Path, batches: Sequence[Tensor]) -> Agreement:
    """Write a network by ``torch.export``, for batches of any size.

    Raises
    ------
    UnsupportedLayerError
        If the network cannot be exported, or what is read back gives something else.
    """
    program = _program(module, batches[0])
    with _draft(path) as draft:
        torch.export.save(program, draft)
        again = torch.export.load(draft).module()
        return _accepted(draft, path, agreement(run_of(module), run_of(again), batches))


def export_onnx(module: nn.Module, path: Path, batches: Sequence[Tensor]) -> Agreement:
    """Write a network as ONNX, for batches of any size; onnxruntime must agree.

    Raises
    ------
    ConfigError
        If the packages of the extra ``export`` are not here.
    UnsupportedLayerError
        If the network cannot be exported, or onnxruntime gives something else.
    """
    with needs_extra("export", what="ONNX files"):
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401

    with torch.no_grad():
        alone = isinstance(module(batches[0][:2]), Tensor)
    # ONNX has no mappings: which of several outputs counts would be lost
    program = _program(module if alone else Picked(module, one_output), batches[0])
    with _draft(path) as draft, _quiet():
        _convert(program, draft)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def there(inputs: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])

        return _accepted(draft, path, agreement(run_of(module), there, batches))


def _convert(program: torch.export.ExportedProgram, draft: str) -> None:
    try:
        converted = torch.onnx.export(program, dynamo=True, verbose=False)
        assert converted is not None
        converted.save(draft, external_data=False)
    except Exception as error:  # whatever the exporter meets; torch before 2.7 knows no program
        raise UnsupportedLayerError(
            f"torch {torch.__version__} cannot make ONNX of the network ({type(error).__name__}: "
            f"{_first_line(error)}). It takes torch 2.7 and layers that ONNX has; export to .pt2 "
            "or .mask."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def run_of(module: Callable[..., Any]) -> Run:
    """A network as a function of its one input."""
    return lambda inputs: one_output(module(inputs))


def _program(module: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """The graph of a network, for batches of any size."""
    # a batch of one would count as a fixed size
    example = inputs[:2] if len(inputs) > 1 else torch.cat([inputs, inputs])
    sizes = ({0: torch.export.Dim("batch")},)
    try:
        with _quiet():
            return torch.export.export(module.eval(), (example,), dynamic_shapes=sizes)
    except Exception as error:  # whatever a network's code does to torch.export
        raise UnsupportedLayerError(
            f"torch.export cannot take {type(module).__name__} ({type(error).__name__}: "
            f"{_first_line(error)}). Export to .mask, which "
            "holds any network, or make its forward one that torch.export takes."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters' warnings about themselves away."""
    with warnings.catch_warnings(action="ignore"):
        yield


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[str]:
    """Place of a file that is made and checked before it goes where it belongs."""
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder) / f"model{path.suffix}")


def _accepted(draft: str, path: Path, found: Agreement) -> Agreement:
    """Put the file where it belongs, if it gives what the network gives."""
    if not found.holds(TOLERANCE):
        raise UnsupportedLayerError(
            f"an exported network must give what the network gives, within {TOLERANCE:g} of its "
            f"largest output; {path.name} has {found}. It was not written. Export to .mask."
        )
    replace_file(path, Path(draft).read_bytes())
    return found
