"""Flower client side: one agent inside a ClientApp."""

import importlib
from typing import TYPE_CHECKING

from flower_mcepl.clients.making import make_client_app

if TYPE_CHECKING:
    from flower_mcepl.clients.app import make_agent_app
    from flower_mcepl.clients.mods import NeighborAverageMod, neighbor_average_mod

__all__ = ["NeighborAverageMod", "make_agent_app", "make_client_app", "neighbor_average_mod"]

# names that load torch, which a message's process need not
_LAZY = {
    "make_agent_app": "app",
    "NeighborAverageMod": "mods",
    "neighbor_average_mod": "mods",
}

if not TYPE_CHECKING:  # a type checker would take every name for one that is here

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for (PEP 562)."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
