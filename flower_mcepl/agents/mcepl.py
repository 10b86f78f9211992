"""MCE-PL: personal masks over shared random weights, fused with the masks of graph neighbors."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Agent, AgentState, Payload, data_facts
from flower_mcepl.agents.parts.evaluation import evaluate_classifier
from flower_mcepl.agents.parts.groups import check_group, join_groups, split_groups
from flower_mcepl.agents.parts.prior import shared_prior
from flower_mcepl.agents.parts.training import (
    TrainingConfig,
    descent_direction,
    finite_loss,
    train_locally,
)
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, read_fields
from flower_mcepl.config.ratios import per_agent, per_layer
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import StateError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.retention import Retention, check_retentions, resolve_retention
from flower_mcepl.streams import isolated_rng, torch_stream

SCORE_INITS = ("shared", "independent")


@dataclass(frozen=True, kw_only=True)
class MceplConfig(TrainingConfig):
    """Parameters of MCE-PL; the defaults are the reference setting of the paper (arXiv:2504.17520).

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # r in (0, 1]
    retention: Retention = field(default_factory=lambda: {"conv": 0.3, "linear": 0.9})
    # of the common first mask, equal on all agents; None: as retention
    first_retention: Retention | None = None
    score_lr: float = 10.0  # η > 0: step size on the scores
    finetune_lr: float = 10.0  # η_f >= 0: step size of the fine-tuning step; 0 leaves the step out
    group_lasso: float = 0.0  # λ >= 0; the paper's published code has none
    # "shared": all agents start from equal scores; "independent": each from its own
    score_init: str = "shared"
    # β in [0, 1): evaluate at the scores' running mean z̄ = β z̄ + (1 - β) z; 0: at z
    score_averaging: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("score_lr", "finetune_lr", "group_lasso")
        check(
            self.score_lr > 0, "score-lr must be > 0", self.score_lr, "The reference value is 10."
        )
        check(
            self.score_init in SCORE_INITS,
            f"score-init must be one of {', '.join(SCORE_INITS)}",
            self.score_init,
        )
        check(
            0 <= self.score_averaging < 1, "score-averaging must be in [0, 1)", self.score_averaging
        )
        for retention in (self.retention, self.first_retention):
            if retention is not None:
                check_retentions(retention)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read the settings of one agent from Flower's run config.

        ``retention-conv`` and ``retention-linear`` are one ratio, or several separated
        by commas that the agents take in turn: agent i gets number ``i mod k``. The
        common first mask then has their mean. The same keys in the node config set the
        agent's own ratios. ``retention-layers`` sets single layers, by name or pattern,
        for all agents alike: ``"conv1.weight=0.6, fc*=0.95"``.
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
                check(
                    len(told) == 1,
                    f"the node config's {key} is one ratio, of this agent alone",
                    node_config[key],
                )
                own[kind] = told[0]
            for ratio in (*ratios, own[kind]):
                maths.check_retention(ratio, of=f"key {key}")
        layers = per_layer("retention-layers", run_config.get("retention-layers", ""))
        for name, ratio in layers.items():
            check(
                name not in own,
                "key retention-layers names layers, not kinds",
                name,
                f"Use retention-{name}.",
            )
            maths.check_retention(ratio, of=f"key retention-layers, {name}")
        return read_fields(cls, run_config, retention=own | layers, first_retention=first | layers)


