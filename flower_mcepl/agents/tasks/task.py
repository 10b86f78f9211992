"""Task: loss, metrics and fitting targets, in one value for every algorithm."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from flower_mcepl.agents.tasks.losses import flaw_of
from flower_mcepl.agents.tasks.network import call, described, one_output
from flower_mcepl.agents.tasks.tally import LOSS, Metric, Tally, first_line
from flower_mcepl.config.checks import check
from flower_mcepl.config.registry import Registry
from flower_mcepl.data.batches import BatchSource
from flower_mcepl.errors import ConfigError, DataError, FlowerMceplError

# what an evaluation says beside the metrics, and columns of a record's lines
TAKEN = (
    *(LOSS, "num-examples", "density", "seconds", "train-loss", "metrics", "round", "agent"),
    *("sent-bytes", "received-bytes", "uplink-bytes", "clock", "closing"),
    *("best-round", "best-value", "keep-best-round", "keep-best-value"),
)
OF_TRAINING = "train-"  # begins the names of what training measures


def as_they_are(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the targets: an own task's loss checks them itself."""
    return targets


def is_free(name: str) -> bool:
    """Whether an evaluation's metric may have a name: it has no other meaning."""
    return name not in TAKEN and not name.startswith(OF_TRAINING)


def _examples(targets: Tensor) -> int:
    return len(targets)


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """What agents learn to predict: a loss, metrics, and the targets that fit them.

    Parameters
    ----------
    loss : callable
        ``loss(outputs, targets)`` returns the mean over a batch, a float scalar.
    metrics : mapping of str to callable (default: none)
        Name to what makes a fresh metric, such as a class of torchmetrics or a
        ``lambda`` of one. Names are lowercase in kebab-case; ``loss`` is always there.
    main : str (default: "loss")
        Which of them stands for the run in tables and plots.
    higher_is_better : bool (default: False)
        Direction of the main one.
    unit : str (default: "")
        Unit of the main one, as on an axis; ``"fraction"`` for values in 0..1.
    name : str (default: "own")
        Name in records, the same on all devices.
    targets : callable
        ``targets(outputs, targets)`` returns targets as the loss takes them, or raises
        a DataError that says what they must be (default: they stay as they are).
    outputs : callable
        Picks the tensor that counts from what the network returns (default: where there
        is one meaning, see `flower_mcepl.agents.tasks.network.one_output`).
    counted : callable
        Number of predictions in a batch of targets, over which the loss is a mean
        (default: their length). A split in which none counts is refused.
    total_loss : callable, optional
        The loss as a sum instead of a mean, where that is more exact.
    logits : bool (default: False)
        Whether the loss itself applies the sigmoid or softmax: a network that ends in
        one is warned of.

    Raises
    ------
    ConfigError
        If the main metric is none of the metrics, or a name is taken.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Callable[[], Metric]] = field(default_factory=dict)
    main: str = LOSS
    higher_is_better: bool = False
    unit: str = ""
    name: str = "own"
    targets: Callable[[Tensor, Tensor], Tensor] = as_they_are
    outputs: Callable[[Any], Tensor] = one_output
    counted: Callable[[Tensor], int] = _examples
    total_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    logits: bool = False

    def __post_init__(self) -> None:
        self._check_loss_is_fixed()
        for name, make in self.metrics.items():
            check(
                callable(make) and (isinstance(make, type) or not hasattr(make, "compute")),
                f"metric {name} must be what makes a fresh one for each evaluation",
                type(make).__name__,
                "Pass its class, or a function without arguments that returns a new one.",
            )
            check(
                is_free(name) and name == name.lower().replace("_", "-").strip(),
                "names of metrics are lowercase, in kebab-case, none of "
                f"{', '.join(TAKEN)}, and do not begin with {OF_TRAINING}",
                name,
            )
        check(
            self.main == LOSS or self.main in self.metrics,
            f"a task's main metric must be one of {', '.join([*self.metrics, LOSS])}",
            self.main,
        )
        check(
            self.main != LOSS or not self.higher_is_better,
            "a loss gets better as it falls; higher_is_better",
            self.higher_is_better,
            "Name the metric that rises as main.",
        )

    def _check_loss_is_fixed(self) -> None:
        parameters = self.loss.parameters() if isinstance(self.loss, torch.nn.Module) else ()
        check(
            not any(parameter.requires_grad for parameter in parameters),
            "a task's loss must have no weights to train: nothing trains, sends or saves them",
            type(self.loss).__name__,
            "Put them into the network, whose outputs the loss compares with the targets; or "
            "freeze them with loss.requires_grad_(False).",
        )

    def predict(
        self,
        network: Callable[..., Any],
        inputs: Any,
        targets: Any,
        *,
        whose: str,
        device: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of a network for a batch, and its targets as the loss takes them.

        Parameters
        ----------
        network : callable
            What is called with the inputs.
        inputs : tensor, tuple, list or mapping of tensors
            See `flower_mcepl.agents.tasks.network.call`.
        targets : tensor
            As the split has them.
        whose : str
            Whose batch it is, such as ``"agent 3's training split"``, for errors.
        device : str
            Where to calculate.
        dtype : torch.dtype
            Of the network's float weights.

        Raises
        ------
        DataError
            If outputs or targets are not what the task needs.
        """
        given = call(network, inputs, device=device, dtype=dtype)
        return self.fitting_pair(given, targets, whose=whose)

    def fitting_pair(self, given: Any, targets: Any, *, whose: str) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a batch as the loss takes them.

        Raises
        ------
        DataError
            If what the network gives, or the targets, are not what the task needs.
        """
        with self._naming(whose):
            outputs = self.outputs(given)
        return outputs, self.fitting(outputs, targets, whose=whose)

    def fitting(self, outputs: Tensor, targets: Any, *, whose: str) -> Tensor:
        """Targets of a batch as the loss takes them.

        Raises
        ------
        DataError
            If outputs or targets are not what the task needs.
        """
        with self._naming(whose):
            if not isinstance(targets, Tensor):
                raise DataError(
                    f"targets must be a tensor; got {described(targets)}. Give each class a "
                    "whole number from 0 in the dataset."
                )
            return self.targets(outputs, targets.to(outputs.device))

    def evaluate(
        self,
        network: torch.nn.Module,
        split: BatchSource,
        *,
        whose: str,
        batch_size: int,
        device: str,
        dtype: torch.dtype,
    ) -> dict[str, float]:
        """Metrics, mean ``loss`` and ``num-examples`` of a network over a split.

        A metric that is not defined, such as R² of one example, is left out.

        Raises
        ------
        DataError
            If the split gives no batch, or a batch does not fit the task.
        DivergedError
            If an output is not finite.
        """
        network.eval()
        tally = Tally(self, whose=whose)
        with torch.no_grad():
            for inputs, given in split.evaluation_batches(batch_size=batch_size):
                outputs, targets = self.predict(
                    network, inputs, given, whose=whose, device=device, dtype=dtype
                )
                tally.add(outputs, targets, inputs)
        return tally.metrics()

    def facts(self) -> dict[str, Any]:
        """Facts for the handshake: the task, and its main metric with its direction."""
        return {
            "task": self.name,
            "main-metric": self.main,
            "higher-is-better": self.higher_is_better,
            **({"metric-unit": self.unit} if self.unit else {}),  # Flower's mods trip over ""
        }

    def check_loss(self, outputs: Tensor, targets: Tensor, *, whose: str) -> None:
        """Refuse a loss that is no mean over a batch.

        Raises
        ------
        ConfigError
            If it fails, gives something else than a float scalar, is a sum, or compares
            outputs with the targets of other examples.
        """
        with self.blamed("loss", outputs, targets, whose=whose):
            flaw = flaw_of(self.loss, outputs, targets)
        if flaw:
            raise ConfigError(f"{whose}, task {self.name}: {flaw}")

    def check_counted(self, counted: int, num_examples: int, *, whose: str) -> None:
        """Refuse a split in which nothing counts: it has neither loss nor metrics.

        Raises
        ------
        DataError
            If ``counted``, the number of predictions that count, is zero.
        """
        if not counted:
            raise DataError(
                f"{whose}, task {self.name}: at least one target must count; of {num_examples} "
                "examples all targets are marked to be ignored. Label some, or leave this agent "
                "out of the graph."
            )

    @contextlib.contextmanager
    def blamed(self, what: str, outputs: Tensor, targets: Tensor, *, whose: str) -> Iterator[None]:
        """Turn what a user's loss or metric raises into an error that names it."""
        try:
            yield
        except FlowerMceplError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{whose}, task {self.name}: the task's {what} must take a batch; given outputs "
                f"{described(outputs)} and targets {described(targets)} it raised "
                f"{type(error).__name__}: {first_line(error)}. Change it, or let the task's "
                "targets= bring targets to what it takes."
            ) from error

    def total(self, outputs: Tensor, targets: Tensor) -> float:
        """Loss of a batch as a sum over what counts."""
        if self.total_loss is not None:
            return float(self.total_loss(outputs, targets))
        count = self.counted(targets)
        return float(self.loss(outputs, targets)) * count if count else 0.0

    @contextlib.contextmanager
    def _naming(self, whose: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{whose}, task {self.name}: {error}") from error


TASKS = Registry(
    "flower_mcepl.tasks",
    Task,
    {
        name: f"flower_mcepl.agents.tasks.kinds:{name.upper()}"
        for name in (
            "classification",
            "binary",
            "multilabel",
            "regression",
            "segmentation",
            "tokens",
        )
    },
    noun="task",
)


def find_task(task: "Task | str") -> Task:
    """Return a task, or the one of that name.

    Raises
    ------
    ConfigError
        If there is none of that name, or it is neither.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str):
        raise ConfigError(
            f"task must be one of {', '.join(TASKS)}, or a Task; got {type(task).__name__}."
        )
    return TASKS.find(task)
