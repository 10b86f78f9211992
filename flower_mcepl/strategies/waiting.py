"""Answers of nodes: waiting for them, and what becomes of those that come late."""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from flower_mcepl.runs.patience import Wait
from flower_mcepl.strategies.launcher import heed_stop_request


@dataclass(frozen=True)
class Sent:
    """One message on its way."""

    node: int
    round: int
    evaluating: bool
    since: float  # on the monotonic clock, as is `until`
    until: float  # its time to live is over


@dataclass(frozen=True)
class Arrival:
    """An answer or error reply, and what it answers."""

    sent: Sent
    reply: Message
    seconds: float  # since the message was sent

    @property
    def message_id(self) -> str:
        """Id of the message that it answers."""
        return self.reply.metadata.reply_to_message_id


class InFlight:
    """The messages that nodes still owe an answer to, over the rounds.

    A node that owes one gets no other message: a simulated client would play the second
    one at the same time, from its old state. Where a node was offline in between, what
    it had to answer counts as lost; should it answer after all, the answer is still
    taken.
    """

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}  # by message id
        self._lost: set[str] = set()

    def send(
        self, grid: Grid, messages: Sequence[Message], *, round: int, evaluating: bool, ttl: float
    ) -> set[str]:
        """Hand the messages to Flower; return the ids of those that it took."""
        if not messages:
            return set()
        now = time.monotonic()
        taken = {
            message_id: message.metadata.dst_node_id
            for message_id, message in zip(grid.push_messages(messages), messages, strict=False)
            if message_id
        }
        for message_id, node in taken.items():
            self._sent[message_id] = Sent(node, round, evaluating, now, now + ttl)
        return {*taken}

    def owing(self, nodes: Collection[int]) -> set[str]:
        """Return the ids of the messages that these nodes owe an answer to."""
        return {message_id for message_id in self.owed() if self._sent[message_id].node in nodes}

    def busy(self) -> set[int]:
        """Return the nodes that owe an answer."""
        return {
            sent.node for message_id, sent in self._sent.items() if message_id not in self._lost
        }

    def lose(self, online: Iterable[int]) -> None:
        """Give up answers of nodes that are not online, unless they come after all."""
        here = set(online)
        self._lost |= {
            message_id for message_id, sent in self._sent.items() if sent.node not in here
        }

    def expire(self) -> list[Sent]:
        """Drop, and return, what nobody can answer any more."""
        now = time.monotonic()
        over = {message_id: sent for message_id, sent in self._sent.items() if sent.until < now}
        self._forget(over)
        return [sent for message_id, sent in over.items()]

    def wait(self, grid: Grid, wanted: set[str], rule: Wait) -> list[Arrival]:
        """Wait for the wanted answers by a rule, and take late ones meanwhile."""
        begin = time.monotonic()
        arrived: list[Arrival] = []
        while True:
            heed_stop_request()
            new = self.pull(grid)
            arrived += new
            spent = time.monotonic() - begin
            for arrival in new:
                sound = not arrival.reply.has_error()
                rule.note(spent, wanted=arrival.message_id in wanted, sound=sound)
            if not self.owed() or spent >= rule.ends(missing=bool(wanted & self._sent.keys())):
                return arrived
            # seldom in long rounds: on devices each look is a request
            time.sleep(min(3.0, max(0.1, spent / 20)))

    def owed(self) -> set[str]:
        """Return the ids of all messages that may still be answered."""
        return self._sent.keys() - self._lost

    def pull(self, grid: Grid) -> list[Arrival]:
        """Answers that have come."""
        if not self._sent:
            return []
        now = time.monotonic()
        arrived = []
        for reply in grid.pull_messages(list(self._sent)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in self._sent:  # what was taken before is not taken again
                sent = self._sent[message_id]
                self._forget([message_id])
                arrived.append(Arrival(sent, reply, now - sent.since))
        return arrived

    def _forget(self, message_ids: Iterable[str]) -> None:
        for message_id in list(message_ids):
            del self._sent[message_id]
            self._lost.discard(message_id)