class MceplAgent(Agent):
    """One MCE-PL agent: private scores over the shared frozen network; its mask is all that it sends.

    The ablations in ``mask_variants`` are this class with one piece taken away or
    replaced.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share, as from `shared_module`; it
        is copied.
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
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: MceplConfig,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.index, self.seed, self.data, self.config, self.device = (
            index,
            seed,
            data,
            config,
            device,
        )
        owner = None if config.score_init == "shared" else index
        scores_from = torch_stream(seed, "scores", agent=owner)
        self.model = self._masked(module, scores_from).to(device)
        self.fingerprint = self.model.fingerprint
        self.prior = shared_prior(self.model, seed=seed, shared_scores=owner is None)
        self._shapes = {name: tuple(spec.shape) for name, spec in self.model.layers.items()}
        self.layers = self._shapes
        self._first_mask = self._draw_first_mask()
        self._first_mask_digest = _digest(self._first_mask)
        # of the last local step, until the fine-tuning step has used it
        self._gradient: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}  # of the momentum, if there is any
        self._average: dict[str, Tensor] = {}  # z̄, running mean of the scores, if there is any
        # all agents start from the common mask as their neighbors'
        self._set_neighbors([self._first_mask])

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
        self._average_scores()

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps: plain SGD on the scores; the metrics hold the mean loss of the steps."""
        self.model.train()
        step = partial(self._local_step, round=round)
        return train_locally(
            step, self.data.train, self.config, seed=self.seed, agent=self.index, round=round
        )

    def outgoing(self) -> dict[str, Tensor]:
        """Return the masks at the new scores and the old ``n``: this round's masks have not arrived yet."""
        return {name: mask.cpu() for name, mask in self.model.masks().items()}

    def evaluate(self) -> dict[str, float]:
        """Evaluate the personal model, the network under the agent's own mask, on the agent's own test split.

        With ``score_averaging`` the mask is that of the scores' running mean; training
        and what is sent do without it.
        """
        masks = self._evaluated_masks()
        kept = sum(int(mask.count_nonzero()) for mask in masks.values())
        # transforms of the test split may draw
        with isolated_rng(self.seed, "evaluation", agent=self.index):
            metrics = evaluate_classifier(
                self.model.bake(masks),
                self.data.test,
                batch_size=self.config.eval_batch_size,
                device=self.device,
            )
        return {**metrics, "density": kept / self.model.num_weights}

    def first_payload(self) -> dict[str, Tensor] | None:
        """Return the common first mask, which everyone computes from the run's seed."""
        return self._first_mask

    def describe(self) -> dict[str, Any]:
        """Return the handshake's facts: who this is, its weights, its retention and its data."""
        return {
            **super().describe(),
            "num-weights": self.model.num_weights,
            "kept-weights": self._num_kept(),
            "first-mask": self._first_mask_digest,
            "prior": self.prior.digest.hex() if self.prior else "",
            "retention": self._retention_text(),
            **data_facts(self.data),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the fields of the agent's `MceplConfig`."""
        return dataclasses.asdict(self.config)

    def state(self) -> AgentState:
        """Return scores, their running mean, last gradient, momentum, neighbors' counts and running statistics."""
        return AgentState.of_tensors(
            self._facts(**{"num-neighbors": self._num_neighbors}), join_groups(self._groups())
        )

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        groups = split_groups(state.tensors, device=self.device)
        for group in ("scores", "gradient", "velocity", "average", "neighbor-count"):
            check_group(
                groups,
                group,
                self._shapes,
                whose=f"agent {self.index}",
                may_be_absent=group != "scores",
            )
        num_neighbors = state.facts.get("num-neighbors")
        if not isinstance(num_neighbors, int) or num_neighbors < 0:
            raise StateError(
                f"the saved state of agent {self.index} does not say its num-neighbors. Start "
                "afresh."
            )
        self.model.set_scores(groups["scores"])
        self._gradient, self._velocity = groups.get("gradient", {}), groups.get("velocity", {})
        self._average = groups.get("average", {})
        self._set_counts(groups.get("neighbor-count", {}), num_neighbors)
        buffers = dict(self.model.module.named_buffers())
        for name, tensor in groups.get("buffer", {}).items():
            buffers[name].copy_(tensor)

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "scores": self.model.scores,
            "gradient": self._gradient,
            "velocity": self._velocity,
            "average": self._average,
            "neighbor-count": self._counts,
            "buffer": dict(self.model.module.named_buffers()),
        }

    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        logits = self.model(inputs.to(self.device))
        loss = nn.functional.cross_entropy(logits, labels.to(self.device))
        objective = (
            loss + self.config.group_lasso * self.model.group_lasso()
            if self.config.group_lasso
            else loss
        )
        value = finite_loss(
            loss, agent=self.index, round=round, key="score-lr", lr=self.config.score_lr
        )
        scores = self.model.scores
        # A layer that took no part in this batch (an auxiliary head, say) has a
        # gradient of zero.
        gradients = torch.autograd.grad(objective, list(scores.values()), materialize_grads=True)
        self._gradient = dict(zip(scores, gradients, strict=True))
        score_lr = self.config.score_lr * self.config.lr_factor(round)
        with torch.no_grad():
            for name, z in scores.items():
                g, velocity = self._gradient[name], self._velocity
                z.add_(
                    descent_direction(name, z, g, velocity=velocity, config=self.config),
                    alpha=-score_lr,
                )
        return value

    def _masked(self, module: nn.Module, generator: torch.Generator) -> MaskedModel:
        return MaskedModel(module, retention=self.config.retention, generator=generator)

    def _network_masks(self) -> dict[str, Tensor]:
        """Return what the frozen weights are multiplied by in the personal model."""
        return self.model.masks()

    @torch.no_grad()
    def _average_scores(self) -> None:
        if not self.config.score_averaging:
            return
        scores = {name: z.detach() for name, z in self.model.scores.items()}
        if not self._average:
            self._average = {name: z.clone() for name, z in scores.items()}
        for name, mean in self._average.items():
            mean.lerp_(scores[name], 1 - self.config.score_averaging)

    def _evaluated_masks(self) -> dict[str, Tensor]:
        """Return `_network_masks` at the running mean of the scores, where there is one."""
        if not self._average:
            return self._network_masks()
        scores = {name: z.detach().clone() for name, z in self.model.scores.items()}
        self.model.set_scores(self._average)
        try:
            return self._network_masks()
        finally:
            self.model.set_scores(scores)

    def _draw_first_mask(self) -> dict[str, Tensor]:
        ratios = self.config.first_retention
        resolved = resolve_retention(
            self.config.retention if ratios is None else ratios, self.model.layers
        )
        generator = torch_stream(self.seed, "first-mask")
        return {
            name: maths.bernoulli_mask(
                torch.Size(shape), retention=resolved[name], generator=generator
            )
            for name, shape in self._shapes.items()
        }

    def _set_neighbors(self, payloads: list[Payload]) -> None:
        counts = {}
        for name, shape in self._shapes.items() if payloads else ():
            # they travel in the state: keep them small
            dtype = torch.uint8 if len(payloads) < 256 else torch.int16
            counts[name] = torch.zeros(shape, dtype=dtype, device=self.device)
            for payload in payloads:
                counts[name] += payload[name].to(self.device)
        self._set_counts(counts, len(payloads))

    def _set_counts(self, counts: Mapping[str, Tensor], num_neighbors: int) -> None:
        self._counts, self._num_neighbors = counts, num_neighbors
        means = {
            name: maths.neighbor_mean(count, num_neighbors=num_neighbors)
            for name, count in counts.items()
        }
        self.model.set_neighbor_means(means or None)

    def _num_kept(self) -> int:
        return sum(
            maths.kept_weights(math.prod(shape), retention=self.model.retention[name])
            for name, shape in self._shapes.items()
        )

    def _retention_text(self) -> str:
        ratios = sorted(
            {
                f"{spec.kind} {self.model.retention[name]:g}"
                for name, spec in self.model.layers.items()
            }
        )
        return ", ".join(ratios)


def _digest(masks: Mapping[str, Tensor]) -> str:
    """Return 16 hex characters that stand for bool masks."""
    digest = hashlib.blake2b(digest_size=8)
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.contiguous().numpy().data)
    return digest.hexdigest()
