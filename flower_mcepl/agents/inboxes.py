"""What the agents of a stack hear: each mask once, and all means as one product.

A mask that many agents hear is kept once, and goes to the device once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.masks import formulas as maths

Inbox = Mapping[int, Payload]
Heard = Sequence[tuple[int, float]]
"""Rows of the masks that an agent hears, in a stack of them, with their votes."""


@final
class Distinct:
    """Masks of each sender that differ, among those that each agent decoded for itself.

    Neighbors may hold different ones of a sender, of rounds that one of them missed.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[Payload]] = {}

    def inbox(self, inbox: Inbox) -> dict[int, Payload]:
        """Return an equal inbox, in which equal payloads are one object."""
        return {sender: self._one(sender, payload) for sender, payload in inbox.items()}

    def _one(self, sender: int, payload: Payload) -> Payload:
        kept = self._of.setdefault(sender, [])
        for other in kept:
            if _equal(payload, other):
                return other
        kept.append(payload)
        return payload


def _equal(one: Payload, other: Payload) -> bool:
    if one is other:
        return True
    # torch.equal goes bool by bool: a tenth of NumPy's speed on large masks
    return one.keys() == other.keys() and all(
        np.array_equal(one[name].numpy(), other[name].numpy()) for name in one
    )


@final
class Inboxes:
    """Masks that several agents hear.

    Parameters
    ----------
    inboxes : sequence of mapping
        Masks by sender, of each agent. One object in several inboxes counts as one
        sender; see `Distinct`.
    votes : sequence of mapping
        Votes by sender, as in `WeighsVotes`, of each agent.
    """

    def __init__(self, inboxes: Sequence[Inbox], votes: Sequence[Mapping[int, float]]) -> None:
        self._payloads = {id(payload): payload for own in inboxes for payload in own.values()}
        self._heard = [
            [(id(payload), cast.get(sender, 1.0)) for sender, payload in own.items()]
            for own, cast in zip(inboxes, votes, strict=True)
        ]
        self._faded = [bool(cast) for cast in votes]

    def means(self, name: str, like: Tensor) -> list[Tensor | None]:
        """``n`` of a layer, of each agent; None: it hears nobody who holds the layer.

        They are on the device and of the type of ``like``, bit for bit those of
        `neighbor_average`.
        """
        held = {key: payload[name] for key, payload in self._payloads.items() if name in payload}
        means: list[Tensor | None] = [None] * len(self._heard)
        if not held:
            return means
        masks = torch.stack([*held.values()]).to(like.device)
        rows = {key: row for row, key in enumerate(held)}
        heard = [[(rows[key], v) for key, v in own if key in rows] for own in self._heard]
        for agents, n in self._by_rule(heard, masks):
            for i, mean in zip(agents, n.to(like.dtype), strict=True):
                means[i] = mean
        return means

    def _by_rule(self, heard: Sequence[Heard], masks: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Means of agents that hear equally many masks, in one tensor."""
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, own in enumerate(heard):
            alike.setdefault((len(own), self._faded[i]), []).append(i)
        counts = _counts(heard, masks)
        for (number, faded), agents in alike.items():
            if number and faded:
                votes = _votes([heard[i] for i in agents], masks)
                yield agents, maths.faded_mean(votes, num_neighbors=number)
            elif number:
                yield agents, maths.neighbor_mean(counts[agents], num_neighbors=number)


def _counts(heard: Sequence[Heard], masks: Tensor) -> Tensor:
    """``Σ m_j`` of each agent; the common first mask may stand for several senders."""
    times = np.zeros((len(heard), len(masks)), np.float32)
    edges = [(i, row) for i, own in enumerate(heard) for row, _ in own]
    np.add.at(times, tuple(np.array(edges).T), 1)
    return maths.mask_counts(torch.from_numpy(times).to(masks.device), masks)


def _votes(heard: Sequence[Heard], masks: Tensor) -> Iterator[Tensor]:
    """``v_j m_j`` of the first mask that each agent hears, then of the second."""
    rows = torch.tensor([[row for row, _ in own] for own in heard], device=masks.device)
    votes = torch.tensor(
        [[vote for _, vote in own] for own in heard], dtype=torch.float32, device=masks.device
    )
    for row, vote in zip(rows.T, votes.T, strict=True):
        yield vote.view(-1, *[1] * (masks.dim() - 1)) * masks[row].float()
