"""Frozen share: what of a network is neither masked nor trained, in words."""

from collections.abc import Iterable, Mapping
from typing import Any

MUCH = 0.1  # share above which it is told loudly, as `flower_mcepl.masks.model` warns
_HARDLY_ANY = 0.0005  # "0.0 %" is not worth a line


def frozen_line(handshakes: Iterable[Mapping[str, Any]]) -> str:
    """Line on the largest frozen share of some agents; empty where it is about zero.

    The handshakes have their keys in snake_case.
    """
    agents = list(handshakes)
    most = max(agents, key=_share, default={})
    share = _share(most)
    if share < _HARDLY_ANY:
        return ""
    same = all(_share(facts) == share for facts in agents)
    up_to = "" if same else "up to "
    names = f" ({most['frozen_weights']})" if most.get("frozen_weights") else ""
    line = f"neither masked nor trained: {up_to}{share:.1%} of the network's weights{names}"
    return f"WARNING: {line}; they stay as they were drawn" if is_much(most) else line


def is_much(facts: Mapping[str, Any]) -> bool:
    """Whether an agent leaves so much at random that a person should know.

    Biases and norm layers have no name here and get no mask in any network.
    """
    return bool(facts.get("frozen_weights")) and _share(facts) > MUCH


def _share(facts: Mapping[str, Any]) -> float:
    return float(facts.get("frozen_share") or 0.0)
