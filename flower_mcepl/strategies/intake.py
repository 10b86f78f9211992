"""Intake of replies: which agent each is of, and whose failure a bad one is."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from logging import WARNING, getLogger
from typing import final

from flwr.app import Array, Message

from flower_mcepl.errors import (
    AnswerError,
    FingerprintError,
    RosterError,
    first_line,
    same_reason,
)
from flower_mcepl.exchange.parcels import Answer, check_sizes
from flower_mcepl.strategies.answers import plain_reason, read_answer
from flower_mcepl.strategies.attendance import NO_ANSWER, Attendance, few
from flower_mcepl.strategies.waiting import Sent

logger = getLogger("flwr")
# Answers that are none of an agent, one after the other, after which a node gets no
# message for so many rounds.
BAD_ANSWERS, QUARANTINE = 3, 10


@dataclass(frozen=True)
class Replies:
    """What came of a round's messages: answers by agent, reasons by agent or node."""

    answers: dict[int, Answer[Array]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def merged(self, later: "Replies") -> "Replies":
        """These and later ones; who answered, late or not, has not failed."""
        answers = {**self.answers, **later.answers}
        failed = {**self.failed, **later.failed}
        for agent in answers:
            failed.pop(f"agent {agent}", None)
        return Replies(answers, failed)


@final
class Intake:
    """Admits nodes as agents, and reads what they answer.

    Parameters
    ----------
    attendance : Attendance
        Who is there, and which node is which agent.
    check_agent : callable
        Gets the agent and its answer; raises FingerprintError where the agent does not
        fit the strategy, beyond what the roster compares, and AnswerError where the
        answer does not.
    """

    def __init__(
        self, attendance: Attendance, check_agent: Callable[[int, Answer[Array]], None]
    ) -> None:
        self._attendance, self._roster = attendance, attendance.roster
        self._check_agent = check_agent
        # nodes that were turned away; they may try again when a node has left
        self.refused: set[int] = set()
        self._bad: dict[int, int] = {}  # node -> bad answers since its last good one
        self._barred: dict[int, int] = {}  # node -> first round of which it gets a message again
        self._logged: dict[str, str] = {}  # reasons of the last round, by name

    def take(
        self,
        replies: Iterable[tuple[int, int, Message]],
        expired: Iterable[Sent],
        *,
        round: int,
        now: int | None = None,
    ) -> Replies:
        """Read the replies that came in ``round``.

        Parameters
        ----------
        replies : iterable of (round, node, Message)
            Each with the round and the node of the message that it answers.
        expired : iterable of Sent
            Messages that nobody can answer any more.
        round : int
            The present round.
        now : int, optional
            Round by which a quarantine counts, where agents have rounds of their own.
        """
        now = round if now is None else now
        taken = Replies()
        came: list[tuple[int, int, Answer[Array]]] = []
        for of_round, node, reply in sorted(replies, key=lambda entry: entry[:2]):
            try:
                came.append((of_round, node, self._read(node, reply)))
            except AnswerError as error:
                taken.failed[self._name(node)] = str(error)
                if not reply.has_error():  # a node that says that it failed is no hostile one
                    self._count_bad(node, now)
        self._roster.found({node: answer.facts for _, node, answer in came})
        for of_round, node, answer in came:
            try:
                agent = self._admit(node, answer, round=of_round)
            except AnswerError as error:
                taken.failed[self._name(node)] = str(error)
                self._count_bad(node, now)
            except (RosterError, FingerprintError) as error:
                self.refused.add(node)
                taken.failed[f"node {node}"] = str(error)
            else:
                self._bad.pop(node, None)
                late_of = None if of_round == round else of_round
                taken.answers[agent] = replace(answer, late_of=late_of)
        for sent in expired:
            self._roster.doubt([sent.node])
            reason = f"{NO_ANSWER} of round {sent.round} within its time"
            taken.failed.setdefault(self._name(sent.node), reason)
        taken = taken.merged(Replies())
        self._tell(round, taken.failed)
        return taken

    def _tell(self, round: int, failed: Mapping[str, str]) -> None:
        """Log what failed anew: each reason once, with the agents that it is of."""
        reasons = {name: same_reason(reason) for name, reason in failed.items()}
        anew: dict[str, list[str]] = {}
        for name, reason in sorted(reasons.items()):
            if self._logged.get(name) != reason:
                anew.setdefault(reason, []).append(name)
        self._logged = reasons
        for names in anew.values():
            text = first_line(failed[names[0]])
            logger.log(WARNING, "round %d: %s failed. %s", round, few(names), text)

    def quarantined(self, round: int) -> set[int]:
        """Nodes that get no message of ``round``, for what they answered of late."""
        return {node for node, until in self._barred.items() if round < until}

    def _count_bad(self, node: int, round: int) -> None:
        """Count an answer that is none; after some in a row, quarantine."""
        self._bad[node] = self._bad.get(node, 0) + 1
        if self._bad[node] < BAD_ANSWERS:
            return
        self._bad[node] = BAD_ANSWERS - 1  # one more, and it is so again
        self._barred[node] = round + 1 + QUARANTINE
        logger.log(
            WARNING,
            "round %d: %s gave %d bad answers in a row and is in quarantine up to round %d",
            round,
            self._name(node),
            BAD_ANSWERS,
            round + QUARANTINE,
        )

    def _read(self, node: int, reply: Message) -> Answer[Array]:
        if reply.has_error():
            self._roster.doubt([node])
            reason = plain_reason(reply.error.reason)
            raise AnswerError(f"error {reply.error.code}: {reason}")
        played = self._roster.agent_of(node)
        known = {} if played is None else self._roster.facts(played)
        return read_answer(self._name(node), reply.content, known)[1]

    def _admit(self, node: int, answer: Answer[Array], *, round: int) -> int:
        """Agent that the node is, as which its answer counts."""
        agent = self._roster.admit(node, answer.facts, online=self._attendance.online)
        self._check_agent(agent, answer)
        check_sizes(answer.posts, answer.facts)
        if answer.fresh and round > 1:
            logger.log(
                WARNING,
                "round %d: agent %d started afresh: its node holds no state of it",
                round,
                agent,
            )
        return agent

    def _name(self, node: int) -> str:
        agent = self._roster.agent_of(node)
        return f"node {node}" if agent is None else f"agent {agent}"
