"""The relay: which frames go to which agent. It never opens a frame."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flower_mcepl.errors import ConfigError
from flower_mcepl.ledger import Ledger
from flower_mcepl.topology import Topology

FrameT = TypeVar("FrameT")


@dataclass(frozen=True)
class Parcel(Generic[FrameT]):
    """What one agent gets for one round: last round's frames of its in-neighbors, and what to do.

    ``round`` begins with this parcel; the frames are of ``round - 1`` or older. ``neighbors`` is None where the
    agent has not exchanged anything yet: it keeps what it has.
    """

    round: int
    neighbors: tuple[int, ...] | None
    frames: Mapping[int, FrameT] = field(default_factory=dict)
    evaluate: bool = False  # evaluate the personal model as of round - 1
    train: bool = True  # False in the closing parcel


@dataclass(frozen=True)
class _Posted(Generic[FrameT]):
    round: int
    frame: FrameT
    num_bytes: int


class Relay(Generic[FrameT]):
    """Keeps the newest frame of each agent and hands every agent those of its in-neighbors that it lacks.

    Parameters
    ----------
    topology : Topology
        Who is whose neighbor in which round.
    evaluate_every : int (default: 10)
        Personal models are evaluated after each such number of rounds, and after the last one.
    max_staleness : int (default: 5)
        For how many rounds a neighbor's last mask stays in use when no newer one came; 0 uses fresh ones alone.

    Notes
    -----
    Frames are opaque: in `simulate` they are bytes, in Flower the received Array objects, handed on as they came.
    """

    def __init__(self, topology: Topology, *, evaluate_every: int = 10, max_staleness: int = 5) -> None:
        if evaluate_every < 1:
            raise ConfigError(f"evaluate-every is a number of rounds and must be >= 1; got {evaluate_every}.")
        if max_staleness < 0:
            raise ConfigError(f"max-staleness is a number of rounds and must be >= 0; got {max_staleness}.")
        self.topology, self.evaluate_every, self.max_staleness = topology, evaluate_every, max_staleness
        self.ledger = Ledger()
        self._posted: dict[int, _Posted[FrameT]] = {}
        self._facts: dict[int, Mapping[str, Any]] = {}
        self._delivered: dict[tuple[int, int], int] = {}  # (sender, receiver) -> round of the frame it surely has
        self._in_flight: dict[int, dict[int, int]] = {}  # receiver -> sender -> round of the frame just handed out
        self._met: set[int] = set()

    def parcel(self, agent: int, *, round: int, closing: bool = False) -> Parcel[FrameT]:
        """Return the agent's parcel for ``round`` and count its frames as sent."""
        if agent not in self._met and not closing:
            return Parcel(round, None)
        previous = round - 1
        neighbors = self.topology.in_neighbors(agent, round=previous)
        posted = {j: self._posted[j] for j in neighbors if self._lacks(agent, j, previous)}
        self._in_flight[agent] = {j: post.round for j, post in posted.items()}
        for j, post in posted.items():
            facts = self._facts.get(j, {})
            self.ledger.add_delivery(
                j,
                agent,
                post.num_bytes,
                num_weights=int(facts.get("num-weights", 0)),
                kept_weights=int(facts.get("kept-weights", 0)),
            )
        due = closing or previous % self.evaluate_every == 0
        frames = {j: post.frame for j, post in posted.items()}
        return Parcel(round, neighbors, frames, evaluate=due, train=not closing)

    def answered(self, agent: int, facts: Mapping[str, Any]) -> None:
        """Note that the agent answered: it has what its parcel held. ``facts`` are those of its handshake."""
        self._met.add(agent)
        self._facts[agent] = facts
        for sender, round in self._in_flight.pop(agent, {}).items():
            self._delivered[sender, agent] = round

    def post(self, agent: int, frame: FrameT, *, round: int, num_bytes: int) -> None:
        """Take the agent's frame of ``round`` for its neighbors' next parcels."""
        self.ledger.add_uplink(agent, num_bytes)
        self._posted[agent] = _Posted(round, frame, num_bytes)

    def forget(self, agent: int, *, in_flight: bool = False) -> None:
        """Note that the agent lost its memory: whatever it had been handed must be handed again.

        With ``in_flight``, so must what its present parcel held.
        """
        for link in [link for link in self._delivered if link[1] == agent]:
            del self._delivered[link]
        if in_flight:
            self._in_flight.pop(agent, None)

    def _lacks(self, agent: int, sender: int, previous: int) -> bool:
        post = self._posted.get(sender)
        if post is None or previous - post.round > self.max_staleness:
            return False
        return post.round > self._delivered.get((sender, agent), 0)
