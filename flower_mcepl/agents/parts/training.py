"""Local training: length, step sizes, batches and divergence, whatever is trained."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from flower_mcepl.agents.parts.arithmetic import ARITHMETICS, arithmetic, keep_freed_memory
from flower_mcepl.agents.tasks import Task, find_task
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, field_keys, read_fields
from flower_mcepl.data.batches import Batch, BatchSource, batches_per_pass
from flower_mcepl.errors import DataError, DivergedError, UnsupportedLayerError
from flower_mcepl.streams import isolated_rng, torch_stream

LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Parameters of local training that every algorithm has.

    The defaults are the reference setting of MCE-PL.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # what is learned: or binary, multilabel, regression, segmentation, tokens
    task: "Task | str" = "classification"
    weight_decay: float = 5e-4  # μ >= 0, on what is trained
    momentum: float = 0.0  # of the local steps, 0 <= momentum < 1; the paper has none
    batch_size: int = 128
    local_steps: int = 1  # mini-batches a round
    local_epochs: int = 0  # passes over the training split a round; if > 0 it replaces local_steps
    lr_schedule: str = "constant"  # "cosine": the step sizes fall to zero over lr_rounds
    # length of the cosine in rounds; a run config that has none means its num-rounds
    lr_rounds: int = 0
    # length in rounds of a linear warmup: round t of it has t / lr_warmup of its step
    lr_warmup: int = 0
    # of the network, in training and evaluation: "exact": torch's own; "fast",
    # "bfloat16": see `agents.parts.arithmetic`
    arithmetic: str = "exact"
    eval_batch_size: int = 64  # large ones are slower on a CPU: activations that leave the cache

    def __post_init__(self) -> None:
        find_task(self.task)
        self._check_not_negative("weight_decay")
        check(0 <= self.momentum < 1, "momentum must be in [0, 1)", self.momentum)
        for name in ("batch_size", "local_steps", "eval_batch_size"):
            check(getattr(self, name) >= 1, f"{_key(name)} must be >= 1", getattr(self, name))
        for name in ("local_epochs", "lr_rounds", "lr_warmup"):
            check(getattr(self, name) >= 0, f"{_key(name)} must be >= 0", getattr(self, name))
        self._check_one_of("lr_schedule", LR_SCHEDULES)
        self._check_one_of("arithmetic", ARITHMETICS)
        check(
            self.lr_schedule == "constant" or self.lr_rounds > 0,
            "lr-schedule cosine needs lr-rounds >= 1, the rounds after which the step size is zero",
            self.lr_rounds,
        )

    @classmethod
    def keys(cls) -> set[str]:
        """Return the run-config keys that `from_run_config` reads."""
        return field_keys(cls)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read one agent's settings from a run config, by the fields in kebab-case."""
        return read_fields(cls, run_config)

    def as_parameters(self) -> dict[str, Any]:
        """Return the fields for the run record; a task by its name."""
        return {**asdict(self), "task": find_task(self.task).name}

    def lr_factor(self, round: int) -> float:
        """Return what the step sizes are multiplied by in ``round`` (from 1)."""
        warmth = min(round / self.lr_warmup, 1.0) if self.lr_warmup else 1.0
        if self.lr_schedule == "constant":
            return warmth
        # zero after lr_rounds rounds
        return warmth * 0.5 * (1 + math.cos(math.pi * min((round - 1) / self.lr_rounds, 1.0)))

    def num_steps(self, num_examples: int) -> int:
        """Return the mini-batches of one round over a training split of that size."""
        if not self.local_epochs:
            return self.local_steps
        return self.local_epochs * batches_per_pass(num_examples, self.batch_size)

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            check(
                math.isfinite(value) and value >= 0,
                f"{_key(name)} must be a finite number >= 0",
                value,
            )

    def _check_one_of(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        check(value in known, f"{_key(name)} must be one of {', '.join(known)}", value)


def _key(name: str) -> str:
    return name.replace("_", "-")


def train_locally(
    step: Callable[[Any, Tensor], float],
    split: BatchSource,
    config: TrainingConfig,
    *,
    seed: int,
    agent: int,
    round: int,
    device: str,
) -> dict[str, float]:
    """Take one round's local steps; ``train-loss`` is the mean of their losses.

    A step is ``step(inputs, labels) -> loss``. The batches come from the stream
    "batches"; what the model and the split's transforms draw from global generators
    comes from the stream "training".

    Raises
    ------
    DataError
        If the split gives no batch.
    """
    keep_freed_memory()
    with (
        isolated_rng(seed, "training", agent=agent, round=round),
        arithmetic(config.arithmetic, device=device),
    ):
        batches = _batches(split, config, seed=seed, agent=agent, round=round)
        losses = [step(inputs, labels) for inputs, labels in batches]
    return training_metrics(losses, agent=agent, round=round)


def training_batches(
    split: BatchSource, config: TrainingConfig, *, seed: int, agent: int, round: int
) -> list[Batch]:
    """All batches of one round, those of `train_locally` where steps draw nothing."""
    with isolated_rng(seed, "training", agent=agent, round=round):
        return [*_batches(split, config, seed=seed, agent=agent, round=round)]


def training_metrics(losses: Sequence[float], *, agent: int, round: int) -> dict[str, float]:
    """``train-loss``, the mean over the local steps of a round.

    Raises
    ------
    DataError
        If there was none.
    """
    if not losses:
        raise DataError(f"agent {agent}'s training split gave no batch in round {round}.")
    return {"train-loss": sum(losses) / len(losses)}


def _batches(
    split: BatchSource, config: TrainingConfig, *, seed: int, agent: int, round: int
) -> Iterator[Batch]:
    return split.training_batches(
        round=round,
        steps=config.num_steps(split.num_examples),
        batch_size=config.batch_size,
        generator=torch_stream(seed, "batches", agent=agent, round=round),
    )


def gradients_of(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of a loss for each tensor; zero where it took no part in the batch.

    Raises
    ------
    UnsupportedLayerError
        If the network uses gradient checkpointing in its reentrant form.
    """
    gradients = cast("tuple[Tensor, ...]", _gradients(loss, tensors, zeros=True))
    return dict(zip(tensors, gradients, strict=True))


def without_gradient(loss: Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that take no part in a loss.

    Raises
    ------
    UnsupportedLayerError
        If the network uses gradient checkpointing in its reentrant form.
    """
    if not loss.requires_grad:
        return [*tensors]
    gradients = _gradients(loss, tensors, zeros=False)
    return [name for name, g in zip(tensors, gradients, strict=True) if g is None]


def _gradients(
    loss: Tensor, tensors: Mapping[str, Tensor], *, zeros: bool
) -> tuple[Tensor | None, ...]:
    """Gradients in order; of what took no part in the loss zeros, or None."""
    try:
        return torch.autograd.grad(
            loss, list(tensors.values()), allow_unused=True, materialize_grads=zeros
        )
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise UnsupportedLayerError(
                "gradient checkpointing must be called with use_reentrant=False; the network "
                "calls torch.utils.checkpoint in its reentrant form. Change the call, or turn "
                "checkpointing off."
            ) from error
        raise


def finite_loss(loss: Tensor, *, agent: int, round: int, key: str, lr: float) -> float:
    """Return the loss as a number.

    Raises
    ------
    DivergedError
        If it is not finite; the message names the agent and ``key``, the run-config key
        of the step size ``lr``.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(
            f"agent {agent}: the training loss of round {round} is {value}. Lower {key} "
            f"(now {lr:g}), and check the inputs for values that are not finite."
        )
    return value


# Else a state with such numbers would be saved, and no later round would mend it: a
# loss may be finite where its gradient is not, as that of a square root at zero.
def check_learned(
    tensors: Mapping[str, Tensor], *, what: str, agent: int, round: int, way_out: str
) -> None:
    """Raise DivergedError unless what a round has left is finite."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        names = ", ".join(bad[:4]) + (", ..." if len(bad) > 4 else "")
        raise DivergedError(
            f"agent {agent}: round {round} left {what} that are not finite in {names}. {way_out}"
        )


def descent_direction(
    name: str,
    value: Tensor,
    gradient: Tensor,
    *,
    velocity: dict[str, Tensor],
    config: TrainingConfig,
) -> Tensor:
    """Direction of one SGD step: ``v = momentum * v + (g + μ * x)``.

    ``velocity`` holds ``v`` by name, is updated in place, and stays empty without
    momentum.
    """
    direction = gradient.add(value, alpha=config.weight_decay)
    if not config.momentum:
        return direction
    if name in velocity:
        direction = velocity[name].mul(config.momentum).add(direction)
    velocity[name] = direction
    return direction
