"""Flower without a barrier: a loop over push and pull, each agent in rounds of its own.

The first round, in which nodes say who they are, is one of all agents. From then on
whoever answers gets its next parcel at once. An agent whose message fails gets its next
one after a pause that doubles; a node that was away is asked who it is.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING, getLogger
from typing import TypeGuard, final

from flwr.app import Array, Message
from flwr.serverapp import Grid

from flower_mcepl.errors import RosterError
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.runs.events import Event
from flower_mcepl.runs.own_rounds import OwnRounds
from flower_mcepl.strategies.attendance import NO_ANSWER, Attendance
from flower_mcepl.strategies.dispatch import Dispatch
from flower_mcepl.strategies.intake import Intake, Replies
from flower_mcepl.strategies.launcher import heed_stop_request
from flower_mcepl.strategies.own_checkpoints import OwnCheckpoints
from flower_mcepl.strategies.waiting import Arrival

logger = getLogger("flwr")
LOOK = 3.0  # seconds after which it is looked again who is online
ASK_AGAIN = 600.0  # after which a node that did not say who it is is asked again: all wait for it
FAILING = 3  # messages in a row that failed, after which no checkpoint waits for an agent
LONGEST_PAUSE = 60.0  # seconds after which an agent whose messages fail is tried again
_LOST = f"{NO_ANSWER}: its node went away"


@final
@dataclass
class OwnRoundsLoop:
    """Loop of a run without a barrier, after its first round.

    Parameters
    ----------
    grid, attendance, intake, dispatch
        Flower's nodes, who is there, who is let in, what is under way.
    own : OwnRounds
        Bookkeeper of the run; its agents have played round 1.
    message : callable
        Message to a node with a parcel.
    read : callable
        What an arrival says, at the time of a round that the fastest agent plays.
    keep : callable
        Keeps what agents handed over with their answers.
    num_rounds : int
        Rounds of each agent.
    time_budget : float
        Seconds after which nobody begins a round; 0: none.
    checkpoints : OwnCheckpoints
        When what is written of the run.
    """

    grid: Grid
    attendance: Attendance
    intake: Intake
    dispatch: Dispatch
    own: OwnRounds[Array]
    message: Callable[[int, Parcel[Array]], Message]
    read: Callable[[Arrival, int], Replies]
    keep: Callable[[Mapping[int, Answer[Array]]], None]
    num_rounds: int
    time_budget: float
    checkpoints: OwnCheckpoints

    def __post_init__(self) -> None:
        self._roster = self.attendance.roster
        self._at: dict[int, int] = {}  # agent -> node that got it
        self._failures: dict[int, int] = {}  # agent -> messages that failed, in a row
        self._again: dict[int, float] = {}  # agent -> clock from which on it is tried again
        self._reasons: dict[str, str] = {}  # of failures since the fastest agent's last step
        self._checked = 1  # round of the fastest agent that attendance was checked in
        self._asked: dict[int, float] = {}  # node -> clock at which it was asked who it is
        self._named: dict[int, int] = {}  # new node -> agent that it says it is
        self._began = time.monotonic()
        self._last = 0.0  # clock of the last event
        self._first: tuple[float, list[int]] = (0.0, [])  # clock and agents of the first round

    def begin(
        self,
        answers: Mapping[int, Answer[Array]],
        *,
        failed: Mapping[str, str],
        states: Mapping[str, str],
    ) -> None:
        """Take in the first round."""
        clock = self._clock()
        self._first = clock, sorted(answers)
        self.own.begin(answers, clock=clock, failed=failed, states=states)
        self.checkpoints.note_answers(answers)

    def resume(self, checkpoint: Bundle) -> None:
        """Go on from a checkpoint: what was under way then is sent again."""
        self._last = self.checkpoints.restore(checkpoint)
        self._first, self._checked = (self._last, []), max(self.own.rounds)
        self._began = time.monotonic() - self._last

    def close(
        self,
        answers: Mapping[int, Answer[Array]],
        *,
        failed: Mapping[str, str],
        left: Collection[int],
    ) -> None:
        """Take in the closing exchange."""
        self.own.close(answers, clock=self._last, failed=failed, left=left)

    def play(self) -> None:
        """Play until every agent that is there has gone through its rounds.

        Raises
        ------
        RosterError, LostWorkerError
            As in a run by rounds: too few agents, one reason of several, a dead worker.
        """
        clock, answered = self._first
        failed = dict[int, str]()
        while True:
            failed |= self._look(clock)
            absent = self._absent()
            self.checkpoints.look(absent=absent)
            given = self._give(clock)
            if answered or given or failed:
                self.own.note(Event(clock, tuple(answered), tuple(given), tuple(sorted(failed))))
                self._last = clock
            self.checkpoints.keep_if_due(clock, absent=absent)
            if self._is_over(clock):
                self.checkpoints.keep_last(clock, absent=absent)
                break
            self._check()
            clock, answered, failed = self._receive()
        # who has left by now owes no answer to the closing, with or without a parcel
        front = max(self.own.rounds)
        barred = self.intake.quarantined(front)
        self.own.note_states(self.attendance.changes(front, self._well(), {}, (), barred))
        self.own.end()

    def _clock(self) -> float:
        return time.monotonic() - self._began

    def _waits_for(self, agent: int | None) -> TypeGuard[int]:
        """Whether an agent owes the answer to its last parcel, and has got that."""
        return agent in self.own.under_way and agent not in self.checkpoints.again

    # --- who is there ---

    def _look(self, clock: float) -> dict[int, str]:
        """Look who is online; returns the agents that went away with a parcel."""
        before = self.attendance.online
        online = self.attendance.wait_for_nodes(self.grid, first=False)
        if left := set(before) - set(online):
            self.intake.refused.clear()
            self._roster.doubt(left)
        self.dispatch.lose(online)
        self._meet([node for node in online if self._is_new(node, clock)], clock)
        busy = self.dispatch.busy()
        lost = [
            agent
            for agent in sorted(self.own.under_way)
            if self._waits_for(agent) and self._at[agent] not in busy
        ]
        return self._fail(dict.fromkeys(lost, _LOST), clock)

    def _is_new(self, node: int, clock: float) -> bool:
        """Whether to ask a node who it is; a silent one is asked again later."""
        if self.agent_of(node) is not None or node in self._out():
            return False
        return node not in self._asked or clock - self._asked[node] >= ASK_AGAIN

    def _meet(self, nodes: list[int], clock: float) -> None:
        """Ask nodes who they are that came later, or come back under another id."""
        self._asked |= dict.fromkeys(nodes, clock)
        for node, agent in sorted((self.attendance.ask(self.grid, nodes) if nodes else {}).items()):
            try:
                self._roster.expect(node, agent, online=self.attendance.online)
                self._named[node] = agent
            except RosterError as error:
                self.intake.refused.add(node)
                logger.log(WARNING, "%s", error)

    def agent_of(self, node: int) -> int | None:
        """Agent that a node is, or says that it is."""
        agent = self._roster.agent_of(node)
        return self._named.get(node) if agent is None else agent

    def _out(self) -> set[int]:
        """Nodes that get no message now."""
        barred = self.intake.quarantined(max(self.own.rounds))
        return self.intake.refused | self.dispatch.busy() | barred

    # --- parcels ---

    def _give(self, clock: float) -> list[int]:
        """Send parcels to all agents whose turn it is."""
        out, due = self._out(), dict[int, int]()
        for node in self.attendance.online:
            agent = self.agent_of(node)
            if node not in out and agent is not None and self._is_due(agent, clock):
                due[agent] = node
        again = {
            agent: self.checkpoints.again.pop(agent) for agent in due if self._comes_again(agent)
        }
        agents = sorted(due.keys() - again.keys())
        parcels = dict(zip(agents, self.own.give(agents, clock=clock), strict=True)) | again
        self.checkpoints.note_sent(parcels)
        self._send([(due[agent], parcels[agent]) for agent in sorted(parcels)])
        self._at |= due
        return agents

    def _comes_again(self, agent: int) -> bool:
        """Whether the agent's last parcel was under way when the run broke off."""
        return agent in self.checkpoints.again

    def _is_due(self, agent: int, clock: float) -> bool:
        if self._waits_for(agent) or self._again.get(agent, 0.0) > clock:
            return False
        begins = self.own.rounds[agent] < self.num_rounds and not 0 < self.time_budget <= clock
        return begins or self._comes_again(agent)

    def _send(self, parcels: Iterable[tuple[int, Parcel[Array]]]) -> None:
        def kind(entry: tuple[int, Parcel[Array]]) -> tuple[int, bool]:
            return entry[1].round, entry[1].evaluate

        for (round, evaluating), entries in itertools.groupby(sorted(parcels, key=kind), kind):
            messages = [self.message(node, parcel) for node, parcel in entries]
            self.dispatch.send(self.grid, messages, round=round, evaluating=evaluating)

    # --- answers ---

    def _receive(self) -> tuple[float, list[int], dict[int, str]]:
        """Wait until something has come, or it is time to look who is there.

        Returns when, the agents that answered, and why others failed.
        """
        start = time.monotonic()
        while True:
            heed_stop_request()
            arrivals = self.dispatch.arrived(self.grid)
            late = self._expired()
            spent = time.monotonic() - start
            if arrivals or late or spent >= LOOK:
                break
            # seldom in long rounds: on devices each look is a request
            time.sleep(max(0.1, spent / 20))
        clock = self._clock()
        answers, failed = self._read(arrivals)
        failed |= {agent: f"{NO_ANSWER} within its time" for agent in late}
        self.own.take(answers, clock=clock, failed=failed)
        self.keep(answers)
        self.checkpoints.note_answers(answers)
        for agent in answers:
            self._failures.pop(agent, None)
            self._again.pop(agent, None)
        return clock, sorted(answers), self._fail(failed, clock, taken=True)

    def _expired(self) -> list[int]:
        """Agents whose last parcel nobody can answer any more."""
        agents = [(self.agent_of(sent.node), sent.round) for sent in self.dispatch.expire()]
        return [a for a, round in agents if self._waits_for(a) and round == self.own.rounds[a]]

    def _read(self, arrivals: Iterable[Arrival]) -> tuple[dict[int, Answer[Array]], dict[int, str]]:
        """Answers to the agents' last parcels, and why others failed.

        An answer of an agent that was given up in the meantime comes too late: its
        next round may be under way.
        """
        answers, failed = dict[int, Answer[Array]](), dict[int, str]()
        for arrival in arrivals:
            replies = self.read(arrival, max(self.own.rounds))
            for agent, answer in replies.answers.items():
                if self._waits_for(agent) and arrival.sent.round == self.own.rounds[agent]:
                    answers[agent] = answer
            self._reasons |= replies.failed
            agent_of_node = self.agent_of(arrival.sent.node)
            if replies.failed and self._waits_for(agent_of_node):
                failed[agent_of_node] = next(iter(replies.failed.values()))
        return answers, failed

    def _fail(
        self, failed: Mapping[int, str], clock: float, *, taken: bool = False
    ) -> dict[int, str]:
        """Let agents whose messages failed pause."""
        if failed and not taken:
            self.own.take({}, clock=clock, failed=failed)
        for agent, reason in failed.items():
            count = self._failures[agent] = self._failures.get(agent, 0) + 1
            self._again[agent] = clock + min(LONGEST_PAUSE, 2.0 ** (count - 1))
            self._reasons[f"agent {agent}"] = reason
        self.attendance.check_workers(max(self.own.rounds), self._reasons)
        return dict(failed)

    # --- until when ---

    def _check(self) -> None:
        """Check attendance whenever the fastest agent has begun another round."""
        front = max(self.own.rounds)
        if front == self._checked:
            return
        self._checked, reasons, self._reasons = front, self._reasons, {}
        finished = [a for a, round in enumerate(self.own.rounds) if round >= self.num_rounds]
        self.attendance.check(front, {*self._well(), *finished}, reasons, first=False)
        barred = self.intake.quarantined(front)
        self.own.note_states(self.attendance.changes(front, self._well(), reasons, (), barred))

    def _well(self) -> list[int]:
        """Agents that are there, and whose last message did not fail."""
        here = {self._roster.agent_of(node) for node in self.attendance.online}
        return [a for a in range(len(self.own.rounds)) if a in here and a not in self._failures]

    def _absent(self) -> set[int]:
        """Agents that no checkpoint waits for.

        They are away or barred, fail again and again, or lost the answer to their last
        round, so that no parcel asks them for their state any more.
        """
        out = self.intake.refused | self.intake.quarantined(max(self.own.rounds))
        here = {self.agent_of(node) for node in self.attendance.online if node not in out}
        return {a for a in range(len(self.own.rounds)) if a not in here or self._gave_up(a)}

    def _gave_up(self, agent: int) -> bool:
        failures, ended = self._failures.get(agent, 0), self.own.rounds[agent] >= self.num_rounds
        return failures >= (1 if ended and not self._waits_for(agent) else FAILING)

    def _is_over(self, clock: float) -> bool:
        """Whether nobody is at work, and nobody is waited for."""
        if any(map(self._waits_for, self.own.under_way)):
            return False
        again = self.checkpoints.again
        open_ = {a for a, round in enumerate(self.own.rounds) if round < self.num_rounds} | {*again}
        if not open_ or (0 < self.time_budget <= clock and not again):
            return True
        paused = any(self._again.get(agent, 0.0) > clock for agent in open_)
        return not paused and clock - self._last > self.attendance.wait_timeout
