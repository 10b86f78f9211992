"""Sparse weights: a personal mask over trained weights, and how it moves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from flower_mcepl.agents.agent import AgentState
from flower_mcepl.agents.algorithm import Masks
from flower_mcepl.agents.parts.dense import DenseAgent, SgdConfig
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.training import gradients_of
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig, read_fields
from flower_mcepl.config.ratios import ratios_of
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.sparsity import (
    drop_share,
    drop_smallest,
    erk_densities,
    grow_largest,
    grow_random,
    random_mask,
    to_sparse,
)
from flower_mcepl.streams import isolated_rng, torch_stream

REGROWS = ("gradient", "random")


@dataclass(frozen=True, kw_only=True)
class SparseConfig(SgdConfig):
    """Parameters of SGD on weights under a mask that moves.

    Training is that of Dis-PFL (arXiv:2206.00187, section 5.1).

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.1  # η > 0
    lr_decay: float = 0.998  # per round
    clip_norm: float = 10.0  # of the whole gradient, before the mask
    local_epochs: int = 5
    density: float = 0.5  # share of the maskable weights that the agent holds, 0 < density <= 1
    # α in [0, 1]: share of the held weights that moves in round 1; 0: masks stand still
    drop_fraction: float = 0.5
    # T: rounds in which that share falls to zero; a run config that has none means its
    # num-rounds
    anneal_rounds: int = 0
    # what grows back: "gradient": where the loss pulls hardest; "random": anywhere, as
    # in Dis-PFL's published CIFAR-10 run
    regrow: str = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)
        check(0 <= self.drop_fraction <= 1, "drop-fraction must be in [0, 1]", self.drop_fraction)
        check(self.anneal_rounds >= 0, "anneal-rounds must be >= 0", self.anneal_rounds)
        check(self.regrow in REGROWS, f"regrow must be one of {', '.join(REGROWS)}", self.regrow)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read the settings of one agent from Flower's run config.

        ``density`` is one ratio, or several separated by commas that the agents take in
        turn: agent i gets number ``i mod k``; in the node config it is the agent's own.
        Without ``anneal-rounds``, ``num-rounds`` is taken.
        """
        densities, own = ratios_of(
            "density", run_config, node_config, agent=agent, default=cls.density
        )
        for density in densities:
            _check_density(density)
        rounds = run_config.get("anneal-rounds") or run_config.get("num-rounds", 0)
        return read_fields(cls, {**run_config, "anneal-rounds": rounds}, density=own)


# Not a check of the configuration itself: that must have a default for every parameter,
# and no number of rounds would suit every run.
def check_annealing(config: SparseConfig) -> None:
    """Raise ConfigError if masks move, and nobody said for how many rounds."""
    check(
        config.drop_fraction == 0 or config.anneal_rounds > 0,
        "anneal-rounds must be >= 1 where masks move, the rounds after which they stand still",
        config.anneal_rounds,
        "Set it, or num-rounds; or drop-fraction = 0.0 for masks that stand still.",
    )


def _check_density(density: float) -> None:
    check(
        0 < density <= 1,
        "density must be in (0, 1]",
        density,
        "Use for example 0.5 to hold half of the weights.",
    )


SparseT = TypeVar("SparseT", bound=SparseConfig)


class SparseAgent(DenseAgent[SparseT]):
    """An agent whose maskable weights live under a personal mask ``m_i``.

    Biases and norm layers do not. `train` takes the local steps under the mask, ``w =
    (w - η (clip(g) + μ w)) * m_i``, each round from momentum zero. Then the mask moves:
    it loses the share ``α_t`` of each layer's smallest weights and gets as many others,
    those of largest gradient in one batch (or random ones). The weights follow it when
    the exchange is done. The first masks are ERK, drawn by each agent for itself over
    weights that are common to all.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        data: AgentData,
        config: SparseT,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        check_annealing(config)
        super().__init__(index, module, data, config, seed=seed, device=device)
        self.masks = self._draw_masks(masked_names(module, self.weights))
        if not self.masks:
            raise UnsupportedLayerError(
                f"algorithm {self.algorithm} needs maskable weights that train; all those "
                f"of {type(module).__name__} are frozen (requires_grad is False). Leave it True "
                "in the model function, or use an algorithm without masks."
            )
        # the masks under which the weights are; until fuse, those before they moved
        self._held = self.masks
        self._apply_masks()

    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps under the mask, then move the mask."""
        self._apply_masks()  # nothing to do after fuse
        self.velocity = {}
        metrics = super().train(round=round)
        self.velocity = {}
        self._move_masks(round)
        return metrics

    def _sparse(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of weights to send: sparse where there is a mask, else dense."""
        return {
            name: to_sparse(tensor, self._held[name]).cpu()
            if name in self._held
            else tensor.cpu().clone()
            for name, tensor in tensors.items()
        }

    def _draw_masks(self, names: list[str]) -> dict[str, Tensor]:
        densities = erk_densities(
            {name: self.shapes[name] for name in names}, density=self.config.density
        )
        generator = torch_stream(self.seed, "first-mask", agent=self.index)
        return {
            name: random_mask(self.shapes[name], density=density, generator=generator).to(
                self.device
            )
            for name, density in densities.items()
        }

    def _averaged(self) -> dict[str, Tensor]:
        """Running mean of the weights, under the present mask."""
        means = super()._averaged()
        return means | {name: means[name] * mask for name, mask in self.masks.items()}

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)
        self._held = self.masks

    def _local_step(self, inputs: Any, labels: Tensor, *, round: int) -> float:
        value = super()._local_step(inputs, labels, round=round)
        self._apply_masks()
        return value

    # The mask moves as soon as its weights are trained, since the gradient that decides
    # what grows is taken there; but what goes out are the weights under the old mask.
    # So two masks live until `fuse`: `masks`, of the next round, and `_held`, under
    # which the weights still are. A state holds both.
    def _move_masks(self, round: int) -> None:
        share = drop_share(
            round, drop_fraction=self.config.drop_fraction, anneal_rounds=self.config.anneal_rounds
        )
        if not share:
            return
        generator = torch_stream(self.seed, "regrowth", agent=self.index, round=round)
        gradients = (
            self._growth_gradients(round, generator) if self.config.regrow == "gradient" else {}
        )
        moved = {}
        for name, mask in self.masks.items():
            count = math.ceil(share * int(mask.sum()))
            kept = drop_smallest(self.weights[name], mask, count=count)
            moved[name] = (
                grow_largest(gradients[name], kept, count=count)
                if gradients
                else grow_random(kept, count=count, generator=generator)
            )
        self.masks = moved  # the weights stay under self._held

    def _growth_gradients(self, round: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradient of one batch on all weights, held or not."""
        self.model.eval()
        with (
            isolated_rng(self.seed, "regrowth", agent=self.index, round=round),
            self.learner.arithmetic(),
        ):
            batches = self.data.train.training_batches(
                round=round, steps=1, batch_size=self.config.batch_size, generator=generator
            )
            inputs, labels = next(iter(batches))
            return gradients_of(self.learner.loss(self.model, inputs, labels), self.weights)

    def density(self) -> float:
        """Return the share of maskable weights under the mask."""
        return self._num_held() / sum(mask.numel() for mask in self._held.values())

    def num_kept(self) -> int:
        """Return the number of shared weights that the agent holds."""
        return sum(
            int(self._held[name].sum()) if name in self._held else self.weights[name].numel()
            for name in self.shared
        )

    def _num_held(self) -> int:
        return sum(int(mask.sum()) for mask in self._held.values())

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._groups(), "mask": self.masks, "held": self._held}

    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        masks = {name: self.shapes[name] for name in self.masks}
        return {**super()._group_shapes(), "mask": (masks, False), "held": (masks, False)}

    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        super()._take_back(groups)
        self.masks, self._held = groups["mask"], groups["held"]


def masked_names(module: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Names of the weights that get a mask, in the module's order."""
    return [name for name in find_maskable(module) if name in weights]


def held_masks(state: AgentState, parameters: Mapping[str, Any]) -> Masks:
    """Read from a state the masks under which the weights are."""
    return state.group("held")
