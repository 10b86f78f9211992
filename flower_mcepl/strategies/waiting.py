"""Waiting for answers: for how long, and what becomes of those that come late."""

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high

from flwr.app import Message
from flwr.serverapp import Grid

from flower_mcepl.strategies.launcher import heed_stop_request

FLOOR = 60.0  # seconds: a deadline that was learned is never shorter
WINDOW, NEEDED = 20, 3  # rounds that are remembered, and those it takes to learn from


class Patience:
    """Learns a round's deadline from past answer times.

    What is learned is the time of a *typical* node: the median over the nodes of each
    one's median. So a few slow nodes, or a few that wait on purpose, do not stretch the
    rounds of all; of an even number the upper median counts, so half of a fleet, or one
    of two nodes, is waited for.

    An answer's time is that until it arrives: in simulation it includes the wait for a
    free core, so the last node in the queue takes about twice as long as the typical
    one, and a factor below 2 leaves it behind.

    Parameters
    ----------
    longest : float
        Seconds after which a round ends in any case.
    factor : float
        The deadline is ``factor`` times the typical time of the last 20 rounds of the
        same kind, but at least 60 seconds and at most ``longest``. 0 always waits for
        ``longest``.
    """

    def __init__(self, longest: float, factor: float) -> None:
        self.longest, self.factor = longest, factor
        # by kind: with an evaluation, or without
        self._rounds: dict[bool, deque[Mapping[int, float]]] = {}
        self._medians: dict[bool, dict[int, float]] = {}

    def learn(self, seconds: Mapping[int, float], *, evaluating: bool) -> None:
        """Note the answer times of one round, by node."""
        if not seconds:
            return
        rounds = self._rounds.setdefault(evaluating, deque(maxlen=WINDOW))
        rounds.append(dict(seconds))
        times: dict[int, list[float]] = {}
        for round in rounds:
            for node, spent in round.items():
                times.setdefault(node, []).append(spent)
        self._medians[evaluating] = {node: median(known) for node, known in times.items()}

    def usual(self, *, evaluating: bool, among: Collection[int] | None = None) -> float | None:
        """Time of a typical node in seconds; None while too little is known.

        ``among`` are the nodes it may be one of (default: all that answered of late).
        """
        if len(self._rounds.get(evaluating, ())) < NEEDED:
            return None
        medians = self._medians[evaluating]
        known = [time for node, time in medians.items() if among is None or node in among]
        return median_high(known) if known else None

    def deadline(self, *, evaluating: bool, among: Collection[int] | None = None) -> float:
        """Deadline in seconds of a round of this kind."""
        return self._stretched(self.usual(evaluating=evaluating, among=among))

    def slow(self, nodes: Collection[int], *, evaluating: bool) -> set[int]:
        """Nodes that usually miss the deadline of a round that these nodes play."""
        deadline = self.deadline(evaluating=evaluating, among=nodes)
        medians = self._medians.get(evaluating, {})
        return {node for node in nodes if medians.get(node, 0.0) > deadline}

    def own_deadline(self, nodes: Collection[int], *, evaluating: bool) -> float:
        """Deadline by which each of these nodes has answered, by its own measure.

        For a round whose late answers no later one could take.
        """
        kinds = self._medians.values()  # late answers may be of the other one
        own = max((m[node] for m in kinds for node in nodes if node in m), default=0.0)
        typical = self.usual(evaluating=evaluating, among=nodes)
        return self._stretched(None if typical is None else max(typical, own))

    def _stretched(self, usual: float | None) -> float:
        if self.factor == 0 or usual is None:
            return self.longest
        return min(self.longest, max(FLOOR, self.factor * usual))


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

    def wait(
        self, grid: Grid, wanted: set[str], *, usual: float, deadline: float, longest: float
    ) -> list[Arrival]:
        """Wait for the wanted answers, and take late ones meanwhile.

        It ends when all have come. Else, when the wanted ones have come and ``usual``
        seconds are over: late agents do not hold up the others, but these do not race
        ahead either. Else after ``deadline`` seconds, if one agent at least has
        answered, and none for ``usual`` seconds or twice the time that the first one
        took: neither a stall of all nor a queue that moves slowly is taken for the
        death of some. And after ``longest`` seconds in any case.
        """
        begin = time.monotonic()
        first = last = 0.0  # when the wanted answers came, since the beginning
        arrived: list[Arrival] = []
        while True:
            heed_stop_request()
            new = self._pull(grid)
            arrived += new
            spent = time.monotonic() - begin
            if any(arrival.message_id in wanted for arrival in new):
                first, last = first or spent, spent
            if not self.owed() or spent >= longest:
                return arrived
            if any(not arrival.reply.has_error() for arrival in arrived):
                limit = max(deadline, last + max(usual, 2 * first))
                if spent >= (limit if wanted & self._sent.keys() else usual):
                    return arrived
            # seldom in long rounds: on devices each look is a request
            time.sleep(min(3.0, max(0.1, spent / 20)))

    def owed(self) -> set[str]:
        """Return the ids of all messages that may still be answered."""
        return self._sent.keys() - self._lost

    def _pull(self, grid: Grid) -> list[Arrival]:
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
