"""The exchange between agents: a relay, or a server in the center of a star."""

from collections.abc import Sequence
from typing import Protocol

from flower_mcepl.config.checks import check
from flower_mcepl.exchange.ages import check_decay
from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.exchange.parcels import Answer, FrameT, Parcel
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.topology import Topology


class Exchange(Protocol[FrameT]):
    """Hands out a parcel to each agent in each round, and takes in what it answers.

    A `Relay` of closed frames from agent to agent, or the `Center` of a server-based
    algorithm.
    """

    topology: Topology  # over the agents alone
    ledger: Ledger
    evaluate_every: int
    max_staleness: int
    key_interval: int
    age_decay: float
    schedule: str  # "rounds", or "async": each agent's own

    def begin(self, run: str) -> None:
        """Take the id of the run, which frames then belong to; without it, to none."""
        ...

    def parcel(self, agent: int, *, round: int, closing: bool = False) -> Parcel[FrameT]:
        """Parcel of the agent for ``round``; its frames count as sent."""
        ...

    def take(self, agent: int, answer: Answer[FrameT], *, round: int) -> Sequence[str]:
        """Take in the answer to the parcel of ``round``; return why frames are refused.

        Frames that come late, in a later round, count as those of their own round. Only
        whoever opens frames can refuse them.
        """
        ...

    def state(self, *, round: int) -> Bundle:
        """Everything that must survive ``round``, before any parcel of the next one."""
        ...

    def restore(self, state: Bundle) -> None:
        """Continue exactly where `state` was taken.

        Graph or server, and settings, must be the same.
        """
        ...


def check_rounds(
    *, evaluate_every: int, max_staleness: int, key_interval: int = 0, age_decay: float = 1.0
) -> None:
    """Raise ConfigError unless these numbers of rounds make sense."""
    check(
        evaluate_every >= 1,
        "evaluate-every is a number of rounds and must be >= 1",
        evaluate_every,
    )
    check(
        max_staleness >= 0,
        "max-staleness is a number of rounds and must be >= 0",
        max_staleness,
    )
    check(
        key_interval >= 0,
        "key-interval is a number of rounds, or 0 for as few as pay; it must be >= 0",
        key_interval,
    )
    check_decay(age_decay)
