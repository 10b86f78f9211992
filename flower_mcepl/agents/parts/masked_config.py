"""Parameters of masks over shared random weights: scores, retention, fusion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from flower_mcepl.agents.parts.depth import DepthConfig, read_depth
from flower_mcepl.agents.parts.frozen_weights import FrozenWeightsConfig
from flower_mcepl.agents.parts.sharing import SharingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, read_fields
from flower_mcepl.config.ratios import per_layer, ratios_of
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.blocks import BLOCK_RETENTION, BLOCKS, NONE
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.gates import BUDGETS, LAYER, check_share
from flower_mcepl.masks.retention import Retention, check_retentions
from flower_mcepl.masks.weight_init import MODULE

SHARED, INDEPENDENT, MAGNITUDE = "shared", "independent", "magnitude"
SCORE_INITS = (SHARED, INDEPENDENT, MAGNITUDE)
FIRST_MASKS = ("random", "scores")
FILTERS_LAYERS = "filters-layers"
FUSION_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(SharingConfig, FrozenWeightsConfig, DepthConfig):
    """Parameters of scores, masks and fusion; the defaults are those of the paper.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # r in (0, 1]
    retention: Retention = field(default_factory=lambda: {"conv": 0.3, "linear": 0.9})
    # of the common first mask, equal on all agents; None: as retention
    first_retention: Retention | None = None
    # what all know of a mask before it comes: "random": one Bernoulli mask, which at
    # first counts as the neighbors' (paper); "scores": the mask of the shared first
    # scores; an agent then ranks its scores alone until the first exchange
    first_mask: str = "random"
    finetune_lr: float = 10.0  # η_f >= 0: step size of the fine-tuning step; 0 leaves the step out
    fusion: str = "mcepl"  # how neighbors' masks count: a name in flower_mcepl.masks.FUSIONS
    # c >= 0: factor on what was heard, ``y = z + c * mean(|z|) * sign(z) * n``; 1 in
    # the paper; rules of fusion that rank an agent's scores alone go without
    fusion_strength: float = 1.0
    # "linear", "cosine": c goes from fusion_strength to last_fusion_strength over
    # fusion_rounds
    fusion_schedule: str = "constant"
    last_fusion_strength: float = 1.0  # c >= 0 at the end of a fusion_schedule, and after it
    # length of the schedule in rounds; a run config that has none means its num-rounds
    fusion_rounds: int = 0
    # "shared": all agents start from equal scores; "independent": each from its own;
    # "magnitude": all from the sizes of the frozen weights, for pretrained ones
    score_init: str = SHARED
    # ρ in (0, 1]: share of the filters that stays on, in layers that have gates
    filters: float = 1.0
    # ρ of single layers, by name or pattern, for all agents: "conv1.weight=0.8"; 1: no
    # gates; convolutions and linear layers have them, but the first and the last layer,
    # in the order in which the network registers them
    filters_layers: str = ""
    # length of the cubic schedule from 1 down to ρ; 0: ρ from the first round on; a run
    # config that has none means half of its num-rounds
    filters_rounds: int = 0
    # rounds with all filters on before it; a run config that has none means a tenth of
    # its num-rounds
    filters_warmup: int = 0
    # whether there are gates although ρ is 1, as in a fleet where others have less
    gated: bool = False
    # "layer": each layer keeps its retention; "network": all together keep as many
    # weights, those of the largest ``|y|`` over its mean in the layer, zeros left out
    retention_budget: str = LAYER
    # "2:4": linear layers whose number of inputs is a multiple of 4 keep the 2 of
    # largest ``|y|`` of every 4 inputs, so half of their weights; "none": any
    block: str = NONE
    # β in [0, 1): evaluate at the scores' running mean z̄ = β z̄ + (1 - β) z; 0: at z
    score_averaging: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("finetune_lr", "fusion_strength", "last_fusion_strength")
        FUSIONS.find(self.fusion)
        self._check_one_of("score_init", SCORE_INITS)
        self._check_one_of("first_mask", FIRST_MASKS)
        self._check_one_of("fusion_schedule", FUSION_SCHEDULES)
        check(
            self.first_mask == "random" or self.score_init != INDEPENDENT,
            "first-mask scores is the mask of common first scores and needs score-init shared or "
            "magnitude",
            self.score_init,
        )
        check(
            self.score_init != MAGNITUDE or self.weight_init == MODULE,
            f"score-init magnitude ranks weights by their sizes and needs weight-init {MODULE}",
            self.weight_init,
            "Signed constants have one size a layer.",
        )
        check(self.fusion_rounds >= 0, "fusion-rounds must be >= 0", self.fusion_rounds)
        check(
            self.fusion_schedule == "constant" or self.fusion_rounds > 0,
            f"fusion-schedule {self.fusion_schedule} needs fusion-rounds >= 1, the rounds after "
            "which the strength is last-fusion-strength",
            self.fusion_rounds,
        )
        check(
            0 <= self.score_averaging < 1, "score-averaging must be in [0, 1)", self.score_averaging
        )
        check_share(self.filters, of="filters")
        self.shares_of_layers()
        for name in ("filters_rounds", "filters_warmup"):
            rounds = getattr(self, name)
            check(rounds >= 0, f"{name.replace('_', '-')} must be >= 0", rounds)
        self._check_one_of("retention_budget", BUDGETS)
        self._check_one_of("block", BLOCKS)
        check(
            self.block == NONE or self.retention_budget == LAYER,
            f"block {self.block} fixes what each layer keeps and needs retention-budget {LAYER}",
            self.retention_budget,
        )
        for retention in (self.retention, self.first_retention):
            if retention is not None:
                check_retentions(retention)

    def strength(self, round: int) -> float:
        """Return the fusion strength c in ``round`` (from 1)."""
        first, last = self.fusion_strength, self.last_fusion_strength
        if self.fusion_schedule == "constant":
            return first
        passed = min((round - 1) / self.fusion_rounds, 1.0)
        if self.fusion_schedule == "cosine":
            passed = 0.5 * (1 - math.cos(math.pi * passed))
        return first + (last - first) * passed

    @property
    def has_gates(self) -> bool:
        """Whether masks have two levels."""
        return (
            self.gated or self.filters < 1 or any(s < 1 for s in self.shares_of_layers().values())
        )

    def opening(self, round: int) -> float:
        """Share of the filters that are to go that is on still, in ``round`` (from 1).

        The share that is on falls as in gradual pruning (Zhu and Gupta 2017,
        arXiv:1710.01878): ``ρ + (1 - ρ) (1 - p)³``.
        """
        if not self.filters_rounds:
            return float(round <= self.filters_warmup)
        passed = (round - 1 - self.filters_warmup) / self.filters_rounds
        return (1 - min(max(passed, 0.0), 1.0)) ** 3

    def shares_of_layers(self) -> dict[str, float]:
        """Share ρ of single layers, by name or pattern."""
        shares = per_layer(FILTERS_LAYERS, self.filters_layers, example="conv1.weight=0.8")
        for name, share in shares.items():
            check_share(share, of=f"key {FILTERS_LAYERS}, {name}")
        return shares

    @classmethod
    def keys(cls) -> set[str]:
        """Return the run-config keys: the fields, with ratios by kind and layer."""
        ratios = {"retention-conv", "retention-linear", "retention-layers"}
        return super().keys() - {"retention", "first-retention", "gated"} | ratios

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

        Without ``retention-linear``, ``block = "2:4"`` means its .5.

        ``filters`` is one share or several in turn, likewise, and a device's own in its
        node config. If any in the run config is below 1, all agents have gates.
        """
        own, first = {}, {}
        defaults = cls().retention
        assert isinstance(defaults, Mapping)
        if run_config.get("block", NONE) != NONE:
            defaults = {**defaults, "linear": BLOCK_RETENTION}
        for kind in ("conv", "linear"):
            key = f"retention-{kind}"
            ratios, own[kind] = ratios_of(
                key, run_config, node_config, agent=agent, default=defaults[kind]
            )
            first[kind] = sum(ratios) / len(ratios)
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
        shares, filters = ratios_of("filters", run_config, node_config, agent=agent, default=1.0)
        for share in (*shares, filters):
            check_share(share, of="key filters")
        of_layers = per_layer(FILTERS_LAYERS, run_config.get(FILTERS_LAYERS, ""))
        gated = any(share < 1 for share in (*shares, *of_layers.values()))
        num_rounds = run_config.get("num-rounds", 0) if gated else 0
        rounds = {
            key: run_config.get(key) or num_rounds // part
            for key, part in (("filters-rounds", 2), ("filters-warmup", 10))
        }
        check(
            gated or filters == 1,
            "the node config's filters is below 1 where the run config's has a share below 1, so "
            "that all agents have gates",
            filters,
            'Set filters in the run config, too, such as "1.0, 0.5".',
        )
        return read_fields(
            cls,
            {**run_config, **rounds},
            retention=own | layers,
            first_retention=first | layers,
            filters=filters,
            gated=gated,
            depth=read_depth(run_config, node_config, agent=agent),
        )
