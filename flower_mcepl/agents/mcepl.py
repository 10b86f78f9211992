"""MCE-PL: personal masks over shared random weights, fused with neighbors' masks."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.auto import COMPACT, FULL, check_compact_keys, without_auto
from flower_mcepl.agents.parts.common_knowledge import shares_of
from flower_mcepl.agents.parts.mask_states import final_masks
from flower_mcepl.agents.parts.masked import MaskedAgent
from flower_mcepl.agents.parts.masked_config import MaskedConfig
from flower_mcepl.agents.parts.meters import SECONDS, UNITS
from flower_mcepl.agents.parts.pacing import Pacer
from flower_mcepl.agents.parts.score_step import (
    FILTER_NORMALIZED,
    GRADIENT,
    MAGNITUDE,
    NORMALIZED,
    PROXIMAL,
    RAW,
    SIGNED,
    ScoreStep,
)
from flower_mcepl.agents.parts.step_times import cached_cost, facts_of, step_cost
from flower_mcepl.agents.parts.training import (
    check_learned,
    finite_loss,
    gradients_of,
    train_locally,
)
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.config.patterns import keys_by_name
from flower_mcepl.config.ratios import per_layer
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks.compact import CompactNetwork, check_compact
from flower_mcepl.masks.gates import gate_name

SCORE_FORMS = (SIGNED, MAGNITUDE)
SCORE_GRADIENTS = (RAW, NORMALIZED, FILTER_NORMALIZED)
LASSO_STEPS = (GRADIENT, PROXIMAL)
FILTERS_TRAININGS = (FULL, COMPACT)
LR_LAYERS = "score-lr-layers"
WHY_FULL = "filters-training-full"  # fact of a handshake: why no step is compact


@dataclass(frozen=True, kw_only=True)
class MceplConfig(MaskedConfig):
    """Parameters of MCE-PL; the defaults are the reference setting of the paper.

    Source: Tian et al. 2025, arXiv:2504.17520.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    score_lr: float = 10.0  # η > 0: step size on the scores
    # η > 0 of single layers, by name or pattern, the exact name first: "fc*=0.0001"
    score_lr_layers: str = ""
    # "raw": g as it is (paper); "normalized": g / sqrt(mean(g²)) per layer, before
    # weight decay and momentum; a score_lr of 0.0005 then suits; "filter-normalized":
    # 2 g / (rms of the layer + rms of the filter)
    score_gradient: str = RAW
    # "signed": z (paper); "magnitude": ``s = |z|``, and a step that would leave s below
    # zero bounces off it
    score_form: str = SIGNED
    group_lasso: float = 0.0  # λ >= 0; the paper's published code has none
    # "gradient": the lasso is part of the loss (paper); "proximal": each step on the
    # loss is followed by ``z_f * max(0, 1 - ηλ / ‖z_f‖)``, which ends at zero
    lasso_step: str = GRADIENT
    # "full": a local step calculates all filters; "compact": those that are on, but for
    # one step in filters_refresh; gates stand still between these, all else is the same
    # up to rounding
    filters_training: str = FULL
    # >= 1: with "compact", one local step in so many is a full one, counted over rounds
    filters_refresh: int = 10
    # > 0: what a local step may take where filters is "auto": each device then chooses
    # its ρ before every round, see `agents.parts.pace`
    step_budget: float = 0.0
    step_budget_unit: str = SECONDS  # or "joules", where the machine tells them
    # whether filters is "auto"
    filters_auto: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("score_lr", "group_lasso")
        check(
            self.score_lr > 0, "score-lr must be > 0", self.score_lr, "The reference value is 10."
        )
        self._check_one_of("score_gradient", SCORE_GRADIENTS)
        self._check_one_of("score_form", SCORE_FORMS)
        self._check_one_of("lasso_step", LASSO_STEPS)
        self._check_one_of("filters_training", FILTERS_TRAININGS)
        self._check_one_of("step_budget_unit", UNITS)
        check_compact_keys(self)
        for name, lr in self._lr_of_layers().items():
            check(math.isfinite(lr) and lr > 0, f"key {LR_LAYERS}, {name}, must be > 0", lr)

    @classmethod
    def keys(cls) -> set[str]:
        """Return the run-config keys: the fields, with ratios by kind and layer."""
        return super().keys() - {"filters-auto"}

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read the settings of one agent; ``filters`` may be "auto", here or there."""
        run, node, auto = without_auto(run_config, node_config)
        config = super().from_run_config(run, agent=agent, node_config=node)
        return replace(config, **auto)

    def lr_by_layer(self, names: Iterable[str]) -> dict[str, float]:
        """Step size of each layer: an exact name wins over a pattern, both over all.

        Raises
        ------
        ConfigError
            If a key of ``score_lr_layers`` fits no layer.
        """
        of_layers = self._lr_of_layers()
        keys = keys_by_name(names, of_layers, of=LR_LAYERS)
        return {n: self.score_lr if key is None else of_layers[key] for n, key in keys.items()}

    def _lr_of_layers(self) -> dict[str, float]:
        return per_layer(LR_LAYERS, self.score_lr_layers, noun="STEP", example="fc*=0.0001")


@final
class MceplAgent(MaskedAgent[MceplConfig]):
    """One MCE-PL agent: private scores over a shared frozen network, trained by SGD.

    Its mask is all that it sends. The ablations of the paper are other rules of fusion
    and fixed parameters (`mask_variants`), not other agents.

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
        super().__init__(index, module, data, config, seed=seed, device=device)
        self.lr = config.lr_by_layer(self._common.names)  # η by layer
        self.score_step = ScoreStep(config)
        for z in self.model.all_scores.values():
            with torch.no_grad():
                z.copy_(self.settled(z))
        self._compact, self._why_full = self._compact_network()
        # chooses the share of filters, where that is left to the device
        self.pacer = Pacer.of(index, config) if config.filters_auto else None

    def _compact_network(self) -> tuple[CompactNetwork | None, str]:
        """Network of the compact steps; None, and why there is none."""
        if self.config.filters_training == FULL:
            return None, ""
        try:
            return CompactNetwork(self.model), ""
        except UnsupportedLayerError as error:
            if self.config.filters_auto:  # no share would make a step shorter
                raise
            warnings.warn(
                f"agent {self.index} trains all of its filters in every step, also those that are "
                f"off: {error}. Set filters-training to full, or mend the network.",
                stacklevel=4,
            )
            return None, str(error)

    def check(self) -> None:
        """Check the first batches, and a compact network against the whole one."""
        super().check()
        compact = self._compact
        if compact is not None:
            self.model.eval()
            self.learner.compare(self.data.train, lambda outputs: check_compact(compact, outputs))

    def describe(self) -> dict[str, Any]:
        """Facts for the handshake; of filters that cannot be left out, why."""
        why = {WHY_FULL: self._why_full[:200]} if self._why_full else {}
        return {**super().describe(), **why}

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps on the scores; ``train-loss`` is their mean loss.

        Raises
        ------
        DivergedError
            If a loss or score is not finite.
        """
        self.begin(round)
        if self.pacer is not None:
            self._set_share(self.pacer.begin(round, self.step_cost))
        num_steps = self.config.num_steps(self.data.train.num_examples)
        numbers = count((round - 1) * num_steps + 1)
        step = partial(self._local_step, round=round, numbers=numbers)
        metrics = train_locally(
            step,
            self.data.train,
            self.config,
            seed=self.seed,
            agent=self.index,
            round=round,
            device=self.device,
        )
        self.check_scores(round)
        return metrics if self.pacer is None else {**metrics, **self.pacer.end(round)}

    def check_scores(self, round: int) -> None:
        """Raise DivergedError unless the scores after the local steps are finite."""
        way_out = f"Lower score-lr (now {self.config.score_lr:g})."
        scores = self.model.all_scores
        check_learned(scores, what="scores", agent=self.index, round=round, way_out=way_out)

    def state(self) -> AgentState:
        """Return all that must survive, the pace of the device included."""
        state = super().state()
        more = {} if self.pacer is None else self.pacer.facts()
        return AgentState({**state.facts, **more}, state.arrays) if more else state

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken."""
        super().restore(state)
        if self.pacer is not None:
            self._set_share(self.pacer.restore(state.facts) or 1.0)

    def step_cost(self, share: float) -> float:
        """What a local step takes with a share of the filters on, by the budget's unit.

        It is measured once for a device and network; nothing is learned by it.
        """
        settings = {**facts_of(self.model, self.config), "share": share, "device": self.device}
        return cached_cost(settings, partial(self._measure_step, share))

    def _measure_step(self, share: float) -> float:
        before = self.model.rules
        self.model.train()
        self._set_share(share)
        assert self.pacer is not None
        network, meter = self._compact_in(1) or self.model, self.pacer.meter
        try:
            return step_cost(network, self.model, self.learner, self.data.train, meter=meter)
        finally:
            self.model.rules = before

    def _set_share(self, share: float) -> None:
        shares = shares_of(self.model.module, self.config, share=share)
        self.model.set_filters(shares)

    def evaluate(self) -> dict[str, float]:
        """Evaluate the network under the agent's own mask, on its own test split.

        With ``score_averaging`` the mask is that of the scores' running mean; training
        and what is sent do without it.
        """
        masks = self._personal_masks()
        metrics = self.learner.evaluate(self.model.bake(masks), self.data)
        return {**metrics, "density": self.density(masks), **self._structure(masks)}

    # Two gradients: the steps follow that of the loss, normalized or not, with weight
    # decay and momentum, while the fine-tuning step takes the last one as it is (group
    # lasso included).
    #
    # What is the same of signed scores z and magnitudes s = |z|: their gradients differ
    # by the sign of z alone, so without momentum, fine-tuning and running mean s is |z|
    # after every step, bit for bit, and so is every mask. A velocity belongs to one
    # side of zero: where z changes sides, its velocity goes on and carries z further
    # away from zero, whereas s keeps running against the wall, as its gradient says.
    #
    # A compact step leaves the gates alone: those that are off have no gradient in it,
    # and if the others moved without them, being off would last. Fine-tuning after it
    # finds a gradient of zero.
    def _local_step(
        self, inputs: Any, labels: Tensor, *, round: int, numbers: Iterator[int]
    ) -> float:
        number = next(numbers)
        start = 0.0 if self.pacer is None else self.pacer.meter()
        compact = self._compact_in(number)
        scores = self.model.all_scores if compact is None else self.model.scores
        loss = self.learner.loss(compact or self.model, inputs, labels)
        value = finite_loss(
            loss, agent=self.index, round=round, key="score-lr", lr=self.config.score_lr
        )
        self.gradient = gradients_of(self.objective(loss), scores)
        with torch.no_grad():
            for name, z in scores.items():
                self._step(name, z, lr=self.lr[name] * self.config.lr_factor(round))
        if compact is not None:
            self._let_gates_stand()
        if self.pacer is not None and number % self.config.filters_refresh:
            self.pacer.note(self.pacer.meter() - start)
        return value

    def objective(self, loss: Tensor) -> Tensor:
        """What the local steps follow: the loss, with the lasso where that is in it."""
        if not self.config.group_lasso or self.config.lasso_step != GRADIENT:
            return loss
        return loss + self.config.group_lasso * self.model.group_lasso()

    def _let_gates_stand(self) -> None:
        """Note a gradient of zero for the gates, after a step that did without them."""
        for name in map(gate_name, self.model.rules.filters):
            zero = torch.zeros_like(self.model.all_scores[name])
            self.gradient[name] = zero
            if self.config.momentum:
                self.velocity.setdefault(name, zero)

    def _compact_in(self, step: int) -> CompactNetwork | None:
        """Network of a local step, by its number in the run; None: the whole model."""
        compact = self._compact
        if compact is None or step % self.config.filters_refresh == 0:
            return None
        return compact if compact.is_smaller else None

    def _step(self, name: str, z: Tensor, *, lr: float) -> None:
        g, v, layer = self.gradient[name], self.velocity.get(name), self.model.layers.get(name)
        stepped, velocity = self.score_step(z, g, v, layer=layer, lr=lr)
        z.copy_(stepped)
        if self.config.momentum:
            self.velocity[name] = velocity

    def settled(self, z: Tensor) -> Tensor:
        """Scores in the form that they are kept in."""
        return self.score_step.settled(z)


MCEPL = Algorithm(MceplAgent, MceplConfig, final_masks=final_masks)
