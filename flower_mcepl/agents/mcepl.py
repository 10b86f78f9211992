"""MCE-PL: personal masks over shared random weights, fused with the masks of graph neighbors."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl import masks as maths
from flower_mcepl.agents.agent import Agent, AgentState, Payload
from flower_mcepl.agents.evaluation import evaluate_classifier
from flower_mcepl.config import RunConfig, check, per_agent, read_fields
from flower_mcepl.data import AgentData
from flower_mcepl.errors import DataError, DivergedError, StateError
from flower_mcepl.masked_model import MaskedModel, Retention, check_retentions, resolve_retention
from flower_mcepl.streams import isolated_rng, torch_stream

SCORE_INITS = ("shared", "independent")
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class MceplConfig:
    """Parameters of MCE-PL; the defaults are the reference setting of the paper (arXiv:2504.17520).

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    retention: Retention = field(default_factory=lambda: {"conv": 0.3, "linear": 0.9})  # r in (0, 1]
    first_retention: Retention | None = None  # of the common first mask, equal on all agents; None: as retention
    score_lr: float = 10.0  # η > 0: step size on the scores
    finetune_lr: float = 10.0  # η_f >= 0: step size of the fine-tuning step; 0 leaves the step out
    weight_decay: float = 5e-4  # μ >= 0, on the scores
    momentum: float = 0.0  # of the local steps, 0 <= momentum < 1; the paper has none
    group_lasso: float = 0.0  # λ >= 0; the paper's published code has none
    batch_size: int = 128
    local_steps: int = 1  # mini-batches a round
    local_epochs: int = 0  # passes over the training split a round; if > 0 it replaces local_steps
    score_init: str = "shared"  # "shared": all agents start from equal scores; "independent": each from its own
    lr_schedule: str = "constant"  # "cosine": both step sizes fall to zero over lr_rounds
    lr_rounds: int = 0  # length of the cosine in rounds
    eval_batch_size: int = 500

    def __post_init__(self) -> None:
        for name in ("score_lr", "finetune_lr", "weight_decay", "group_lasso"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"{_key(name)} must be a finite number >= 0", value)
        check(self.score_lr > 0, "score-lr must be > 0", self.score_lr, "The reference value is 10.")
        check(0 <= self.momentum < 1, "momentum must be in [0, 1)", self.momentum)
        for name in ("batch_size", "local_steps", "eval_batch_size"):
            check(getattr(self, name) >= 1, f"{_key(name)} must be >= 1", getattr(self, name))
        for name in ("local_epochs", "lr_rounds"):
            check(getattr(self, name) >= 0, f"{_key(name)} must be >= 0", getattr(self, name))
        check(self.score_init in SCORE_INITS, f"score-init must be one of {', '.join(SCORE_INITS)}", self.score_init)
        check(
            self.lr_schedule in LR_SCHEDULES, f"lr-schedule must be one of {', '.join(LR_SCHEDULES)}", self.lr_schedule
        )
        check(
            self.lr_schedule == "constant" or self.lr_rounds > 0,
            "lr-schedule cosine needs lr-rounds >= 1, the rounds after which the step size is zero",
            self.lr_rounds,
        )
        for retention in (self.retention, self.first_retention):
            if retention is not None:
                check_retentions(retention)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> "MceplConfig":
        """Read the settings of one agent from Flower's run config.

        ``retention-conv`` and ``retention-linear`` are one ratio, or several separated by commas that the agents
        take in turn: agent i gets number ``i mod k``. The common first mask then has their mean. The same keys in
        the node config set the agent's own ratios.
        """
        own, first = {}, {}
        defaults = cls().retention
        assert isinstance(defaults, Mapping)
        for kind in ("conv", "linear"):
            key = f"retention-{kind}"
            ratios = per_agent(key, run_config.get(key, defaults[kind]))
            first[kind] = sum(ratios) / len(ratios)
            own[kind] = ratios[agent % len(ratios)]
            if node_config and key in node_config:
                told = per_agent(key, node_config[key])
                check(len(told) == 1, f"the node config's {key} is one ratio, of this agent alone", node_config[key])
                own[kind] = told[0]
            for ratio in (*ratios, own[kind]):
                maths.check_retention(ratio, of=f"key {key}")
        return read_fields(cls, run_config, retention=own, first_retention=first)

    def lr_factor(self, round: int) -> float:
        """Return what the step sizes are multiplied by in ``round`` (from 1)."""
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min((round - 1) / self.lr_rounds, 1.0)))  # zero after lr_rounds rounds


def _key(name: str) -> str:
    return name.replace("_", "-")


