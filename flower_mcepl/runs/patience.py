"""Patience with late agents: how long a round waits, on whatever clock."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median, median_high
from typing import final

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

    def wait(
        self, nodes: Collection[int], *, evaluating: bool, patient: bool
    ) -> "tuple[Wait, set[int]]":
        """How to wait in a round for nodes that owe answers, and those not waited for.

        Nodes that usually miss its deadline are not, unless it is ``patient``: then no
        later round could take what they answer.
        """
        if patient:
            deadline, slow = self.own_deadline(nodes, evaluating=evaluating), set[int]()
        else:
            deadline = self.deadline(evaluating=evaluating, among=nodes)
            slow = self.slow(nodes, evaluating=evaluating)
        usual = self.usual(evaluating=evaluating, among=nodes) or 0.0
        return Wait(usual=usual, deadline=deadline, longest=self.longest), slow

    def _stretched(self, usual: float | None) -> float:
        if self.factor == 0 or usual is None:
            return self.longest
        return min(self.longest, max(FLOOR, self.factor * usual))


@final
@dataclass(kw_only=True)
class Wait:
    """Rule by which a round waits for answers; all times in seconds since its begin.

    It ends when all have come. Else, when the wanted ones have come and ``usual``
    seconds are over: late agents do not hold up the others, but these do not race
    ahead either. Else after ``deadline`` seconds, if one agent at least has answered,
    and none for ``usual`` seconds or twice the time that the first one took: neither a
    stall of all nor a queue that moves slowly is taken for the death of some. And after
    ``longest`` seconds in any case.
    """

    usual: float
    deadline: float
    longest: float
    _first: float = 0.0  # when the first wanted answer came, and the last one
    _last: float = 0.0
    _answered: bool = False

    def note(self, spent: float, *, wanted: bool, sound: bool) -> None:
        """An answer came, a wanted one or not; ``sound`` if it is no error."""
        if wanted:
            self._first, self._last = self._first or spent, spent
        self._answered |= sound

    def ends(self, *, missing: bool) -> float:
        """When it ends, as things are; ``missing``: a wanted answer has not come."""
        if not self._answered:
            return self.longest
        if not missing:
            return min(self.longest, self.usual)
        pause = max(self.usual, 2 * self._first)
        return min(self.longest, max(self.deadline, self._last + pause))
