"""Votes of neighbors that count for less than one, as what they sent has aged."""

from collections.abc import Mapping
from types import MappingProxyType

from flower_mcepl.agents.agent import Payload

WHOLE: Mapping[int, float] = MappingProxyType({})  # all of them are 1


def faded(inbox: Mapping[int, Payload], votes: Mapping[int, float]) -> list[Payload]:
    """Masks as floats, each times its sender's vote ``v_j``; absent: 1."""
    return [
        {name: votes.get(sender, 1.0) * mask.float() for name, mask in payload.items()}
        for sender, payload in inbox.items()
    ]
