"""Masked models of one network as one: an axis of agents before all others."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.gates import masks_of
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.placement import Slot, in_place, slots_of

Stacked = dict[str, Tensor]
"""Tensors by name, those of all agents in one: [agents, *shape]."""


@final
class StackedModel:
    """The scores of several `MaskedModel` of one network, and what comes of them.

    The models differ in scores, in what they heard, in the buffers of the network and
    in how much each layer retains; all else is that of the first one. They are read
    when they are first needed, and nothing of them is changed.

    Parameters
    ----------
    models : sequence of MaskedModel
        The models, none with gates.
    scores : sequence of mapping, optional
        Scores of each to be ranked in place of its own.
    """

    def __init__(
        self,
        models: Sequence[MaskedModel],
        scores: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.models, self.first = models, models[0]
        self._own = [model.scores for model in models] if scores is None else scores
        self._heard = [model.neighbor_means for model in models]

    @cached_property
    def scores(self) -> Stacked:
        """The scores of all agents by layer, leaves of a graph."""
        return {name: z.requires_grad_() for name, z in stacked(self._own).items()}

    def aggregation(self) -> Stacked:
        """Return ``y`` by layer, differentiable in the scores."""
        return {name: self._fused(name, z) for name, z in self.scores.items()}

    @torch.no_grad()
    def masks(self, y: Mapping[str, Tensor] | None = None) -> Stacked:
        """Return the bool masks of all agents, at ``y`` where it is at hand."""
        y = self.aggregation() if y is None else y
        if self.first.is_structured():
            return stacked(
                [
                    masks_of({name: part[i] for name, part in y.items()}, model.layers, model.rules)
                    for i, model in enumerate(self.models)
                ]
            )
        return {name: maths.largest_masks(part, keep=self._kept(name)) for name, part in y.items()}

    def masked_weights(self, masks: Mapping[str, Tensor] | None = None) -> Stacked:
        """Return ``w * m`` by layer, with the gradient straight to the scores.

        ``masks`` stand in the place of those of the scores.
        """
        y = self.aggregation()
        masks = self.masks(y) if masks is None else masks
        return {name: self._masked(name, y[name], mask) for name, mask in masks.items()}

    @torch.no_grad()
    def live_masks(self) -> Stacked:
        """Return what multiplies the frozen weights: the masks, or their blend."""
        masks = self.masks()
        if self.first.fusion.blend is None:
            return masks
        return {name: self._blended(name, mask.float()) for name, mask in masks.items()}

    def run(
        self,
        weights: Mapping[str, Tensor],
        inputs: Any,
        outputs: Callable[[nn.Module, Any], Tensor],
    ) -> tuple[Tensor, Stacked]:
        """Outputs of all agents' networks, each for inputs of its own, and new buffers.

        Parameters
        ----------
        weights : mapping
            What stands in the place of the maskable weights, by layer.
        inputs : tensor, or tuple, list or mapping of tensors
            Those of all agents, [agents, batch, ...].
        outputs : callable
            ``outputs(network, inputs)``: what one agent's network makes of its batch.

        Raises
        ------
        UnsupportedLayerError
            If the network puts another tensor in the place of a buffer.
        """
        module = self.first.module
        slots, buffer_slots = slots_of(module, self.first.layers), _buffer_slots(module)
        buffers = stacked([model_buffers(model) for model in self.models])

        def of_one(weights: Stacked, buffers: Stacked, inputs: Any) -> Tensor:
            with in_place(slots, weights), _buffers_in_place(buffer_slots, buffers):
                return outputs(module, inputs)

        result: Tensor = torch.vmap(of_one)(dict(weights), buffers, inputs)
        return result, buffers

    def _kept(self, name: str) -> list[int]:
        numel = self.first.layers[name].shape.numel()
        return [maths.kept_weights(numel, retention=model.retention[name]) for model in self.models]

    def _fused(self, name: str, z: Tensor) -> Tensor:
        means = [heard[name] for heard in self._heard]
        rows = [i for i, n in enumerate(means) if n is not None]
        if not rows:
            return z
        n = torch.stack([n for n in means if n is not None])
        if len(rows) == len(means):
            return torch.vmap(self.first.ranked)(z, n)
        places = torch.tensor(rows, device=z.device)
        return z.index_copy(0, places, torch.vmap(self.first.ranked)(z[places], n))

    def _masked(self, name: str, y: Tensor, mask: Tensor) -> Tensor:
        m = maths.straight_through(y, mask)
        if self.first.fusion.blend is not None:
            m = m + (self._blended(name, m.detach()) - m).detach()  # no gradient in the bracket
        return self.first.weight(name) * m

    def _blended(self, name: str, m: Tensor) -> Tensor:
        return torch.stack([model.blended(m[i], name=name) for i, model in enumerate(self.models)])


def stacked(parts: Sequence[Mapping[str, Tensor]]) -> Stacked:
    """Tensors of several agents by name, each name's in one tensor, a copy."""
    return {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}


@torch.no_grad()
def put_back(values: Mapping[str, Tensor], places: Sequence[Mapping[str, Tensor]]) -> None:
    """Copy stacked tensors to where each agent has its own."""
    for i, place in enumerate(places):
        for name, value in values.items():
            place[name].copy_(value[i])


def model_buffers(model: MaskedModel) -> dict[str, Tensor]:
    """Buffers of a model's network, such as running statistics, by name."""
    return dict(model.module.named_buffers())


def _buffer_slots(module: nn.Module) -> dict[str, list[Slot]]:
    """Every place of the buffers in a module, as `slots_of` of its weights."""
    names = {id(buffer): name for name, buffer in module.named_buffers()}
    slots: dict[str, list[Slot]] = {name: [] for name in names.values()}
    for submodule in module.modules():
        for local, buffer in submodule._buffers.items():
            if buffer is not None:
                slots[names[id(buffer)]].append((submodule, local))
    return slots


@contextlib.contextmanager
def _buffers_in_place(
    slots: Mapping[str, list[Slot]], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let tensors stand in the place of buffers, inside the block alone."""
    places = [(owner, local, name) for name in tensors for owner, local in slots[name]]
    before = [owner._buffers[local] for owner, local, _ in places]
    for owner, local, name in places:
        owner._buffers[local] = tensors[name]
    try:
        yield
        for owner, local, name in places:
            if owner._buffers[local] is not tensors[name]:
                raise UnsupportedLayerError(
                    f"a network whose agents are stacked must change its buffers in place; "
                    f"{type(owner).__name__} puts another tensor in the place of {name}. Let it "
                    "call copy_ on the one that is there."
                )
    finally:
        for (owner, local, _), buffer in zip(places, before, strict=True):
            owner._buffers[local] = buffer
