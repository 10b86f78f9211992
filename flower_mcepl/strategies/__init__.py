"""Flower server side: the relay."""

from flower_mcepl.strategies.gossip import GossipStrategy

__all__ = ["GossipStrategy"]
