"""What all agents know of masks before any has come: layers, classes, first masks.

Where a network has stages, it is of all of them, whatever part an agent holds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from flower_mcepl.agents.parts.depth import Depths, at_depth, fitting, held_names
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.masked_config import INDEPENDENT, MAGNITUDE, MaskedConfig
from flower_mcepl.agents.parts.prior import shared_prior
from flower_mcepl.agents.parts.sharing import num_elements, shared_shapes
from flower_mcepl.config.patterns import keys_by_name
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.blocks import block_layers
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.gates import gate_name, resolve_filters
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.retention import resolve_retention
from flower_mcepl.streams import torch_stream
from flower_mcepl.wire import Prior


@final
@dataclass(frozen=True)
class CommonKnowledge:
    """Common knowledge of all agents, and the model that one of them begins with."""

    model: MaskedModel  # of the agent, with its first scores
    fingerprint: str  # of all frozen weights
    names: tuple[str, ...]  # of all that has scores, at any depth
    counted: list[dict[str, tuple[int, ...]]]  # layers that count in the bytes, by depth
    lists: list[dict[str, tuple[int, ...]]]  # those with their gates: what is sent, by depth
    prior: Prior | None
    first: dict[str, Tensor]  # the common first mask

    @classmethod
    def of(
        cls, depths: Depths, config: MaskedConfig, *, seed: int, agent: int
    ) -> "CommonKnowledge":
        """What an agent of this configuration knows, and begins with."""
        shares = shares_by_depth(config, depths)
        whole = _whole_model(depths, config, shares, seed=seed, agent=agent)
        shapes = {name: tuple(spec.shape) for name, spec in whole.layers.items()}
        shared = shared_shapes(config, shapes)
        counted = shared if whole.fusion.exchanges else shapes
        by_depth = [_held(counted, part) for part in depths.parts]
        lists = [
            held | gate_shapes(whole, [name for name in held if name in own])
            for held, own in zip(by_depth, shares, strict=True)
        ]
        gated = [name for name in whole.layers if any(name in own for own in shares)]
        heard = counted | gate_shapes(whole, [name for name in counted if name in gated])
        prior = shared_prior(whole, seed=seed, score_init=config.score_init, names=list(shared))
        return cls(
            model=_part_of(whole, depths, shares) if depths.depth else whole,
            fingerprint=whole.fingerprint,
            names=(*whole.layers, *map(gate_name, gated)),
            counted=by_depth,
            lists=lists,
            prior=prior,
            first=_first_mask(whole, config, heard, seed=seed),
        )

    def sizes(self) -> list[int]:
        """Numbers of weights that count in the bytes, by depth."""
        return [num_elements(counted) for counted in self.counted]


def shares_by_depth(config: MaskedConfig, depths: Depths) -> list[dict[str, float]]:
    """Share ρ of the layers that have gates, in the part of each depth.

    A shallow part may be too small for any; the deepest has some.
    """
    if not config.has_gates:
        return [{} for _ in depths.parts]
    of_layers = config.shares_of_layers()
    keys_by_name(find_maskable(depths.whole), of_layers, of="filters-layers")
    return [
        shares_of(part, config, may_be_none=part is not depths.parts[-1]) for part in depths.parts
    ]


def shares_of(
    part: nn.Module, config: MaskedConfig, *, share: float | None = None, may_be_none: bool = True
) -> dict[str, float]:
    """Share ρ of a part's layers that have gates; ``share`` in place of filters."""
    layers = find_maskable(part)
    of_layers = fitting(config.shares_of_layers(), layers)
    share = config.filters if share is None else share
    return resolve_filters(share, of_layers, part, layers, may_be_none=may_be_none)


def gate_shapes(model: MaskedModel, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the gates of some layers."""
    return {gate_name(name): (model.layers[name].num_filters,) for name in names}


def _whole_model(
    depths: Depths,
    config: MaskedConfig,
    shares: list[dict[str, float]],
    *,
    seed: int,
    agent: int,
) -> MaskedModel:
    """Network of all stages with its first scores; with gates where it has none."""
    owner = agent if config.score_init == INDEPENDENT else None
    model = MaskedModel(
        depths.whole,
        retention=config.retention,
        fusion=FUSIONS.find(config.fusion),
        fusion_strength=config.strength(1),
        filters={} if depths.depth else shares[0],
        budget=config.retention_budget,
        blocks=block_layers(config.block, depths.whole, find_maskable(depths.whole)),
        generator=torch_stream(seed, "scores", agent=owner),
    )
    if config.score_init == MAGNITUDE:
        model.set_scores(_weight_sizes(model))
    return model


def _part_of(
    whole: MaskedModel, depths: Depths, shares: Sequence[Mapping[str, float]]
) -> MaskedModel:
    """Model of the part that an agent holds, with its scores in the whole."""
    names = find_maskable(depths.held)
    model = MaskedModel(
        depths.held,
        retention={name: whole.retention[name] for name in names},
        fusion=whole.fusion,
        fusion_strength=whole.fusion_strength,
        filters=at_depth(shares, depths.depth),
        budget=whole.rules.budget,
        blocks=held_names(whole.rules.blocks, names),
        generator=torch.Generator(),
    )
    model.set_scores({**model.all_scores} | {name: whole.scores[name] for name in names})
    return model


def _held(shapes: Shapes, part: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: shapes[name] for name in held_names(shapes, find_maskable(part))}


def _weight_sizes(model: MaskedModel) -> dict[str, Tensor]:
    """Sizes of the frozen weights, none of them zero; gates as is."""
    return {**model.all_scores} | {
        name: maths.reflected(model.module.get_parameter(name).detach().to(z.dtype))
        for name, z in model.scores.items()
    }


def _first_mask(
    whole: MaskedModel, config: MaskedConfig, heard: Shapes, *, seed: int
) -> dict[str, Tensor]:
    """The common first mask of all that is heard; all gates are open in it."""
    ratios = config.first_retention
    resolved = resolve_retention(config.retention if ratios is None else ratios, whole.layers)
    if config.first_mask == "scores":
        masks = {
            name: maths.two_of_four(z.detach())
            if name in whole.rules.blocks
            else maths.topk_mask(z.detach(), retention=resolved[name])
            for name, z in whole.scores.items()
        }
    else:
        generator = torch_stream(seed, "first-mask")
        masks = {
            name: maths.bernoulli_mask(spec.shape, retention=resolved[name], generator=generator)
            for name, spec in whole.layers.items()
        }
    gates = heard.keys() - masks.keys()
    masks |= {gate: torch.ones(heard[gate], dtype=torch.bool) for gate in gates}
    return {name: masks[name] for name in heard}


def digest_of(masks: Mapping[str, Tensor]) -> str:
    """16 hex characters that stand for bool masks."""
    digest = hashlib.blake2b(digest_size=8)
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.contiguous().numpy().data)
    return digest.hexdigest()
