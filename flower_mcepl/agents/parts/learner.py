"""An agent's task on its data: loss of a batch, evaluation, check of first batches."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl.agents.parts.arithmetic import arithmetic
from flower_mcepl.agents.parts.groups import check_savable
from flower_mcepl.agents.parts.hidden_state import hidden_state
from flower_mcepl.agents.parts.idle import check_learns
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.tasks import Task, find_task
from flower_mcepl.agents.tasks.network import Squashing, call, described, float_dtype
from flower_mcepl.agents.tasks.tally import Tally, check_finite, first_line
from flower_mcepl.data.batches import AgentData, Batch, BatchSource, pass_sizes
from flower_mcepl.errors import DataError, FlowerMceplError, UnsupportedLayerError
from flower_mcepl.masks.copying import own_copy
from flower_mcepl.masks.placement import train_mode
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
        """The learner of an agent whose network is ``module``.

        Raises
        ------
        UnsupportedLayerError
            If the network holds a tensor that no state can hold.
        """
        check_savable(module)
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

    def check(
        self,
        network: nn.Module,
        data: AgentData,
        learned: Mapping[str, Tensor],
        *,
        frozen: tuple[str, ...] = (),
    ) -> None:
        """Check network, data and task on first batches, before anything is learned.

        Looked at are the first batch of both splits, a batch of one example where there
        will be one, all targets that lie in memory, and whether a gradient reaches what
        is ``learned``, parameters of the network. ``frozen`` are the submodules that
        training leaves in eval mode.

        Raises
        ------
        DataError
            If one does not fit the task, or the network cannot take its inputs.
        ConfigError
            If the task's loss or metrics are no numbers.
        UnsupportedLayerError
            If the network keeps a state in a Python attribute, which is not saved, or
            nothing that is learned has a part in its outputs.
        """
        network.eval()
        with torch.no_grad(), self._rng():
            batch = self._check_split(network, data.train, self._whose("training"))
            self._check_split(network, data.test, self._whose(data.evaluated), measured=True)
        if batch is not None:
            self._check_training(network, data.train, batch, learned, frozen)

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
        batch = self._first_batch(split, self.config.eval_batch_size)
        if batch is not None:
            with torch.no_grad(), self._rng():
                whose = self._whose("training")
                check(lambda network: self._predict(network, *batch, whose)[0])

    def _check_training(
        self,
        network: nn.Module,
        split: BatchSource,
        batch: Batch,
        learned: Mapping[str, Tensor],
        frozen: tuple[str, ...],
    ) -> None:
        """Check a copy of the network in train mode, on the smallest batch."""
        inputs, targets = batch
        if 1 in pass_sizes(split.num_examples, self.config.batch_size):
            trained = own_copy(network)
            train_mode(trained, frozen)
            with torch.no_grad(), self._rng():
                one = self._first_batch(split, 1) or batch
                self._check_single(trained, one, split.num_examples)
        elif len(targets) == 1:  # which a batch norm refuses, and training will not have
            return
        with torch.no_grad():
            self._check_state(network, inputs, targets, frozen)

        # no more memory than a step takes, which may be all that the device has
        step_size = min(self.config.batch_size, self.config.eval_batch_size)
        with self._rng():
            inputs, targets = self._first_batch(split, step_size) or batch

        def loss(module: nn.Module) -> Tensor:
            with self._rng(), self.arithmetic():
                return self.loss(module, inputs, targets)

        whose = f"agent {self.agent}'s network"
        check_learns(network, learned, loss, whose=whose, frozen=frozen)

    def _check_single(self, trained: nn.Module, batch: Batch, num_examples: int) -> None:
        try:
            self._predict(trained, *batch, self._whose("training"))
        except FlowerMceplError:
            raise
        except Exception as error:  # a ValueError of a batch norm, or what the user's code has
            raise DataError(
                f"{self._whose('training')}: with {num_examples} examples and batch-size "
                f"{self.config.batch_size} a training batch is one example, which the network must "
                f"take; it raised {type(error).__name__}: {first_line(error)}. A batch norm needs "
                "two: raise batch-size, give the agent more examples, or normalize by groups "
                "(torch.nn.GroupNorm)."
            ) from error

    def _check_state(
        self, network: nn.Module, inputs: Any, targets: Any, frozen: tuple[str, ...]
    ) -> None:
        def outputs(module: nn.Module) -> Tensor:
            return self._taken(module, (inputs, targets), self._whose("training"))[0]

        hidden = hidden_state(network, outputs, self._rng, frozen)
        if hidden:
            raise UnsupportedLayerError(
                f"agent {self.agent}'s network must keep its state in parameters and buffers, "
                f"which are saved; its forward changes {', '.join(hidden)}. Make each a buffer: "
                "self.register_buffer(name, tensor)."
            )

    def _rng(self) -> AbstractContextManager[None]:
        return isolated_rng(self.seed, "first-batches", agent=self.agent)

    def _check_split(
        self, network: nn.Module, split: BatchSource, whose: str, *, measured: bool = False
    ) -> Batch | None:
        """Check first batch, targets and, where it is evaluated, metrics of a split."""
        batch = self._first_batch(split, self.config.eval_batch_size)
        if batch is None:  # training or evaluation will say so
            return None
        inputs, given = batch
        with Squashing() as squashing:
            outputs, targets = self._taken(network, batch, whose)
        if self.task.logits and not measured and squashing.gave(outputs):
            self._warn_of_probabilities()
        check_finite(outputs, inputs, whose=whose)
        self.task.check_loss(outputs, targets, whose=whose)
        self._check_all_targets(split, outputs, targets, whose)
        if measured:
            tally = Tally(self.task, whose=whose)
            tally.add(outputs, targets, inputs)
            tally.check(whole=len(given) == split.num_examples)
            self._check_last(network, split, tally, whose)
        return batch

    def _warn_of_probabilities(self) -> None:
        warnings.warn(
            "the network ends in a sigmoid or softmax, which the loss of task "
            f"{self.task.name} has already: it learns slowly, and its metrics are wrong. Let it "
            "return logits.",
            stacklevel=1,  # one line for all agents: it is shown once
        )

    def _check_last(self, network: nn.Module, split: BatchSource, tally: Tally, whose: str) -> None:
        """Check a batch of one example, if the last one of the split will be."""
        if split.num_examples % self.config.eval_batch_size != 1:
            return
        one = self._first_batch(split, 1)
        if one is not None:
            tally.add(*self._taken(network, one, whose), one[0])

    def _check_all_targets(
        self, split: BatchSource, outputs: Tensor, targets: Tensor, whose: str
    ) -> None:
        """Check all targets of a split that lie in memory, as those of a batch."""
        counted, seen = self.task.counted(targets), len(targets)
        known = getattr(split, "known_labels", lambda: None)()
        if known is not None and len(outputs) == len(targets):  # an output for each
            counted, seen = 0, split.num_examples
            example = outputs[:1].cpu()
            for part in known.split(self.config.eval_batch_size):
                like = example.expand(len(part), *example.shape[1:])
                counted += self.task.counted(self.task.fitting(like, part, whose=whose))
        if seen == split.num_examples:  # a later batch may count
            self.task.check_counted(counted, seen, whose=whose)

    def _taken(self, network: nn.Module, batch: Batch, whose: str) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a batch, or an error that says what it was given."""
        inputs, targets = batch
        try:
            given = call(network, inputs, device=self.device, dtype=self.dtype)
        except FlowerMceplError:
            raise
        except Exception as error:  # whatever the user's network raises
            raise DataError(
                f"{whose}: the network must take a batch of its inputs; given "
                f"{described(inputs)} it raised {type(error).__name__}: {first_line(error)}. Let "
                "the data function give what the model function's network takes, in "
                f"{self.dtype}."
            ) from error
        return self.task.fitting_pair(given, targets, whose=whose)

    def _first_batch(self, split: BatchSource, size: int) -> Batch | None:
        # a split of one's own that only trains is checked as it does
        cut = getattr(split, "evaluation_batches", None)
        batches = () if cut is None else cut(batch_size=size)
        return next(iter(batches), None)

    def _predict(
        self, network: Callable[..., Any], inputs: Any, targets: Any, whose: str
    ) -> tuple[Tensor, Tensor]:
        return self.task.predict(
            network, inputs, targets, whose=whose, device=self.device, dtype=self.dtype
        )

    def _whose(self, split: str) -> str:
        return f"agent {self.agent}'s {split} split"
