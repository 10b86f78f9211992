"""The layers that a frame may have, where senders hold different parts of a network."""

from collections.abc import Mapping, Sequence
from typing import final

from flower_mcepl.wire import FrameBytes, Prior
from flower_mcepl.wire.layout import describe, digest, model_digest, model_of

Layers = Mapping[str, tuple[int, ...]]


# A frame presumes its sender's layers, which a delta frame does not repeat; but each
# names them, in its fixed header, by the digest of the model. So no list has to be
# remembered of a sender, and none that a device tells is believed.
@final
class LayerLists:
    """Lists of layers, by names and shapes, of which each frame has one.

    Parameters
    ----------
    own : mapping
        What a frame is expected to have that names none of them.
    others : sequence of mappings
        Further ones.
    fingerprint : str
        Fingerprint of the shared frozen weights.
    prior : Prior | None
        Classes of weights that all agents know.
    """

    def __init__(
        self, own: Layers, others: Sequence[Layers], *, fingerprint: str, prior: Prior | None
    ) -> None:
        self._lists = [own, *(other for other in others if other != own)]
        self._descriptions = [describe(fingerprint, layers) for layers in self._lists]
        self._prior = prior
        # of all lists: what is held of a payload says which of these it has
        self.all = {name: tuple(shape) for each in self._lists for name, shape in each.items()}
        several = len(self._lists) > 1
        # stands for them, where there are several
        self.digest = digest([describe(fingerprint, self.all)]).hex() if several else ""

    def of(self, data: FrameBytes, *, run: str) -> Layers:
        """The list that a frame of a run presumes."""
        if len(self._lists) == 1:
            return self._lists[0]
        model = model_of(data)
        for layers, description in zip(self._lists, self._descriptions, strict=True):
            if model_digest(description, self._prior, run).hex() == model:
                return layers
        return self._lists[0]
