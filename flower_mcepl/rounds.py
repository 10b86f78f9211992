"""One agent's part in one round; the same under `simulate` and under Flower."""

import time
from dataclasses import dataclass, field

from flower_mcepl.agents import Agent
from flower_mcepl.errors import DivergedError, FrameError, names_agent
from flower_mcepl.mailbox import Mailbox
from flower_mcepl.relay import Parcel
from flower_mcepl.wire import encode_frame


@dataclass(frozen=True)
class Reply:
    """What an agent answers: its own frame, its metrics, and which frames it refused and why."""

    frame: bytes | None
    metrics: dict[str, float]
    refused: list[str] = field(default_factory=list)


def open_mailbox(agent: Agent, *, max_staleness: int) -> Mailbox:
    """Return an empty mailbox for what ``agent`` will hold of its neighbors."""
    return Mailbox(owner=agent.index, fingerprint=agent.fingerprint, layers=agent.layers, max_staleness=max_staleness)


def play_round(agent: Agent, mailbox: Mailbox, parcel: Parcel[bytes]) -> Reply:
    """Fuse the frames of the last round, evaluate if due, train, and encode what goes out.

    A bad frame is refused and reported; its sender's last good mask stays in use.

    Raises
    ------
    DivergedError
        If training leaves the finite numbers; the message names the agent.
    """
    try:
        return _play(agent, mailbox, parcel)
    except DivergedError as error:
        if names_agent(error, agent.index):
            raise
        raise DivergedError(f"agent {agent.index}, round {parcel.round}: {error}") from error


def _play(agent: Agent, mailbox: Mailbox, parcel: Parcel[bytes]) -> Reply:
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    previous = parcel.round - 1
    refused = _take_in(mailbox, parcel, latest_round=previous)
    if parcel.neighbors is not None:
        inbox = mailbox.current(parcel.neighbors, round=previous, default=agent.first_payload())
        agent.fuse(inbox, round=previous)
        mailbox.forget(older_than=previous)
    if parcel.evaluate:
        metrics.update(agent.evaluate())
    frame = None
    if parcel.train:
        metrics.update(agent.train(round=parcel.round))
        frame = encode_frame(agent.outgoing(), sender=agent.index, round=parcel.round, fingerprint=agent.fingerprint)
    metrics["seconds"] = time.perf_counter() - start
    return Reply(frame, metrics, refused)


def _take_in(mailbox: Mailbox, parcel: Parcel[bytes], *, latest_round: int) -> list[str]:
    refused = []
    for sender, frame in parcel.frames.items():
        try:
            mailbox.put(sender, frame, latest_round=latest_round)
        except FrameError as error:
            refused.append(refusal(sender, error))
    return refused


def refusal(sender: int | str, error: FrameError) -> str:
    """Say whose frame was refused and why, as the relay logs and records it."""
    return f"{type(error).__name__}, frame of agent {sender}: {error}"
