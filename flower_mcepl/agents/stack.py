"""Agents of MCE-PL that calculate as one: equal networks, stacked, in every verb.

The agents keep all that they are: scores, streams, batches, states. A stack only does
the calculating of several at once, and gives what each alone would, up to the order in
which floats are summed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import default_collate

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.inboxes import Inboxes
from flower_mcepl.agents.mcepl import MceplAgent
from flower_mcepl.agents.parts.arithmetic import keep_freed_memory
from flower_mcepl.agents.parts.score_step import GRADIENT
from flower_mcepl.agents.parts.training import (
    finite_loss,
    gradients_of,
    training_batches,
    training_metrics,
)
from flower_mcepl.agents.tasks.network import moved
from flower_mcepl.data.batches import Batch
from flower_mcepl.data.pairs import parts_of
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.placement import evaluating
from flower_mcepl.masks.stacked import Stacked, StackedModel, model_buffers, put_back

Evaluation = dict[str, float] | Exception
"""Metrics of an agent, or why there are none."""


@final
class AgentStack:
    """Equal agents, as `stacks_of` groups them.

    Every list is in their order.

    Parameters
    ----------
    agents : sequence of MceplAgent
        At least one.
    """

    def __init__(self, agents: Sequence[MceplAgent]) -> None:
        self.agents, self.first = agents, agents[0]

    def fuse(
        self,
        inboxes: Sequence[Mapping[int, Payload]],
        *,
        round: int,
        votes: Sequence[Mapping[int, float]],
    ) -> None:
        """Take in what each heard, and take the fine-tuning steps.

        A mean of masks is one matrix product a layer; any other rule hears for each
        agent alone. Both give the bits that each alone would.
        """
        for agent in self.agents:
            agent.set_round(round)
        if self.first.layers and self.first.model.fusion.averages:
            self._hear(inboxes, votes)
        else:
            for agent, inbox, own in zip(self.agents, inboxes, votes, strict=True):
                agent.hear(inbox, own)
        self._finetune(round)
        for agent in self.agents:
            agent.end_fusion()

    @torch.no_grad()
    def _hear(
        self, inboxes: Sequence[Mapping[int, Payload]], votes: Sequence[Mapping[int, float]]
    ) -> None:
        heard = Inboxes(inboxes, votes)
        means: list[dict[str, Tensor]] = [{} for _ in self.agents]
        for name, z in self.first.model.scores.items():
            for own, n in zip(means, heard.means(name, z), strict=True):
                if n is not None:
                    own[name] = n
        for agent, own, inbox in zip(self.agents, means, inboxes, strict=True):
            agent.model.set_heard(own, inbox.values())

    @torch.no_grad()
    def _finetune(self, round: int) -> None:
        """Step on each layer of those that have a gradient and have heard somebody."""
        each = [(a.model.scores, a.gradient, a.model.neighbor_means) for a in self.agents]
        for name in self.first.model.layers:
            steps = [
                (scores, gradient[name], n)
                for scores, gradient, means in each
                if name in gradient and (n := means[name]) is not None
            ]
            if steps:
                places, gradients, heard = zip(*steps, strict=True)
                z = torch.stack([place[name] for place in places])
                g, n = torch.stack(gradients), torch.stack(heard)
                put_back({name: self.first.finetuned(z, g, n, round=round)}, places)

    def train(self, *, round: int) -> list[dict[str, float]]:
        """Take the local steps of all agents, each on its own batches."""
        keep_freed_memory()
        for agent in self.agents:
            agent.begin(round)
        drawn = [
            training_batches(
                agent.data.train, agent.config, seed=agent.seed, agent=agent.index, round=round
            )
            for agent in self.agents
        ]
        losses: list[list[float]] = [[] for _ in self.agents]
        for places, batches in _in_step(drawn):
            part = AgentStack([self.agents[i] for i in places])
            for i, loss in zip(places, part._local_step(batches, round=round), strict=True):
                losses[i].append(loss)
        for agent in self.agents:
            agent.check_scores(round)
        return [
            training_metrics(own, agent=agent.index, round=round)
            for agent, own in zip(self.agents, losses, strict=True)
        ]

    def diverged(self) -> list[MceplAgent]:
        """Agents whose masks cannot be ranked any more."""
        return [
            agent
            for agent in self.agents
            if any(bool(y.isnan().any()) for y in agent.model.aggregation().values())
        ]

    def outgoing(self) -> list[dict[str, Tensor]]:
        """Return the masks that each sends."""
        if not self.first.layers:
            return [{} for _ in self.agents]
        masks = self.masks()
        masks = {name: masks[name].cpu() for name in self.first.layers}  # bits, in one copy
        return [_part(masks, i) for i in range(len(self.agents))]

    def evaluate(self) -> list[Evaluation]:
        """Evaluate the personal models; an agent's error is its own.

        One of a network costs the evaluations of all that it was called for at once.
        """
        masks = self._model([agent.personal_scores() for agent in self.agents]).live_masks()
        results = [_Result(agent) for agent in self.agents]
        drawn = [result.batches() for result in results]
        for places, batches in _in_step(drawn):
            part = AgentStack([self.agents[i] for i in places])
            mine = {name: mask[places] for name, mask in masks.items()}
            part._evaluate_batch(mine, batches, [results[i] for i in places])
        return [result.metrics(_part(masks, i)) for i, result in enumerate(results)]

    def masks(self) -> Stacked:
        """The masks of all agents."""
        return self._model().masks()

    def trial(self, batches: Sequence[Batch], masks: Stacked) -> Stacked:
        """Losses, gradients and outputs in eval mode, under given masks.

        Nothing changes by it.
        """
        model = self._model()
        losses, gradients, _ = self._gradients(model, batches, masks)
        with evaluating(self.first.model.module), torch.no_grad():
            outputs, _ = self._run(model, model.masked_weights(masks), batches)
        return {"loss": losses.detach(), "outputs": outputs, **gradients}

    def _gradients(
        self, model: StackedModel, batches: Sequence[Batch], masks: Stacked | None = None
    ) -> tuple[Tensor, Stacked, Stacked]:
        """Losses and gradients on a batch of each, and buffers of the networks then."""
        outputs, buffers = self._run(model, model.masked_weights(masks), batches)
        losses = torch.stack(
            [
                agent.learner.loss_of(own, targets)
                for agent, own, (_, targets) in zip(self.agents, outputs, batches, strict=True)
            ]
        )
        config = self.first.config
        objective = losses.sum()
        if config.group_lasso and config.lasso_step == GRADIENT:
            objective = objective + config.group_lasso * self._lasso(model)
        return losses, gradients_of(objective, model.scores), buffers

    def _local_step(self, batches: Sequence[Batch], *, round: int) -> list[float]:
        """Step on one batch of each; returns the losses."""
        config = self.first.config
        model = self._model()
        losses, gradients, buffers = self._gradients(model, batches)
        values = [
            finite_loss(loss, agent=agent.index, round=round, key="score-lr", lr=config.score_lr)
            for agent, loss in zip(self.agents, losses.detach().cpu(), strict=True)
        ]
        velocities = {}
        with torch.no_grad():
            for name, z in model.scores.items():
                lr = self.first.lr[name] * config.lr_factor(round)
                stepped, velocities[name] = self._stepped(name, z, gradients[name], lr=lr)
                put_back({name: stepped}, [agent.model.scores for agent in self.agents])
            put_back(buffers, [model_buffers(agent.model) for agent in self.agents])
        for i, agent in enumerate(self.agents):
            agent.gradient = _part(gradients, i)
            agent.velocity = _part(velocities, i) if config.momentum else {}
        return values

    def _stepped(self, name: str, z: Tensor, g: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Scores and velocities of a layer after a step."""
        step = partial(self.first.score_step, layer=self.first.model.layers[name], lr=lr)
        stepped: tuple[Tensor, Tensor]
        if not any(name in agent.velocity for agent in self.agents):
            stepped = torch.vmap(partial(step, v=None))(z, g)
            return stepped
        none = torch.zeros_like(z[0])
        v = torch.stack([agent.velocity.get(name, none) for agent in self.agents])
        stepped = torch.vmap(step)(z, g, v)
        return stepped

    def _lasso(self, model: StackedModel) -> Tensor:
        layers = self.first.model.layers
        terms = [
            torch.vmap(lambda part, rows=layers[name].rows: maths.group_lasso(rows(part)))(z).sum()
            for name, z in model.scores.items()
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _evaluate_batch(
        self, masks: Stacked, batches: Sequence[Batch], results: Sequence["_Result"]
    ) -> None:
        weights = {name: self.first.model.weight(name) * mask for name, mask in masks.items()}
        try:
            with evaluating(self.first.model.module):
                outputs, _ = self._run(self._model(), weights, batches)
        except Exception as error:  # whatever a user's network raises
            for result in results:
                result.fail(error)
            return
        for result, own, batch in zip(results, outputs, batches, strict=True):
            result.add(own, batch)

    def _run(
        self, model: StackedModel, weights: Mapping[str, Tensor], batches: Sequence[Batch]
    ) -> tuple[Tensor, Stacked]:
        learner = self.first.learner
        inputs = default_collate([inputs for inputs, _ in batches])
        inputs = moved(inputs, device=learner.device, dtype=learner.dtype)
        return model.run(weights, inputs, learner.outputs)

    def _model(self, scores: Sequence[Mapping[str, Tensor]] | None = None) -> StackedModel:
        return StackedModel([agent.model for agent in self.agents], scores)


@final
class _Result:
    """One agent's evaluation as it comes, or the first error in it."""

    def __init__(self, agent: MceplAgent) -> None:
        self._agent, self._tally = agent, agent.learner.tally(agent.data)
        self._error: Exception | None = None

    def batches(self) -> list[Batch]:
        """Batches of the evaluated split; none where it cannot be drawn."""
        try:
            return self._agent.learner.evaluation_batches(self._agent.data)
        except Exception as error:  # whatever a user's split raises
            self.fail(error)
            return []

    def add(self, outputs: Tensor, batch: Batch) -> None:
        """Take in the outputs for a batch."""
        inputs, given = batch
        try:
            task, whose = self._tally.task, self._tally.whose
            self._tally.add(outputs, task.fitting(outputs, given, whose=whose), inputs)
        except Exception as error:  # whatever a user's task raises
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Take note of an error; the first one counts."""
        self._error = self._error or error

    def metrics(self, masks: Mapping[str, Tensor]) -> Evaluation:
        """What `MceplAgent.evaluate` gives, or why it cannot."""
        try:
            if self._error is None:
                return {**self._tally.metrics(), "density": self._agent.density(masks)}
        except Exception as error:
            return error
        return self._error


def given(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation.

    Raises
    ------
    Exception
        The error that it failed with, in their place.
    """
    if isinstance(evaluation, Exception):
        raise evaluation
    return evaluation


def _in_step(drawn: Sequence[Sequence[Batch]]) -> Iterator[tuple[list[int], list[Batch]]]:
    """Batches of several agents, step by step: those of one shape, with whose they are.

    An agent whose batches are used up takes no further part.
    """
    for step in zip_longest(*drawn):
        alike: dict[Any, list[int]] = {}
        for i, batch in enumerate(step):
            if batch is not None:
                alike.setdefault(shape_of(batch), []).append(i)
        for places in alike.values():
            yield places, [step[i] for i in places]


def shape_of(batch: Batch) -> tuple[Any, ...]:
    """What must be equal of batches that networks take at once."""
    inputs, targets = batch
    names = tuple(inputs) if isinstance(inputs, Mapping) else len(parts_of(inputs))
    parts = [*parts_of(inputs), targets]
    shapes = [(p.shape, p.dtype) if isinstance(p, Tensor) else type(p) for p in parts]
    return type(inputs), names, *shapes


def _part(values: Mapping[str, Tensor], agent: int) -> dict[str, Tensor]:
    return {name: value[agent] for name, value in values.items()}
