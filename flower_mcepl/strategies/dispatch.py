"""Dispatch of a round's messages: sending, waiting, matching the answers."""

from collections.abc import Iterable, Sequence
from typing import final

from flwr.app import Message
from flwr.serverapp import Grid

from flower_mcepl.runs.patience import Patience
from flower_mcepl.strategies.waiting import Arrival, InFlight, Sent


@final
class Dispatch:
    """Sends the messages of each round, and takes late answers into the next one.

    Parameters
    ----------
    timeout : float
        Seconds after which a round ends in any case.
    timeout_factor : float
        See `Patience`.
    """

    def __init__(self, *, timeout: float, timeout_factor: float) -> None:
        self._timeout = timeout
        self._patience = Patience(timeout, timeout_factor)
        self._in_flight = InFlight()
        # of the present round, by the id of the message answered
        self._arrivals: dict[str, Arrival] = {}
        self._round = self._first = 0

    def play(
        self,
        grid: Grid,
        messages: Sequence[Message],
        *,
        round: int,
        evaluating: bool,
        first: bool,
        last: bool,
        closing: bool = False,
    ) -> list[Message]:
        """Send a round's messages and return the answers that came, late ones included.

        Parameters
        ----------
        grid : Grid
            Flower's.
        messages : sequence of Message
            At most one a node.
        round : int
            The round that they are of.
        evaluating : bool
            Agents evaluate in it, which takes longer.
        first : bool
            Processes start in it: its answer times say nothing.
        last : bool
            Wait for late answers, too: no later round could take them.
        closing : bool (default: False)
            It is no round but the exchange after the last one.
        """
        wanted = self._in_flight.send(
            grid,
            messages,
            round=round,
            evaluating=evaluating,
            ttl=self.time_to_live(evaluating=evaluating),
        )
        if first:
            self._first = round
        if last:
            wanted |= self._in_flight.owed()
        arrivals = self._wait(grid, wanted, evaluating=evaluating, patient=last or closing)
        self._learn(arrivals)
        if round != self._round:
            self._round, self._arrivals = round, {}
        self._arrivals |= {arrival.message_id: arrival for arrival in arrivals}
        return [arrival.reply for arrival in arrivals]

    def send(
        self, grid: Grid, messages: Sequence[Message], *, round: int, evaluating: bool
    ) -> None:
        """Send messages that live for the timeout, without waiting for answers."""
        self._in_flight.send(grid, messages, round=round, evaluating=evaluating, ttl=self._timeout)

    def arrived(self, grid: Grid) -> list[Arrival]:
        """Answers that have come, without waiting."""
        return self._in_flight.pull(grid)

    def origin(self, reply: Message, round: int) -> tuple[int, int]:
        """Round and node of the message that a reply of ``round`` answers.

        Error replies of the SuperLink bear its own node id: only the message that was
        answered tells who was asked.
        """
        arrival = self._arrivals.get(reply.metadata.reply_to_message_id)
        if arrival is None:
            return round, reply.metadata.src_node_id
        return arrival.sent.round, arrival.sent.node

    def time_to_live(self, *, evaluating: bool) -> float:
        """Seconds to answer a message: a longest round and two usual ones."""
        return self._timeout + 2 * self._patience.deadline(evaluating=evaluating)

    def busy(self) -> set[int]:
        """Nodes that owe an answer."""
        return self._in_flight.busy()

    def lose(self, online: Iterable[int]) -> None:
        """Give up answers of nodes that are not online, unless they come after all."""
        self._in_flight.lose(online)

    def expire(self) -> list[Sent]:
        """Drop, and return, what nobody can answer any more."""
        return self._in_flight.expire()

    def _wait(
        self, grid: Grid, wanted: set[str], *, evaluating: bool, patient: bool
    ) -> list[Arrival]:
        """Arrivals of a round; where it is ``patient`` no later one takes answers."""
        nodes = self._in_flight.busy()
        rule, slow = self._patience.wait(nodes, evaluating=evaluating, patient=patient)
        return self._in_flight.wait(grid, wanted - self._in_flight.owing(slow), rule)

    def _learn(self, arrivals: Sequence[Arrival]) -> None:
        for kind in (True, False):
            times = {
                arrival.sent.node: arrival.seconds
                for arrival in arrivals
                if arrival.sent.evaluating is kind
                and arrival.sent.round != self._first
                and not arrival.reply.has_error()
            }
            self._patience.learn(times, evaluating=kind)
