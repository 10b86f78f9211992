"""Two graphs of a third party: a lattice, and a carousel that turns every round."""

from collections.abc import Iterator
from dataclasses import dataclass

from flower_mcepl import TopologyError
from flower_mcepl.topology import COUNT, FixedLinks, Schedule, Spec


def lattice(num_agents: int, seed: int, width: int) -> FixedLinks:
    """A grid of `width` columns that does not wrap around."""
    if num_agents % width:
        raise TopologyError(f"lattice:width must divide the {num_agents} agents; got {width}.")
    right = [(i, i + 1) for i in range(num_agents) if (i + 1) % width]
    down = [(i, i + width) for i in range(num_agents - width)]
    return FixedLinks.from_edges([*right, *down], num_agents=num_agents)


@dataclass(frozen=True)
class Carousel:
    """Every agent sends to one at a distance that grows by `step` a round."""

    num_agents: int
    step: int
    directed = True

    def edges(self, round: int) -> Iterator[tuple[int, int]]:
        n = self.num_agents
        distance = 1 + round * self.step % max(n - 1, 1)  # in 1..n-1: never to itself
        return ((i, (i + distance) % n) for i in range(n) if n > 1)

    def to_config(self) -> dict[str, int]:
        return {"step": self.step}


LATTICE: Spec[Schedule] = Spec(lattice, needs={"width": COUNT})
CAROUSEL: Spec[Schedule] = Spec(
    lambda num_agents, seed=0, step=1: Carousel(num_agents, step), takes={"step": COUNT}
)