@final
class MceplAgent(Agent):
    """One MCE-PL agent: private scores over the shared frozen network; its mask is all that it sends.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share, as from `shared_module`; it is copied.
    data : AgentData
        Training and test split.
    config : MceplConfig
        The method's parameters; the retention may differ from agent to agent.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.
    """

    algorithm = "mcepl"

    def __init__(
        self, index: int, module: nn.Module, data: AgentData, config: MceplConfig, *, seed: int, device: str = "cpu"
    ) -> None:
        self.index, self.seed, self.data, self.config, self.device = index, seed, data, config, device
        owner = None if config.score_init == "shared" else index
        scores_from = torch_stream(seed, "scores", agent=owner)
        self.model = MaskedModel(module, retention=config.retention, generator=scores_from).to(device)
        self.fingerprint = self.model.fingerprint
        self.layers = {name: spec.shape for name, spec in self.model.layers.items()}
        self._first_mask = self._draw_first_mask()
        self._first_mask_digest = _digest(self._first_mask)
        self._gradient: dict[str, Tensor] = {}  # of the last local step, until the fine-tuning step has used it
        self._velocity: dict[str, Tensor] = {}  # of the momentum, if there is any
        self._set_neighbors([self._first_mask])  # all agents start from the common mask as their neighbors'

    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Average the neighbors' masks into ``n`` and take the personalized fine-tuning step with it."""
        self._set_neighbors(list(inbox.values()))
        means = self.model.neighbor_means
        finetune_lr = self.config.finetune_lr * self.config.lr_factor(round)
        with torch.no_grad():
            for name, g in self._gradient.items():
                n = means[name]
                if n is not None:
                    z = self.model.scores[name]
                    z.copy_(maths.neighbor_step(z, g, n, finetune_lr=finetune_lr))
        self._gradient = {}

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps: plain SGD on the scores; the metrics hold the mean loss of the steps."""
        self.model.train()
        losses = []
        with isolated_rng(self.seed, "training", agent=self.index, round=round):
            batches = self.data.train.training_batches(
                round=round,
                steps=self._num_steps(),
                batch_size=self.config.batch_size,
                generator=torch_stream(self.seed, "batches", agent=self.index, round=round),
            )
            for inputs, labels in batches:
                losses.append(self._local_step(inputs, labels, round=round))
        if not losses:
            raise DataError(f"agent {self.index}'s training split gave no batch in round {round}.")
        return {"train-loss": sum(losses) / len(losses)}

    def outgoing(self) -> dict[str, Tensor]:
        """Return the masks at the new scores and the old ``n``: this round's masks have not arrived yet."""
        return {name: mask.cpu() for name, mask in self.model.masks().items()}

    def evaluate(self) -> dict[str, float]:
        """Evaluate the personal model, the network under the agent's own mask, on the agent's own test split."""
        masks = self.model.masks()
        kept = sum(int(mask.sum()) for mask in masks.values())
        with isolated_rng(self.seed, "evaluation", agent=self.index):  # transforms of the test split may draw
            metrics = evaluate_classifier(
                self.model.bake(masks), self.data.test, batch_size=self.config.eval_batch_size, device=self.device
            )
        return {**metrics, "density": kept / self.model.num_weights}

    def first_payload(self) -> dict[str, Tensor]:
        """Return the common first mask, which everyone computes from the run's seed."""
        return self._first_mask

    def describe(self) -> dict[str, Any]:
        """Return the handshake's facts: who this is, its weights, its retention and its data."""
        facts: dict[str, Any] = {
            **super().describe(),
            "num-weights": self.model.num_weights,
            "kept-weights": self._num_kept(),
            "first-mask": self._first_mask_digest,
            "retention": self._retention_text(),
            "num-examples": self.data.train.num_examples,
            "num-test-examples": self.data.test.num_examples,
        }
        classes = getattr(self.data.train, "classes", None)
        return facts if classes is None else {**facts, "classes": classes}

    def parameters(self) -> dict[str, Any]:
        """Return the fields of the agent's `MceplConfig`."""
        return dataclasses.asdict(self.config)

    def state(self) -> AgentState:
        """Return scores, last gradient, momentum, the neighbors' counts and the running statistics."""
        tensors: dict[str, Tensor] = {}
        for prefix, group in self._groups().items():
            tensors.update({f"{prefix}/{name}": tensor.detach().cpu().clone() for name, tensor in group.items()})
        return AgentState(tensors, self._facts(**{"num-neighbors": self._num_neighbors}))

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        groups: dict[str, dict[str, Tensor]] = {"gradient": {}, "velocity": {}, "neighbor-count": {}}
        for key, tensor in state.tensors.items():
            prefix, _, name = key.partition("/")
            groups.setdefault(prefix, {})[name] = tensor.to(self.device)
        self._check_complete(groups)
        num_neighbors = state.facts.get("num-neighbors")
        if not isinstance(num_neighbors, int) or num_neighbors < 0:
            raise StateError(f"the saved state of agent {self.index} does not say its num-neighbors. Start afresh.")
        self.model.set_scores(groups["scores"])
        self._gradient, self._velocity = groups["gradient"], groups["velocity"]
        self._set_counts(groups["neighbor-count"], num_neighbors)
        buffers = dict(self.model.module.named_buffers())
        for name, tensor in groups.get("buffer", {}).items():
            buffers[name].copy_(tensor)

    def _check_complete(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        full = {name: tuple(shape) for name, shape in self.layers.items()}
        for prefix in ("scores", "gradient", "velocity", "neighbor-count"):
            shapes = {name: tuple(tensor.shape) for name, tensor in groups.get(prefix, {}).items()}
            if shapes != full and (shapes or prefix == "scores"):
                raise StateError(
                    f"the saved state of agent {self.index} is incomplete: its {prefix} must hold {full}; "
                    f"got {shapes}. Use another copy, or start afresh without it."
                )

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "scores": self.model.scores,
            "gradient": self._gradient,
            "velocity": self._velocity,
            "neighbor-count": self._counts,
            "buffer": dict(self.model.module.named_buffers()),
        }

    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        logits = self.model(inputs.to(self.device))
        loss = nn.functional.cross_entropy(logits, labels.to(self.device))
        objective = loss + self.config.group_lasso * self.model.group_lasso() if self.config.group_lasso else loss
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                f"agent {self.index}: the training loss of round {round} is {value}. Lower score-lr "
                f"(now {self.config.score_lr:g}), and check the inputs for values that are not finite."
            )
        scores = self.model.scores
        # A layer that took no part in this batch (an auxiliary head, say) has a gradient of zero.
        gradients = torch.autograd.grad(objective, list(scores.values()), materialize_grads=True)
        self._gradient = dict(zip(scores, gradients, strict=True))
        score_lr = self.config.score_lr * self.config.lr_factor(round)
        with torch.no_grad():
            for name, z in scores.items():
                z.add_(self._direction(name, z), alpha=-score_lr)
        return value

    def _direction(self, name: str, z: Tensor) -> Tensor:
        direction = self._gradient[name].add(z, alpha=self.config.weight_decay)
        if not self.config.momentum:
            return direction
        if name in self._velocity:
            direction = self._velocity[name].mul(self.config.momentum).add(direction)
        self._velocity[name] = direction
        return direction

    def _num_steps(self) -> int:
        if not self.config.local_epochs:
            return self.config.local_steps
        return self.config.local_epochs * math.ceil(self.data.train.num_examples / self.config.batch_size)

    def _draw_first_mask(self) -> dict[str, Tensor]:
        ratios = self.config.first_retention
        resolved = resolve_retention(self.config.retention if ratios is None else ratios, self.model.layers)
        generator = torch_stream(self.seed, "first-mask")
        return {
            name: maths.bernoulli_mask(torch.Size(shape), retention=resolved[name], generator=generator)
            for name, shape in self.layers.items()
        }

    def _set_neighbors(self, payloads: list[Payload]) -> None:
        counts = {}
        for name, shape in self.layers.items() if payloads else ():
            dtype = torch.uint8 if len(payloads) < 256 else torch.int16  # they travel in the state: keep them small
            counts[name] = torch.zeros(shape, dtype=dtype, device=self.device)
            for payload in payloads:
                counts[name] += payload[name].to(self.device)
        self._set_counts(counts, len(payloads))

    def _set_counts(self, counts: Mapping[str, Tensor], num_neighbors: int) -> None:
        self._counts, self._num_neighbors = counts, num_neighbors
        means = {name: maths.neighbor_mean(count, num_neighbors=num_neighbors) for name, count in counts.items()}
        self.model.set_neighbor_means(means or None)

    def _num_kept(self) -> int:
        return sum(
            maths.kept_weights(math.prod(shape), retention=self.model.retention[name])
            for name, shape in self.layers.items()
        )

    def _retention_text(self) -> str:
        ratios = sorted({f"{spec.kind} {self.model.retention[name]:g}" for name, spec in self.model.layers.items()})
        return ", ".join(ratios)


def _digest(masks: Mapping[str, Tensor]) -> str:
    """Return 16 hex characters that stand for bool masks."""
    digest = hashlib.blake2b(digest_size=8)
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.contiguous().numpy().data)
    return digest.hexdigest()
