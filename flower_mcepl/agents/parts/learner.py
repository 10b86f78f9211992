"""An agent's task on its data: loss of a batch, evaluation, check of first batches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.parts.arithmetic import arithmetic
from flower_mcepl.agents.parts.hidden_state import hidden_state
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.tasks import Task, find_task
from flower_mcepl.agents.tasks.network import call, described, float_dtype
from flower_mcepl.agents.tasks.task import Tally, check_finite
from flower_mcepl.data.batches import AgentData, Batch, BatchSource
from flower_mcepl.errors import DataError, FlowerMceplError, UnsupportedLayerError
from flower_mcepl.streams import isolated_rng, torch_stream


@dataclass(frozen=True)
class Learner:
    """What an agent learns and how it is measured, whatever trains and how."""

    task: Task
    config: TrainingConfig
    agent: int
    seed: int
    device: str
    dtype: torch.dtype  # of the network's float weights

    @classmethod
    def of(
        cls,
        module: nn.Module,
        config: TrainingConfig,
        *,
        agent: int,
        seed: int,
        device: str,
    ) -> "Learner":
        """The learner of an agent whose network is ``module``."""
        dtype = float_dtype(dict(module.named_parameters()))
        return cls(find_task(config.task), config, agent, seed, device, dtype)

    def loss(self, network: Callable[..., Any], inputs: Any, targets: Any) -> Tensor:
        """Loss of a training batch, differentiable.

        Raises
        ------
        DataError
            If outputs or targets are not what the task needs.
        """
        return self.task.loss(*self._predict(network, inputs, targets, self._whose("training")))

    def outputs(self, network: Callable[..., Any], inputs: Any) -> Tensor:
        """What a network predicts of a batch, whose it is."""
        return self.task.outputs(call(network, inputs, device=self.device, dtype=self.dtype))

    def loss_of(self, outputs: Tensor, targets: Any) -> Tensor:
        """Loss of the outputs for a training batch, as `loss` gives it."""
        return self.task.loss(
            outputs, self.task.fitting(outputs, targets, whose=self._whose("training"))
        )

    def tally(self, data: AgentData) -> Tally:
        """Empty tally for an evaluation on the evaluated split."""
        return Tally(self.task, whose=self._whose(data.evaluated))

    def evaluation_batches(self, data: AgentData) -> list[Batch]:
        """All batches of the evaluated split."""
        with isolated_rng(self.seed, "evaluation", agent=self.agent):
            return [*data.test.evaluation_batches(batch_size=self.config.eval_batch_size)]

    def evaluate(self, network: nn.Module, data: AgentData) -> dict[str, float]:
        """Metrics, loss and ``num-examples`` of a network on the evaluated split.

        Raises
        ------
        DataError
            If a batch does not fit the task.
        DivergedError
            If an output is not finite.
        """
        # transforms of the split may draw
        with isolated_rng(self.seed, "evaluation", agent=self.agent), self.arithmetic():
            return self.task.evaluate(
                network,
                data.test,
                whose=self._whose(data.evaluated),
                batch_size=self.config.eval_batch_size,
                device=self.device,
                dtype=self.dtype,
            )

    def arithmetic(self) -> AbstractContextManager[None]:
        """The class of arithmetic that the configuration asks for, as a context."""
        return arithmetic(self.config.arithmetic, device=self.device)

    def check(self, network: nn.Module, data: AgentData) -> None:
        """Check the first batch of both splits, before anything is learned.

        Raises
        ------
        DataError
            If one does not fit the task, or the network cannot take its inputs.
        UnsupportedLayerError
            If the network keeps a state in a Python attribute, which is not saved.
        """
        network.eval()
        with torch.no_grad(), self._rng():
            batch = self._check_first(network, data.train, self._whose("training"))
            self._check_first(network, data.test, self._whose(data.evaluated))
        if batch is not None:
            with torch.no_grad():
                self._check_state(network, *batch)

    def on_one_batch(
        self, split: BatchSource, module: nn.Module, measure: Callable[[Any, Tensor], float]
    ) -> float:
        """What ``measure`` gives for a training batch; nothing changes by it.

        What it does to the buffers of ``module``, running statistics, is undone.
        """
        generator = torch_stream(self.seed, "measured-batch", agent=self.agent)
        with isolated_rng(self.seed, "measured-batch", agent=self.agent), self.arithmetic():
            batches: Iterator[Batch] = split.training_batches(
                round=1, steps=1, batch_size=self.config.batch_size, generator=generator
            )
            buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
            try:
                return measure(*next(batches))
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)

    def compare(self, split: BatchSource, check: Callable[[Callable[[Any], Tensor]], None]) -> None:
        """Let ``check`` compare networks by their outputs for a split's first batch."""
        batch = self._first_batch(split)
        if batch is not None:
            with torch.no_grad(), self._rng():
                whose = self._whose("training")
                check(lambda network: self._predict(network, *batch, whose)[0])

    def _check_state(self, network: nn.Module, inputs: Any, targets: Any) -> None:
        def outputs(module: nn.Module) -> Tensor:
            return self._predict(module, inputs, targets, self._whose("training"))[0]

        hidden = hidden_state(network, outputs, self._rng)
        if hidden:
            raise UnsupportedLayerError(
                f"agent {self.agent}'s network must keep its state in parameters and buffers, "
                f"which are saved; its forward changes {', '.join(hidden)}. Make each a buffer: "
                "self.register_buffer(name, tensor)."
            )

    def _rng(self) -> AbstractContextManager[None]:
        return isolated_rng(self.seed, "first-batches", agent=self.agent)

    def _check_first(self, network: nn.Module, split: BatchSource, whose: str) -> Batch | None:
        batch = self._first_batch(split)
        if batch is None:  # training or evaluation will say so
            return None
        inputs, targets = batch
        try:
            outputs, _ = self._predict(network, inputs, targets, whose)
            check_finite(outputs, inputs, whose=whose)
            return inputs, targets
        except FlowerMceplError:
            raise
        except Exception as error:  # whatever the user's network raises
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{whose}: the network must take a batch of its inputs; given "
                f"{described(inputs)} it raised {type(error).__name__}: {reason}. Let the data "
                f"function give what the model function's network takes, in {self.dtype}."
            ) from error

    def _first_batch(self, split: BatchSource) -> Batch | None:
        # a split of one's own that only trains is checked as it does
        cut = getattr(split, "evaluation_batches", None)
        batches = () if cut is None else cut(batch_size=self.config.eval_batch_size)
        return next(iter(batches), None)

    def _predict(
        self, network: Callable[..., Any], inputs: Any, targets: Any, whose: str
    ) -> tuple[Tensor, Tensor]:
        return self.task.predict(
            network, inputs, targets, whose=whose, device=self.device, dtype=self.dtype
        )

    def _whose(self, split: str) -> str:
        return f"agent {self.agent}'s {split} split"
