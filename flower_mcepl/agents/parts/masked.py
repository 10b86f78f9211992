"""Masks over shared random weights: scores that train, and masks that travel.

Their agents differ in how they train and evaluate, and in the rule of fusion.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import Agent, AgentState, Payload, data_facts
from flower_mcepl.agents.handshake import KEPT_BY_LAYER, LIVE_FILTERS
from flower_mcepl.agents.parts.common_knowledge import CommonKnowledge, digest_of, gate_shapes
from flower_mcepl.agents.parts.depth import Depths, at_depth, depth_facts
from flower_mcepl.agents.parts.groups import check_group, groups_of, state_of
from flower_mcepl.agents.parts.learner import Learner
from flower_mcepl.agents.parts.mask_states import (
    OPENING,
    STRENGTH,
    heard_facts,
    heard_group,
    heard_means,
    read_heard,
    rules_facts,
)
from flower_mcepl.agents.parts.masked_config import MaskedConfig
from flower_mcepl.agents.parts.sharing import num_elements, share_fact
from flower_mcepl.agents.parts.votes import WHOLE, faded
from flower_mcepl.data.batches import AgentData
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.gates import LAYER
from flower_mcepl.masks.weight_init import with_weights

MaskedT = TypeVar("MaskedT", bound=MaskedConfig)


class MaskedAgent(Agent, Generic[MaskedT]):
    """An agent with private scores over a shared frozen network, which sends its mask.

    `train` must leave the gradient of its last local step in ``gradient``, for the
    fine-tuning step in `fuse`.

    Parameters
    ----------
    index : int
        The agent's number in the graph, 0..N-1.
    module : nn.Module
        The network with the weights that all agents share, as from `shared_module`; it
        is copied.
    data : AgentData
        Training and test split.
    config : MaskedConfig
        The method's parameters; the retention may differ from agent to agent.
    seed : int
        Seed of the run, the same on all agents.
    device : str (default: "cpu")
        Where to calculate.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: MaskedT,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.index, self.seed, self.data, self.config = index, seed, data, config
        self.device = device
        self.learner = Learner.of(module, config, agent=index, seed=seed, device=device)
        # not kept: a shallow agent need not hold what is deeper
        depths = Depths.of(with_weights(module, config.weight_init, seed=seed), config.depth)
        self.depth = depths.depth
        self._common = CommonKnowledge.of(depths, config, seed=seed, agent=index)
        self.model = self._common.model.to(device)
        self.fingerprint, self.prior = self._common.fingerprint, self._common.prior
        self._rules = replace(self.model.rules, opening=0.0)  # of the handshake
        self._shapes = {name: tuple(spec.shape) for name, spec in self.model.layers.items()}
        self._gates = gate_shapes(self.model, [*self.model.rules.filters])
        # of layers that count in the bytes: those that are sent, where anything is
        self._counted = at_depth(self._common.counted, self.depth)
        self.layers, self.layers_by_depth = {}, ()
        if self.model.fusion.exchanges:
            self.layers_by_depth = tuple(self._common.lists)
            self.layers = self._heard_shapes()
        self._first_mask = self._common.first
        self._first_mask_digest = digest_of(self._first_mask)
        # of the last local step, until the fine-tuning step has used it
        self.gradient: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}  # of the momentum, if there is any
        self._average: dict[str, Tensor] = {}  # z̄, running mean of the scores, if there is any
        if config.first_mask == "random":
            # all agents start from the common mask as their neighbors'
            self.model.hear([self._first_mask] if self.layers else [])

    # The fine-tuning step takes the gradient g of the last local step, which was taken
    # at the old n, and lets through what the new n keeps: the paper sends its mask and
    # fine-tunes when the answers come, without a new pass over the data. So a gradient
    # counts for one exchange, also where nobody was heard in it; the step size is that
    # of the exchange's round, in which g was taken unless the agent missed some.
    def fuse(
        self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float] = WHOLE
    ) -> None:
        """Take in the neighbors' masks as ``n``, and take the fine-tuning step."""
        self.set_round(round)
        self.hear(inbox, votes)
        means, scores = self.model.neighbor_means, self.model.all_scores
        with torch.no_grad():
            for name, g in self.gradient.items():
                n, z = means[name], scores[name]
                if n is not None:
                    z.copy_(self.finetuned(z, g, n, round=round))
        self.end_fusion()

    def hear(self, inbox: Mapping[int, Payload], votes: Mapping[int, float]) -> None:
        """Take in the neighbors' masks as ``n``, if anything is exchanged."""
        if not self.layers:
            inbox = {}
        self.model.hear(faded(inbox, votes) if votes else list(inbox.values()))

    def finetuned(self, z: Tensor, g: Tensor, n: Tensor, *, round: int) -> Tensor:
        """Scores of a layer after the fine-tuning step; also those of a stack."""
        lr = self.config.finetune_lr * self.config.lr_factor(round)
        return self.settled(maths.neighbor_step(z, g, n, finetune_lr=lr))

    def end_fusion(self) -> None:
        """Drop the gradient, which is used up, and count the new scores."""
        self.gradient = {}
        self._average_scores()

    @classmethod
    def weighs_votes_with(cls, config: Any) -> bool:
        """Whether faded votes can count: not in weights blended with the neighbors'."""
        return FUSIONS.find(config.fusion).blend is None

    def personal_model(self) -> nn.Module:
        """Return the frozen network under the agent's own mask, an ordinary module."""
        return self.model.bake(self._personal_masks())

    def check(self) -> None:
        """Check the first batch of both splits against the task."""
        self.learner.check(self.model, self.data, self.model.all_scores)

    def outgoing(self) -> dict[str, Tensor]:
        """Return the masks at the new scores and old ``n``; the new one is to come."""
        if not self.layers:
            return {}
        masks = self.model.masks()
        return {name: masks[name].cpu() for name in self.layers}

    def first_payload(self) -> dict[str, Tensor] | None:
        """Return the common first mask, which everyone computes from the run's seed."""
        return self._first_mask if self.layers else None

    def describe(self) -> dict[str, Any]:
        """Facts for the handshake: who this is, its weights, retention and data.

        Numbers of weights are those of what is sent.
        """
        kept = self._kept_by_layer()
        return {
            **super().describe(),
            **share_fact(self.config),
            "num-weights": num_elements(self._counted),
            **depth_facts(self.depth, self._common.lists, self._common.sizes()),
            "kept-weights": sum(kept.values()),
            "first-mask": self._first_mask_digest,
            "prior": self.prior.digest.hex() if self.prior else "",
            "retention": self._retention_text(),
            **({KEPT_BY_LAYER: [kept[name] for name in sorted(kept)]} if self._is_plain() else {}),
            **self._filter_facts(),
            **self.learner.task.facts(),
            **self.model.frozen.facts(),
            **data_facts(self.data),
        }

    def parameters(self) -> dict[str, Any]:
        """Return the fields of the agent's configuration."""
        return self.config.as_parameters()

    def state(self) -> AgentState:
        """Return scores, their mean, gradient, momentum, ``n`` and batch statistics."""
        strength = self.model.fusion_strength
        facts = self._facts(
            **heard_facts(self.model, self._heard_shapes()),
            **({} if strength == 1 else {STRENGTH: strength}),
            **rules_facts(self.model),
        )
        return state_of(facts, self._groups())

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        self._check_facts(state.facts)
        heard_by = read_heard(state.facts, self._heard_shapes(), whose=f"agent {self.index}")
        groups = groups_of(state, device=self.device)
        heard = "neighbor-mean" if "neighbor-mean" in groups else "neighbor-count"
        for group in ("scores", "gradient", "velocity", "average", heard):
            check_group(
                groups,
                group,
                heard_by.shapes if group == heard else self._shapes | self._gates,
                whose=f"agent {self.index}",
                may_be_absent=group != "scores" and (group != heard or not heard_by.number),
            )
        self.model.fusion_strength = float(state.facts.get(STRENGTH, 1.0))
        self.model.set_opening(float(state.facts.get(OPENING, 0.0)))
        self.model.set_scores(groups["scores"])
        self.gradient, self.velocity = groups.get("gradient", {}), groups.get("velocity", {})
        self._average = groups.get("average", {})
        self.model.set_neighbor_means(
            heard_means(groups, heard_by) or None,
            num_neighbors=heard_by.number,
            holders=heard_by.holders,
        )
        buffers = dict(self.model.module.named_buffers())
        for name, tensor in groups.get("buffer", {}).items():
            buffers[name].copy_(tensor)

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "scores": self.model.all_scores,
            "gradient": self.gradient,
            "velocity": self.velocity,
            "average": self._average,
            **heard_group(self.model),
            "buffer": dict(self.model.module.named_buffers()),
        }

    def begin(self, round: int) -> None:
        """Set the model to train in ``round``."""
        self.model.train()
        self.set_round(round)

    def set_round(self, round: int) -> None:
        """Set what of the model changes from round to round."""
        self.model.fusion_strength = self.config.strength(round)
        self.model.set_opening(self.config.opening(round))

    def settled(self, z: Tensor) -> Tensor:
        """Scores in the form that the algorithm keeps them in, each for itself."""
        return z

    @torch.no_grad()
    def _average_scores(self) -> None:
        if not self.config.score_averaging:
            return
        scores = {name: z.detach() for name, z in self.model.all_scores.items()}
        if not self._average:
            self._average = {name: z.clone() for name, z in scores.items()}
        for name, mean in self._average.items():
            mean.lerp_(scores[name], 1 - self.config.score_averaging)

    def personal_scores(self) -> dict[str, Tensor]:
        """Return the scores that the personal model's masks are of."""
        return self._average or {n: z.detach() for n, z in self.model.all_scores.items()}

    def _personal_masks(self) -> dict[str, Tensor]:
        """Return what the weights of the personal model are multiplied by.

        Where there is a running mean of the scores, that is ranked in their place.
        """
        if not self._average:
            return self.model.live_masks()
        scores = {name: z.detach().clone() for name, z in self.model.all_scores.items()}
        self.model.set_scores(self._average)
        try:
            return self.model.live_masks()
        finally:
            self.model.set_scores(scores)

    def _structure(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Metric of two-level masks: number of filters that keep any weight."""
        if not self._gates:
            return {}
        layers = self.model.layers
        live = [int(layers[name].rows(mask).any(dim=1).sum()) for name, mask in masks.items()]
        return {LIVE_FILTERS: float(sum(live))}

    def density(self, masks: Mapping[str, Tensor]) -> float:
        """Share of the weights that masks keep, those of all layers."""
        kept = sum(int(mask.count_nonzero()) for mask in masks.values())
        return kept / self.model.num_weights

    def _heard_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what neighbors may send of the layers that the agent holds."""
        return at_depth(self._common.lists, self.depth)

    def _is_plain(self) -> bool:
        """Whether masks travel that keep as many weights of each layer, always."""
        uneven = self.config.has_gates or self.config.retention_budget != LAYER
        return bool(self.layers) and not uneven

    def _filter_facts(self) -> dict[str, Any]:
        """Number of filters that stay in the end, of each layer that has gates."""
        rules, layers = self._rules, self.model.layers
        live = [rules.num_live(layers[name]) for name in sorted(rules.filters)]
        return {LIVE_FILTERS: live} if live else {}

    def _kept_by_layer(self) -> dict[str, int]:
        layers = self.model.layers
        return {name: self._rules.num_kept(layers[name]) for name in self._counted}

    def _retention_text(self) -> str:
        blocks = self.model.rules.blocks
        ratios = {
            f"{spec.kind} {self.model.retention[name]:g}{' as 2:4' if name in blocks else ''}"
            for name, spec in self.model.layers.items()
        }
        return ", ".join(sorted(ratios))
