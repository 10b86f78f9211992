"""Who are agent i's neighbors in round t."""

from flower_mcepl.topology.graph import Topology

__all__ = ["Topology"]
