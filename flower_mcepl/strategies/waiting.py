"""Waiting for answers: for how long, and what becomes of those that come late."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from flower_mcepl.strategies.launcher import heed_stop_request

FLOOR = 60.0  # seconds: a deadline that was learned is never shorter
QUANTILE = 0.95  # of the answer times: this share of the answers came within the learned time
WINDOW, NEEDED = 20, 3  # rounds that are remembered, and those it takes to learn from


class Patience:
    """Learns a round's deadline from past answer times.

    An answer's time is that until it arrives: in simulation it includes the wait for a
    free core. So it is the whole round's time that is learned there, and a slow machine
    is no dead agent.

    Parameters
    ----------
    longest : float
        Seconds after which a round ends in any case.
    factor : float
        The deadline is ``factor`` times the time within which 95 % of the answers of
        the last 20 rounds of the same kind came, but at least 60 seconds and at most
        ``longest``. 0 always waits for ``longest``.
    """

    def __init__(self, longest: float, factor: float) -> None:
        self.longest, self.factor = longest, factor
        self._rounds: dict[bool, deque[list[float]]] = {}  # by kind: with an evaluation, or without

    def learn(self, seconds: Sequence[float], *, evaluating: bool) -> None:
        """Note the answer times of one round."""
        if seconds:
            self._rounds.setdefault(evaluating, deque(maxlen=WINDOW)).append(list(seconds))

    def deadline(self, *, evaluating: bool) -> float:
        """Deadline in seconds of a round of this kind."""
        usual = self.usual(evaluating=evaluating)
        if self.factor == 0 or usual is None:
            return self.longest
        return min(self.longest, max(FLOOR, self.factor * usual))

    def usual(self, *, evaluating: bool) -> float | None:
        """Usual answer time in seconds; None while too little is known."""
        rounds = self._rounds.get(evaluating, ())
        if len(rounds) < NEEDED:
            return None
        times = sorted(time for round in rounds for time in round)
        return times[min(len(times) - 1, int(QUANTILE * len(times)))]


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
        taken = set(grid.push_messages(messages))
        for message in messages:  # the grid fills in the ids
            if message.metadata.message_id in taken:
                self._sent[message.metadata.message_id] = Sent(
                    message.metadata.dst_node_id, round, evaluating, now, now + ttl
                )
        return taken & self._sent.keys()

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
        answered: a stall of all is not taken for the death of some. And after
        ``longest`` seconds in any case.
        """
        begin = time.monotonic()
        arrived: list[Arrival] = []
        while True:
            heed_stop_request()
            arrived += self._pull(grid)
            spent = time.monotonic() - begin
            if not self.owed() or spent >= longest:
                return arrived
            if any(not arrival.reply.has_error() for arrival in arrived):
                limit = deadline if wanted & self._sent.keys() else usual
                if spent >= limit:
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
