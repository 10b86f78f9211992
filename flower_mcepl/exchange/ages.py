"""Age of what a neighbor sent: rounds of its own that the receiver has gone since.

Where all agents play the same rounds, that is the difference of two round numbers.
Without a barrier the numbers of two agents say nothing of each other, and the relay
counts: a frame's age at a receiver is the number of earlier parcels of that receiver
that could have held it already. The first parcel that brings a frame has it fresh, at
age 0; so where all answer at the same time both are the same.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, final

from flower_mcepl.config.checks import check
from flower_mcepl.config.schedules import ASYNC, ROUNDS
from flower_mcepl.errors import TopologyError
from flower_mcepl.topology import Topology


def check_decay(age_decay: float) -> None:
    """Raise ConfigError unless votes can fade so."""
    check(
        0 < age_decay <= 1,
        "age-decay is what a neighbor's vote is multiplied by for each round of its age, and must "
        "be in (0, 1]",
        age_decay,
        "1 lets all votes count alike until max-staleness.",
    )


def check_graph(schedule: str, topology: Topology) -> None:
    """Raise TopologyError unless agents of unequal rounds have the same neighbors.

    In the rounds of a graph that changes, one would hear another and not be heard.
    """
    if schedule == ASYNC and topology.time_varying:
        raise TopologyError(
            f"a run of schedule {ASYNC} has no rounds of all agents in which a graph could "
            f"change; got {topology.describe()}. Use a graph that stays, or schedule {ROUNDS}."
        )


def check_votes(age_decay: float, *, whose: str, weighs: bool) -> None:
    """Raise ConfigError if votes are to fade that somebody does not weigh."""
    check(
        age_decay == 1 or weighs,
        f"{whose} lets all neighbors count alike, and age-decay must be 1",
        age_decay,
        "Leave it out; mcepl, dsgd, dfedavgm, choco and apps of neighbor_average_mod weigh votes.",
    )


def vote(age: int, *, age_decay: float) -> float:
    """Vote of what is ``age`` rounds old, ``λ^age``."""
    return float(age_decay**age)


@final
class OwnAges:
    """Ages without a barrier, each in parcels of whoever receives.

    Parameters
    ----------
    most : int
        Ages above count as ``most + 1``; so many parcels of each agent are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._frames = 0  # payloads that came, of all agents
        self._came: dict[int, int] = {}  # sender -> number of its newest one
        # agent -> `_frames` as of its last parcels
        self._parcels: dict[int, deque[int]] = {}

    def note_frame(self, sender: int) -> None:
        """A newer payload of the sender came."""
        self._frames += 1
        self._came[sender] = self._frames

    def note_parcel(self, agent: int) -> None:
        """A parcel goes out, which may hold all that came so far."""
        parcels = self._parcels.setdefault(agent, deque(maxlen=self._most + 1))
        parcels.append(self._frames)

    def age(self, agent: int, sender: int) -> int:
        """Age that the sender's newest payload has in the agent's next parcel."""
        came = self._came[sender]
        return sum(frames >= came for frames in self._parcels.get(agent, ()))

    def state(self) -> dict[str, Any]:
        """What `restore` takes back, JSON-able."""
        return {
            "frames": self._frames,
            "came": [[sender, number] for sender, number in self._came.items()],
            "parcels": [[agent, *numbers] for agent, numbers in self._parcels.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Count on from where `state` was taken."""
        self._frames = state["frames"]
        self._came = dict(state["came"])
        self._parcels = {
            agent: deque(numbers, maxlen=self._most + 1) for agent, *numbers in state["parcels"]
        }
