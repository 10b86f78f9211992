"""What stands between the agents, whichever it is."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.exchange.parcels import ExchangeState, FrameT, Parcel, Posted
from flower_mcepl.topology import Topology


class Exchange(Protocol[FrameT]):
    """A `Relay` of closed frames from agent to agent, or the `Center` of a server-based algorithm."""

    topology: Topology  # over the agents alone
    ledger: Ledger
    evaluate_every: int
    max_staleness: int
    key_interval: int

    def parcel(self, agent: int, *, round: int, closing: bool = False) -> Parcel[FrameT]:
        """Return the agent's parcel for ``round`` and count its frames as sent."""
        ...

    def answered(
        self,
        agent: int,
        facts: Mapping[str, Any],
        held: Mapping[int, int],
        lacking: Sequence[int] = (),
    ) -> None:
        """Note that the agent answered: the facts of its handshake, and which round of which sender it holds.

        ``lacking`` are senders whose frames it could not decode.
        """
        ...

    def post(
        self, agent: int, posts: Sequence[Posted[FrameT]], *, round: int
    ) -> Sequence[str] | None:
        """Take the agent's frames of ``round``; whoever opens them returns why some are refused.

        Frames that come late, in a later round, count as those of their own round.
        """
        ...

    def state(self, *, round: int) -> ExchangeState[FrameT]:
        """Return all that must survive after ``round``, before any parcel of the next one is asked for."""
        ...

    def restore(self, state: ExchangeState[FrameT]) -> None:
        """Continue exactly where `state` was taken; graph or server, and settings, must be the same."""
        ...
