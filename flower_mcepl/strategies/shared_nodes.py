"""Nodes that play several agents each: to a strategy, a seat for every agent.

Everything that a strategy knows of nodes holds for seats; only here are their messages
put together into those of nodes, and the answers taken apart.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.messages.bundle import NodeBundle
from flower_mcepl.strategies.launcher import heed_stop_request

_RAISED = 2  # Flower's code for a ClientApp that raised


class Seat(int):
    """Number of a seat in place of a node's, ``node * k + i``; shown as "node/i"."""

    node: int
    place: int

    def __new__(cls, node: int, place: int, per_node: int) -> "Seat":
        """Seat ``place``, 0..k-1, of a node."""
        seat = super().__new__(cls, node * per_node + place)
        seat.node, seat.place = node, place
        return seat

    def __str__(self) -> str:
        return f"{self.node}/{self.place}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class SeatInfo:
    """What is known of a seat: its number, and its node's key."""

    node_id: Seat
    public_key: bytes


@dataclass(frozen=True)
class _Sent:
    """A bundle on its way, and whose messages it holds."""

    messages: dict[int, Message]  # by place
    node: int
    until: float  # on the monotonic clock: its time to live is over


@final
class SharedNodes(Grid):
    """Grid of seats over a grid of nodes.

    Parameters
    ----------
    grid : Grid
        Flower's.
    per_node : int
        Agents of every node.
    """

    def __init__(self, grid: Grid, *, per_node: int) -> None:
        self._grid, self._per_node = grid, per_node
        self._sent: dict[str, _Sent] = {}  # by the id of the bundle

    def set_run(self, run: Any) -> None:
        """Set the run, as of Flower's grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Run, as of Flower's grid."""
        return self._grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Make a message, as Flower's grid does."""
        return self._grid.create_message(*args, **options)

    def get_node_ids(self) -> list[int]:
        """Seats of all nodes that are online."""
        return [seat for node in self._grid.get_node_ids() for seat in self._seats(node)]

    def get_nodes(self) -> list[SeatInfo]:  # type: ignore[override]
        """Seats with their nodes' keys."""
        return [
            SeatInfo(seat, node.public_key)
            for node in self._grid.get_nodes()
            for seat in self._seats(node.node_id)
        ]

    # A node that still plays gets no second message, as it would play it at the same
    # time in a simulation, or later, from states that are not the newest. Where one
    # agent of it owes an answer, the strategy does not write to that one; here the
    # others wait with it.
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the messages, those to a node as one; return ids, "" where none went."""
        messages = list(messages)
        by_node: dict[int, dict[int, Message]] = {}
        for message in messages:
            node, place = divmod(message.metadata.dst_node_id, self._per_node)
            by_node.setdefault(node, {})[place] = message
        free = {n: parts for n, parts in by_node.items() if not self._plays_others(n, parts)}
        bundles = [self._bundle(node, parts) for node, parts in free.items()]
        now = time.monotonic()
        ids: dict[int, str] = {}
        pushed = self._grid.push_messages(bundles) if bundles else ()
        for bundle_id, bundle, (node, parts) in zip(pushed, bundles, free.items(), strict=False):
            if bundle_id:
                self._sent[bundle_id] = _Sent(parts, node, now + bundle.metadata.ttl)
                ids |= {id(part): f"{bundle_id}/{place}" for place, part in parts.items()}
        return [ids.get(id(message), "") for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answers of the agents that came; those of one node come together."""
        self._forget_expired()
        wanted = {name.rpartition("/")[0] for name in message_ids} & self._sent.keys()
        if not wanted:
            return []
        answers: list[Message] = []
        for reply in self._grid.pull_messages(sorted(wanted)):
            bundle_id = reply.metadata.reply_to_message_id
            sent = self._sent.pop(bundle_id, None)
            if sent is not None:
                answers += self._taken_apart(bundle_id, sent, reply)
        return answers

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send the messages and wait for their answers, ``timeout`` seconds at most."""
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        until = None if timeout is None else time.monotonic() + timeout
        answers: list[Message] = []
        while waiting:
            heed_stop_request()
            new = self.pull_messages(waiting)
            answers += new
            waiting -= {answer.metadata.reply_to_message_id for answer in new}
            if until is not None and time.monotonic() > until:
                break
            if waiting:
                time.sleep(0.1)
        return answers

    def _seats(self, node: int) -> Iterator[Seat]:
        return (Seat(node, place, self._per_node) for place in range(self._per_node))

    def _plays_others(self, node: int, parts: dict[int, Message]) -> bool:
        """Whether a node still plays, and none of those who are written to now."""
        self._forget_expired()
        open_places = [sent.messages.keys() for sent in self._sent.values() if sent.node == node]
        return bool(open_places) and not any(parts.keys() & places for places in open_places)

    def _forget_expired(self) -> None:
        now = time.monotonic()
        self._sent = {key: sent for key, sent in self._sent.items() if sent.until > now}

    def _bundle(self, node: int, parts: dict[int, Message]) -> Message:
        first = next(iter(parts.values())).metadata
        content = NodeBundle(self._per_node, {place: part.content for place, part in parts.items()})
        return Message(
            RecordDict(content.to_records(ConfigRecord)),
            dst_node_id=node,
            message_type=first.message_type,
            ttl=max(part.metadata.ttl for part in parts.values()),
            group_id=first.group_id,
        )

    def _taken_apart(self, bundle_id: str, sent: _Sent, reply: Message) -> Iterator[Message]:
        try:
            error = reply.error if reply.has_error() else None
            answer = (
                NodeBundle(self._per_node, {}) if error else NodeBundle.from_records(reply.content)
            )
        except (FlowerMceplError, AttributeError, TypeError, ValueError) as wrong:
            error = Error(_RAISED, f"the node's answer cannot be read: {wrong}")
        for place in sent.messages:
            seat = Seat(sent.node, place, self._per_node)
            metadata = _answering(f"{bundle_id}/{place}", seat, reply.metadata)
            # with metadata of one's own: nothing else says what it is the answer to
            yield Message(error or _own(answer, place), metadata=metadata)  # type: ignore[call-overload]


def _own(answer: NodeBundle, place: int) -> RecordDict | Error:
    """What an agent answered, or why it failed."""
    if place in answer.parts:
        return RecordDict(dict(answer.parts[place]))
    return Error(_RAISED, answer.failures.get(place, "the node's answer holds nothing of it"))


def _answering(message_id: str, seat: Seat, reply: Metadata) -> Metadata:
    return Metadata(
        run_id=reply.run_id,
        message_id="",
        src_node_id=seat,
        dst_node_id=reply.dst_node_id,
        reply_to_message_id=message_id,
        group_id=reply.group_id,
        created_at=reply.created_at,
        ttl=reply.ttl,
        message_type=reply.message_type,
    )
