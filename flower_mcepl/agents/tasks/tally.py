"""Metrics and loss of an evaluation, batch by batch, and what they must be."""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor

from flower_mcepl.agents.tasks.network import described
from flower_mcepl.data.pairs import parts_of
from flower_mcepl.errors import ConfigError, DataError, DivergedError, FlowerMceplError

if TYPE_CHECKING:
    from flower_mcepl.agents.tasks.task import Task

LOSS = "loss"


class Metric(Protocol):
    """Metric of one evaluation, as of torchmetrics: `update`, then `compute`."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch, on the CPU."""
        ...

    def compute(self) -> Any:
        """Return one number for all batches."""
        ...


@final
class Tally:
    """Metrics and loss of an evaluation, batch by batch."""

    def __init__(self, task: "Task", *, whose: str) -> None:
        self.task, self.whose = task, whose
        self._metrics = {name: self._made(name) for name in task.metrics}
        self._total, self._counted, self._seen = 0.0, 0, 0

    def _made(self, name: str) -> Metric:
        way_out = "Pass a function that gives them: lambda: Metric(num_classes=...)."
        with self._needs(name, "be made without arguments", way_out):
            return self.task.metrics[name]()

    @contextlib.contextmanager
    def _needs(self, name: str, rule: str, way_out: str) -> Iterator[None]:
        """Turn what a user's metric raises into an error that states the rule."""
        try:
            yield
        except FlowerMceplError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.whose}, task {self.task.name}: the task's metric {name} must {rule}; it "
                f"raised {type(error).__name__}: {first_line(error)}. {way_out}"
            ) from error

    def add(self, outputs: Tensor, targets: Tensor, inputs: Any) -> None:
        """Take in one batch, with targets as the loss takes them.

        Raises
        ------
        DataError, DivergedError
            If inputs or outputs are not finite.
        ConfigError
            If the task's loss or a metric cannot take them.
        """
        check_finite(outputs, inputs, whose=self.whose)
        with self.task.blamed("loss", outputs, targets, whose=self.whose):
            self._total += self.task.total(outputs, targets)
        self._counted += self.task.counted(targets)
        self._seen += len(targets)
        for name, metric in self._metrics.items():
            with self.task.blamed(f"metric {name}", outputs, targets, whose=self.whose):
                metric.update(outputs.cpu(), targets.cpu())

    def check(self, *, whole: bool) -> None:
        """Refuse metrics that are no numbers, of the batches so far, or made once.

        A metric that cannot be computed of some batches may be of all of them; so that
        it fails counts only where these are the ``whole`` split.

        Raises
        ------
        ConfigError
            If one is no number, an accuracy not in 0..1, or the same object each time.
        """
        for name, metric in self._metrics.items():
            if self._made(name) is metric:
                raise ConfigError(
                    f"{self.whose}, task {self.task.name}: the task's metric {name} must be made "
                    "anew for each evaluation; the same object came twice, and would count earlier "
                    "rounds and other agents, too. Make it inside the function that returns it."
                )
            try:
                value = metric.compute()
            except Exception:  # whatever a user's metric raises
                if whole:
                    self._number(name, metric)
                continue
            self._checked(name, value)

    def _number(self, name: str, metric: Metric) -> float:
        rule = f"compute one number of {self._seen} examples"
        with self._needs(name, rule, "Return float('nan') where it is not defined."):
            value = metric.compute()
        return self._checked(name, value)

    def _checked(self, name: str, value: Any) -> float:
        """A metric's value as a float."""
        whose = f"{self.whose}, task {self.task.name}: the task's metric {name}"
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{whose} must compute one number; got {described(value)}. Of torchmetrics, pass "
                'average="macro" or "micro"; of several numbers, make a metric of each.'
            ) from error
        if name == "accuracy" and not 0 <= number <= 1 and math.isfinite(number):
            raise ConfigError(
                f"{whose} must be a fraction in 0..1; got {number:g}. Divide it, if it is in "
                "percent, or give it another name."
            )
        return number

    def metrics(self) -> dict[str, float]:
        """Metrics that are defined, mean ``loss`` and ``num-examples``.

        Raises
        ------
        DataError
            If there was no batch, or nothing counted in any.
        ConfigError
            If a metric is no number.
        """
        if not self._seen:
            raise DataError(
                f"{self.whose} gave no batch: evaluation_batches must yield every example once."
            )
        self.task.check_counted(self._counted, self._seen, whose=self.whose)
        values = {name: self._number(name, metric) for name, metric in self._metrics.items()}
        defined = {name: value for name, value in values.items() if math.isfinite(value)}
        return {**defined, LOSS: self._total / self._counted, "num-examples": self._seen}


def first_line(error: Exception) -> str:
    """First line of what an error says."""
    return str(error).strip().partition("\n")[0]


def check_finite(outputs: Tensor, inputs: Any, *, whose: str) -> None:
    """Refuse outputs that are not finite: no metric of them means anything.

    Raises
    ------
    DataError
        If inputs are not finite either.
    DivergedError
        If the network itself makes them so.
    """
    if math.isfinite(float(outputs.detach().sum())) or bool(outputs.isfinite().all()):
        return
    for tensor in parts_of(inputs):
        bad = ~tensor.isfinite() if isinstance(tensor, Tensor) else torch.tensor(False)
        if bool(bad.any()):
            rows = int(bad.flatten(1).any(1).sum()) if bad.ndim > 1 else int(bad.sum())
            raise DataError(
                f"{whose} must hold finite inputs; {rows} of {len(tensor)} examples of a batch "
                "hold values that are infinite or not a number. Remove or fill them."
            )
    raise DivergedError(
        f"{whose}: the network's outputs are not finite, though its inputs are. Lower the step "
        "size."
    )
