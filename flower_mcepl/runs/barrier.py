"""Rounds with a barrier on a virtual clock: who is late misses one, as under Flower."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from flower_mcepl.runs.events import Seconds
from flower_mcepl.runs.patience import Patience


@dataclass(frozen=True)
class _UnderWay:
    """A parcel that its agent has not answered yet."""

    round: int
    began: float
    due: float
    evaluating: bool


@dataclass(frozen=True)
class Came:
    """An answer that came in a round."""

    round: int  # of the parcel that it answers
    began: float  # when the agent got it


@final
class VirtualRounds:
    """Clock of rounds that all agents play together, each in its own time.

    The rule of waiting is that of the strategies, `Patience`; without a factor and a
    timeout a round takes as long as its slowest agent.

    Parameters
    ----------
    num_agents : int
        Agents of the graph.
    seconds : callable
        What a round takes an agent.
    timeout : float (default: infinite)
        Seconds after which a round ends in any case.
    timeout_factor : float (default: 0.0)
        As in `RoundOptions`; 0 waits for the timeout.

    Attributes
    ----------
    clock : float
        Virtual seconds since the run's begin, as of the end of the last round.
    """

    def __init__(
        self,
        num_agents: int,
        seconds: Seconds,
        *,
        timeout: float = math.inf,
        timeout_factor: float = 0.0,
    ) -> None:
        self.clock = 0.0
        self._seconds, self._agents = seconds, range(num_agents)
        self._patience = Patience(timeout, timeout_factor)
        self._under_way: dict[int, _UnderWay] = {}
        self._first = 0  # round: its times say nothing of others, as under Flower

    def free(self) -> list[int]:
        """Agents that owe no answer: they get the next parcels."""
        return [agent for agent in self._agents if agent not in self._under_way]

    def states(self) -> dict[str, str]:
        """State of each agent, for the record."""
        return {f"agent {i}": "late" if i in self._under_way else "running" for i in self._agents}

    def begin(
        self, agents: Iterable[int], round: int, *, evaluating: bool, closing: bool = False
    ) -> None:
        """Agents have got the parcels of a round, and played it.

        The ``closing`` one takes no time: nobody trains in it.
        """
        self._first = self._first or round
        for agent in agents:
            took = 0.0 if closing else self._seconds(agent, round, self.clock)
            due = self.clock + took
            self._under_way[agent] = _UnderWay(round, self.clock, due, evaluating)

    def end(self, round: int, *, evaluating: bool, patient: bool) -> dict[int, Came]:
        """Answers that came until the end of the round, to which the clock moves."""
        under_way, begin = self._under_way, self.clock
        rule, slow = self._patience.wait(under_way, evaluating=evaluating, patient=patient)
        wanted = {i for i, sent in under_way.items() if patient or sent.round == round} - slow
        came: dict[int, _UnderWay] = {}
        while under_way:
            due = min(sent.due for sent in under_way.values())
            # a virtual agent is never dead: at the end all are waited for
            missing = bool(wanted & under_way.keys())
            ends = math.inf if patient else begin + rule.ends(missing=missing)
            if due > ends:
                self.clock = max(self.clock, ends)
                break
            self.clock = max(self.clock, due)
            for agent in [agent for agent, sent in under_way.items() if sent.due == due]:
                rule.note(self.clock - begin, wanted=agent in wanted, sound=True)
                came[agent] = under_way.pop(agent)
        self._learn(came)
        return {agent: Came(sent.round, sent.began) for agent, sent in sorted(came.items())}

    def _learn(self, came: Mapping[int, _UnderWay]) -> None:
        for kind in (True, False):
            times = {
                agent: sent.due - sent.began
                for agent, sent in came.items()
                if sent.evaluating is kind and sent.round != self._first
            }
            self._patience.learn(times, evaluating=kind)
