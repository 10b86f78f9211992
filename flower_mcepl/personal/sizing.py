"""Size of an agent's personal model as a file, before the agent is trained."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flower_mcepl.agents import Agent
from flower_mcepl.agents.parts.masked import MaskedAgent
from flower_mcepl.masks.gates import masks_of
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.personal.agents import agent_bytes, personal_network
from flower_mcepl.personal.network import named_tensors
from flower_mcepl.streams import torch_stream

MOST_WRITTEN = 2**24  # weights of a network whose file is written to know its size


@dataclass(frozen=True)
class ExpectedSize:
    """Bytes that a ``.mask`` file will have, and how that is known."""

    nbytes: int
    how: str


# The file of an untrained agent would be far too small: its mask is the one of the
# first scores, and weights that will be trained are still those that the seed draws.
def expected_size(agent: Agent) -> ExpectedSize:
    """Size of an agent's file, as far as it can be known before training."""
    masked = isinstance(agent, MaskedAgent)
    blended = isinstance(agent, MaskedAgent) and agent.model.fusion.blend is not None
    network = (
        _under_random_masks(agent) if isinstance(agent, MaskedAgent) else personal_network(agent)
    )
    drawn = "weight_init" in agent.parameters() and not blended
    weights = sum(spec.shape.numel() for spec in find_maskable(network).values())
    if weights > MOST_WRITTEN:
        return ExpectedSize(_entropy(network, drawn=drawn), "estimated by the entropy of its masks")
    size = len(agent_bytes(agent, network=network, drawn=drawn))
    if blended:
        return ExpectedSize(size, "at most: written now; weights under a blend of masks are stored")
    if masked:
        return ExpectedSize(size, "at most: written now, under random masks of its retention")
    how = "a mask of which nothing is known" if drawn else "weights that are trained are stored"
    return ExpectedSize(size, f"about: written now; {how}")


def _under_random_masks(agent: MaskedAgent[Any]) -> nn.Module:
    """The network of an agent when all filters that are to go have gone.

    Where a rule blends masks, those of the neighbors together may keep all weights.
    """
    model, generator = agent.model, torch_stream(agent.seed, "expected-size", agent=agent.index)
    rules = replace(model.rules, opening=0.0)
    y = {
        name: (1 - torch.rand(z.shape, generator=generator)).to(z.device)
        for name, z in model.all_scores.items()
    }
    blended = model.fusion.blend is not None
    masks = y if blended else masks_of(y, model.layers, rules)
    scaled = {
        name: masks[name] * (rules.scale(spec) if name in rules.filters else 1)
        for name, spec in model.layers.items()
    }
    return model.bake(scaled).cpu().eval().requires_grad_(False)


def _entropy(network: nn.Module, *, drawn: bool) -> int:
    """Bytes of a file by what its masks and values hold."""
    masked, bits = set(find_maskable(network)), 0.0
    for name, tensor in named_tensors(network).items():
        size = 8 * tensor.element_size()
        if name not in masked:
            bits += size * tensor.numel()
            continue
        on = int(tensor.count_nonzero())
        share = on / max(tensor.numel(), 1)
        bits -= tensor.numel() * sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)
        bits += 0 if drawn else size * on
    return math.ceil(bits / 8)
