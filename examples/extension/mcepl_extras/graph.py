"""A chordal ring: a ring whose agents hear one more on either side, some steps away."""

from flower_mcepl import TopologyError
from flower_mcepl.topology import WHOLE, FixedLinks, Spec


def chordal_ring(num_agents: int, seed: int, chord: int = 3) -> FixedLinks:
    """Links between i and i + 1, and between i and i + chord."""
    if not 2 <= chord < num_agents:
        raise TopologyError(
            f"the chord of a chordal-ring must be in 2..{num_agents - 1} (num-agents - 1); got "
            f"{chord}. Choose another, as in 'chordal-ring:chord=2'."
        )
    edges = [(i, (i + step) % num_agents) for i in range(num_agents) for step in (1, chord)]
    return FixedLinks.from_edges(edges, num_agents=num_agents)


CHORDAL_RING = Spec(chordal_ring, takes={"chord": WHOLE})
