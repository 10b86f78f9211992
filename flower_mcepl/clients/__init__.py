"""Flower client side: one agent inside a ClientApp."""

from flower_mcepl.clients.app import make_agent_app, make_client_app
from flower_mcepl.clients.mods import NeighborAverageMod, neighbor_average_mod

__all__ = ["NeighborAverageMod", "make_agent_app", "make_client_app", "neighbor_average_mod"]
