"""A run in which every agent goes through rounds of its own, without a barrier.

Whoever answers gets its next parcel at once, with the newest frames that its neighbors
have delivered by then; one parcel of each agent is under way at a time. The order of
events is written down as they happen, rows as agents are evaluated; the line of a round
follows when all agents have played it, each in its own time.

A checkpoint of round t is the whole run as it was when its agents had played t rounds
each in the mean: so one that is slow, or away, holds none up.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, final

import numpy as np

from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, FrameT, Parcel, by_number
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.record.layout import Row
from flower_mcepl.runs.book import RunBook
from flower_mcepl.runs.checkpoint import KEPT
from flower_mcepl.runs.events import Event
from flower_mcepl.runs.own_state import answer_facts, answer_of
from flower_mcepl.runs.resumption import LAST_FRAMES

_OWN = "own-rounds"  # group of a checkpoint's arrays


@dataclass
class _OwnRound(Generic[FrameT]):
    """What a round came to so far, over the agents that have played it."""

    answers: dict[int, Answer[FrameT]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    refused: dict[int, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missed: set[int] = field(default_factory=set)  # agents that will not play it any more
    states: dict[str, str] = field(default_factory=dict)  # that changed since the round before
    clock: float = 0.0  # of its last answer
    so_far: tuple[int, int] = (0, 0)  # bytes over links and uplinks by then

    def state(self) -> dict[str, Any]:
        """What `of` takes back, JSON-able."""
        answers = {agent: answer_facts(answer) for agent, answer in self.answers.items()}
        return {**vars(self), "answers": answers, "missed": sorted(self.missed)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "_OwnRound[FrameT]":
        """Round from its `state`."""
        return cls(
            **{
                **state,
                "answers": {int(i): answer_of(facts) for i, facts in state["answers"].items()},
                "refused": by_number(state["refused"]),
                "missed": set(state["missed"]),
                "so_far": tuple(state["so_far"]),
            }
        )


@final
class OwnRounds(Generic[FrameT]):
    """Bookkeeper of a run without a barrier.

    Parameters
    ----------
    book : RunBook
        Of the run.
    exchange : Exchange
        A relay of schedule "async".
    num_agents : int
        Agents of the graph.

    Attributes
    ----------
    rounds : list of int
        Round of each agent's last parcel; 0: it had none.
    answered : list of int
        Round of each agent's last answer; 0: it gave none.
    under_way : set of int
        Agents that owe the answer to their last parcel.
    """

    def __init__(
        self, book: RunBook[FrameT], exchange: Exchange[FrameT], *, num_agents: int
    ) -> None:
        self._book, self._exchange = book, exchange
        self.rounds, self.answered = [0] * num_agents, [0] * num_agents
        self._began = [0.0] * num_agents  # clock of each agent's last parcel
        self._open: dict[int, _OwnRound[FrameT]] = {}
        self._written: set[int] = set()  # rounds that have their line
        self._states: dict[str, str] = {}  # for the closing line
        # by round of a checkpoint: the round that each agent had done by then
        self._done: dict[int, list[int]] = {}
        self.under_way: set[int] = set()
        self._facts: dict[int, Mapping[str, Any]] = {}  # by agent, of its last handshake

    def give(self, agents: Iterable[int], *, clock: float) -> list[Parcel[FrameT]]:
        """Parcels of the agents' next rounds, in this order."""
        parcels = []
        for agent in agents:
            self.rounds[agent] += 1
            self._began[agent] = clock
            self.under_way.add(agent)
            parcels.append(self._exchange.parcel(agent, round=self.rounds[agent]))
        return parcels

    def begin(
        self,
        answers: Mapping[int, Answer[FrameT]],
        *,
        clock: float,
        failed: Mapping[str, str],
        states: Mapping[str, str],
    ) -> None:
        """Take in a first round of all agents; those that failed are yet to play it.

        Its answers are of the first event after this.
        """
        self.note(Event(0.0, (), tuple(sorted(answers))))
        for agent in answers:
            self.rounds[agent] = 1
        first = self._open.setdefault(1, _OwnRound())
        first.failed |= failed
        first.states |= states
        self.take(answers, clock=clock)

    def take(
        self,
        answers: Mapping[int, Answer[FrameT]],
        *,
        clock: float,
        failed: Mapping[int, str] | None = None,
    ) -> None:
        """Take in answers to the agents' last parcels, and why others failed."""
        for agent, answer in sorted(answers.items()):
            self._take(agent, answer)
        for agent, reason in sorted((failed or {}).items()):
            own = self._of(agent)
            own.failed[f"agent {agent}"] = reason
            own.missed.add(agent)
        for agent in (*answers, *(failed or {})):
            self.under_way.discard(agent)
            own = self._of(agent)
            own.clock, own.so_far = clock, self._exchange.ledger.so_far()
        for round, own in sorted(self._open.items()):
            if len(own.answers) + len(own.missed) == len(self.rounds):
                self._close(round)

    def note_states(self, changes: Mapping[str, str]) -> None:
        """States of agents and nodes that changed, for the newest round."""
        round = max(self.rounds)
        if round in self._written:
            self._states |= changes
        elif changes:
            self._open.setdefault(round, _OwnRound()).states |= changes

    def note(self, event: Event) -> None:
        """Write an event down."""
        if self._book.record is not None:
            self._book.record.log_event(event.to_row())

    def end(self) -> None:
        """Write the rounds that some agents never played: nobody plays any more."""
        monitor = self._book.monitor
        monitor.is_over = True
        if min(self.rounds) < monitor.num_rounds:
            monitor.stop_after(max(self.rounds), fewest=min(self.rounds))
        for round in sorted(self._open):
            self._close(round)

    def due(self) -> int | None:
        """Round of the checkpoint that is due now: rounds of an agent in the mean."""
        if not self.keeps:
            return None
        last = max(self._done, default=0)
        return next((t for t in range(self._mean_round(), last, -1) if self._book.due(t)), None)

    def last_due(self) -> int | None:
        """Round of the checkpoint after which nobody plays, if it is a new one."""
        now = self._mean_round()
        return now if self.keeps and now > max(self._done, default=0) else None

    def _mean_round(self) -> int:
        return sum(self._rounds_done()) // len(self.rounds)

    def _rounds_done(self) -> list[int]:
        """Rounds that each agent has played, or will not play any more."""
        return [t - (agent in self.under_way) for agent, t in enumerate(self.rounds)]

    def keep(self, round: int, more: Bundle) -> None:
        """Write the checkpoint of ``round``, with ``more`` beside what stands here."""
        assert self._book.checkpoints is not None
        self._done = dict([*self._done.items(), (round, self._rounds_done())][-KEPT:])
        # as an array: facts are limited to 100 MB, and rounds wait long for who is away
        books = np.frombuffer(json.dumps(self._state()).encode(), np.uint8)
        facts = {LAST_FRAMES: self.answered, **more.facts}
        groups = {**more.groups(), _OWN: {"json": books}}
        self._book.checkpoints.save(round, Bundle.joined(facts, groups))

    @property
    def keeps(self) -> bool:
        """Whether checkpoints are written at all."""
        return self._book.checkpoints is not None and self._book.checkpoints.every > 0

    def done_by(self, agent: int) -> tuple[int, ...]:
        """Rounds that an agent had done by each checkpoint that there is."""
        return tuple(done[agent] for done in self._done.values())

    def _state(self) -> dict[str, Any]:
        """Everything of these books that the rounds to come need, JSON-able."""
        return {
            "rounds": self.rounds,
            "began": self._began,
            "open": {round: own.state() for round, own in self._open.items()},
            "written": sorted(self._written),
            "states": self._states,
            "done": self._done,
            "under-way": sorted(self.under_way),
        }

    def restore(self, checkpoint: Bundle) -> None:
        """Go on from a checkpoint that `keep` wrote."""
        own = json.loads(checkpoint.group(_OWN)["json"].tobytes())
        self.answered = [*checkpoint.facts[LAST_FRAMES]]
        self.rounds, self._began = [*own["rounds"]], [*own["began"]]
        self._open = {int(t): _OwnRound.of(state) for t, state in own["open"].items()}
        self._written, self._states = set(own["written"]), dict(own["states"])
        self._done, self.under_way = by_number(own["done"]), set(own["under-way"])

    def closing_parcel(self, agent: int) -> Parcel[FrameT]:
        """The agent's last parcel, after its own last round."""
        return self._exchange.parcel(agent, round=self.rounds[agent] + 1, closing=True)

    def close(
        self,
        answers: Mapping[int, Answer[FrameT]],
        *,
        clock: float,
        failed: Mapping[str, str] | None = None,
        left: Collection[int] = (),
    ) -> None:
        """Take in the closing answers; each is of its agent's own last round.

        Agents that had ``left`` before owe none.
        """
        closing: _OwnRound[FrameT] = _OwnRound()
        prompt = {a: answer for a, answer in answers.items() if answer.late_of is None}
        for agent, answer in sorted(answers.items()):
            taken = self._book.take(self.rounds[agent] + 1, {agent: answer}, {agent: clock})
            marks = {"closing": True} if agent in prompt else {}
            closing.rows += [{**row, **marks} for row in taken.rows]
            closing.refused |= taken.refused
        monitor, failed = self._book.monitor, dict(failed or {})
        monitor.add_rows(closing.rows)
        monitor.close_round(
            monitor.num_rounds + 1,
            answers,
            closing.rows,
            refused=closing.refused,
            failed=failed,
            missing=self._missing(prompt, failed),
            states=self._states,
            clock=clock,
        )
        self._book.note_end(prompt, left)

    def _missing(self, answered: Collection[int], failed: Collection[str]) -> list[int]:
        """Agents that neither answered nor failed."""
        agents = range(len(self.rounds))
        return [i for i in agents if i not in answered and f"agent {i}" not in failed]

    def _take(self, agent: int, answer: Answer[FrameT]) -> None:
        round, own = self.rounds[agent], self._of(agent)
        taken = self._book.take(round, {agent: answer}, {agent: self._began[agent]})
        self._book.monitor.add_rows(taken.rows)
        if self._book.record is not None:
            self._book.record.keep_frames(round, agent, answer.raw)
        self.answered[agent] = round
        # A fast agent's answers wait long for the slow ones: without frames and states,
        # and without a handshake that says what the one before said.
        known = self._facts.get(agent) == answer.facts
        self._facts[agent] = answer.facts
        own.answers[agent] = replace(
            answer,
            posts=(),
            raw=(),
            state=b"",
            exported={},
            facts={} if known else answer.facts,
            introduces=answer.introduces and not known,
        )
        own.rows += taken.rows
        own.refused |= taken.refused

    def _of(self, agent: int) -> _OwnRound[FrameT]:
        return self._open.setdefault(self.rounds[agent], _OwnRound())

    def _close(self, round: int) -> None:
        own = self._open.pop(round)
        self._written.add(round)
        self._book.monitor.close_round(
            round,
            dict(sorted(own.answers.items())),
            own.rows,
            refused=own.refused,
            failed=own.failed,
            missing=self._missing(own.answers, own.failed),
            states=own.states,
            clock=own.clock,
            so_far=own.so_far,
        )
