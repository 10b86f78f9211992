"""Who are agent i's neighbors in round t.

A package of somebody else adds a graph as a `Spec` among the entry points of the group
``flower_mcepl.topologies``: its ``build(num_agents, seed, **options)`` returns
`FixedLinks`, or a `Schedule` of its own if the links change from round to round. The
kinds (`WHOLE`, `NUMBER`, ...) say what its options may be; ``docs/extending.md`` has an
example.
"""

from flower_mcepl.config.specs import COUNT, NUMBER, PATH, POSITIVE, WHOLE, Kind, Spec, one_of
from flower_mcepl.topology.graph import Topology
from flower_mcepl.topology.schedules import FixedLinks, Schedule
from flower_mcepl.topology.specs import TOPOLOGIES

__all__ = [
    "COUNT",
    "NUMBER",
    "PATH",
    "POSITIVE",
    "TOPOLOGIES",
    "WHOLE",
    "FixedLinks",
    "Kind",
    "Schedule",
    "Spec",
    "Topology",
    "one_of",
]
