"""What goes between an agent and the exchange in a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flower_mcepl.agents.handshake import KEPT_BY_LAYER
from flower_mcepl.errors import AnswerError
from flower_mcepl.exchange.ledger import Shipment
from flower_mcepl.wire.layout import most_bytes

FrameT = TypeVar("FrameT")


@dataclass(frozen=True)
class Parcel(Generic[FrameT]):
    """What one agent gets for one round: its in-neighbors' frames, and what to do.

    ``round`` begins with this parcel; the frames are of ``round - 1`` or older, those
    of one sender oldest first. ``neighbors`` is None where the agent has not exchanged
    anything yet: it keeps what it has.
    """

    round: int
    neighbors: tuple[int, ...] | None
    frames: Mapping[int, Sequence[FrameT]] = field(default_factory=dict)
    evaluate: bool = False  # evaluate the personal model as of round - 1
    train: bool = True  # False in the closing parcel
    acknowledged: int | None = None  # round of the agent's newest frame that the relay has
    whole: bool = False  # send a whole frame, too
    # of senders of a whole frame: weights that each of their masks keeps, as they said
    kept: Mapping[int, Sequence[int]] = field(default_factory=dict)
    # without a barrier: age of each sender's newest frame, as in `exchange.ages`; the
    # frames are then of rounds of their senders' own. None: ``round`` is that of all
    ages: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Posted(Generic[FrameT]):
    """A frame as its sender announced it."""

    frame: FrameT
    num_bytes: int
    header_bytes: int
    builds_on: int | None  # round of the frame it needs; None or 0: it stands alone

    @property
    def is_key(self) -> bool:
        """Whether everyone can decode it: whole, or on the common first payload."""
        return not self.builds_on


@dataclass(frozen=True)
class Answer(Generic[FrameT]):
    """One agent's answer as the relay sees it; the frames stay closed."""

    facts: Mapping[str, Any]  # of the handshake
    metrics: Mapping[str, float]
    posts: Sequence[Posted[FrameT]] = ()  # frames of one payload, each of which suffices
    # 16 hex digits that stand for the payload, for comparing runs bit for bit
    content: str | None = None
    # which round of which neighbor the agent holds
    held: Mapping[int, int] = field(default_factory=dict)
    refused: Sequence[str] = ()
    lacking: Sequence[int] = ()  # neighbors of whom the agent wants a whole frame
    fresh: bool = False  # the agent began without a saved state
    raw: Sequence[bytes] = ()  # the frames' bytes, for those who keep them for study
    late_of: int | None = None  # the earlier round that it answers; None: the present one
    # the facts were told with this answer; else they are those told earlier
    introduces: bool = False
    evaluation_error: str = ""  # why an evaluation that was due is missing
    # Of a simulated agent, for the run record: its encoded state, and its exported
    # model by the ending of the file's name.
    state: bytes = b""
    exported: Mapping[str, bytes] = field(default_factory=dict)


def shipments(posts: Sequence[Posted[Any]], facts: Mapping[str, Any]) -> list[Shipment]:
    """Frames as the ledger counts them; ``facts`` are of their sender's handshake."""
    weights, kept = int(facts.get("num-weights", 0)), int(facts.get("kept-weights", 0))
    return [
        Shipment(post.num_bytes, post.header_bytes, post.is_key, weights, kept) for post in posts
    ]


def check_sizes(posts: Sequence[Posted[Any]], facts: Mapping[str, Any]) -> None:
    """Raise AnswerError if a frame is larger than its sender's network allows."""
    weights, only_masks = int(facts.get("num-weights", 0)), KEPT_BY_LAYER in facts
    most = most_bytes(weights, only_masks=only_masks)
    for post in posts:
        if post.num_bytes > most:
            raise AnswerError(
                f"a frame of this network has at most {most} bytes; agent {facts['agent']} sent "
                f"one of {post.num_bytes}. Look at its device."
            )


def post_facts(post: Posted[Any]) -> list[Any]:
    """Return all of a posted frame but the frame itself, in the order of its fields."""
    return [post.num_bytes, post.header_bytes, post.builds_on]


def by_number(mapping: Mapping[Any, Any]) -> dict[int, Any]:
    """Return what JSON made of a mapping by number: its keys are texts there."""
    return {int(key): value for key, value in mapping.items()}
