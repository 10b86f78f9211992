"""One agent's part in one round; the same under `simulate` and under Flower."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, final

import torch

from flower_mcepl.agents import Agent
from flower_mcepl.agents.agent import AgentState, Payload, WeighsVotes
from flower_mcepl.agents.inboxes import Distinct
from flower_mcepl.agents.parts.votes import WHOLE
from flower_mcepl.agents.stack import AgentStack, given
from flower_mcepl.config.checks import check
from flower_mcepl.errors import (
    AnswerError,
    DivergedError,
    FrameError,
    MissingReferenceError,
    names_agent,
)
from flower_mcepl.exchange.ages import check_votes
from flower_mcepl.exchange.bounds import MOST_EXAMPLES, MOST_METRIC
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.outbox import Outbox
from flower_mcepl.exchange.parcels import Answer, FrameT, Parcel, Posted
from flower_mcepl.wire import WrittenFrame
from flower_mcepl.wire.values import find_precision


class Keeper(Protocol):
    """Keeper of an agent's best state."""

    state: AgentState | None  # the best so far; None: there was no evaluation

    def consider(
        self, agent: Agent, evaluation: Mapping[str, float], *, round: int
    ) -> Mapping[str, float]:
        """Keep the agent's state of ``round`` if that is the best so far.

        Return what the answer says of the one that is kept.
        """
        ...


@dataclass(frozen=True)
class Mail:
    """What an agent holds of its neighbors, what it has sent, and its best state."""

    inbox: Mailbox
    outbox: Outbox
    keeper: Keeper | None = None  # None: no best state is kept


@dataclass(frozen=True)
class Reply:
    """What an agent answers."""

    frames: Sequence[WrittenFrame]  # of its payload: none, one, or two of which each suffices
    metrics: dict[str, float]
    held: dict[int, int]  # which round of which neighbor the next frame may build on
    refused: list[str] = field(default_factory=list)  # which frames, and why
    # neighbors of whom a whole frame is wanted
    lacking: list[int] = field(default_factory=list)
    # what the frames hold, for those who watch a simulation
    payload: Payload = field(default_factory=dict)
    evaluation_error: str = ""  # why an evaluation that was due is missing

    def answer(
        self,
        facts: Mapping[str, Any],
        wrap_frame: Callable[[bytes], FrameT],
        *,
        fresh: bool = False,
        introduces: bool = False,
    ) -> Answer[FrameT]:
        """Answer with these facts; its frames are as the exchange takes them."""
        return Answer(
            facts=facts,
            metrics=self.metrics,
            posts=[
                Posted(wrap_frame(frame.data), len(frame.data), frame.header_bytes, frame.reference)
                for frame in self.frames
            ],
            content=self.frames[0].content if self.frames else None,
            held=self.held,
            refused=self.refused,
            lacking=self.lacking,
            fresh=fresh,
            raw=[frame.data for frame in self.frames],
            introduces=introduces,
            evaluation_error=self.evaluation_error,
        )


def open_mail(
    agent: Agent,
    *,
    max_staleness: int,
    age_decay: float = 1.0,
    run: str = "",
    keeper: Keeper | None = None,
) -> Mail:
    """Mail that ``agent`` begins a run with: nothing held, nothing sent.

    Parameters
    ----------
    agent : Agent
        Whose it is.
    max_staleness, age_decay : int, float
        As in `Mailbox`.
    run : str (default: "")
        Id of the run, which its frames belong to; empty: to none.
    keeper : Keeper, optional
        Keeps the agent's best state.

    Raises
    ------
    ConfigError
        If votes are to fade that the agent cannot weigh.
    """
    whose = f"agent {agent.index} of algorithm {agent.algorithm}"
    check_votes(age_decay, whose=whose, weighs=agent.weighs_votes or not agent.layers)
    first = agent.first_payload()
    only_masks = first is not None and all(tensor.dtype == torch.bool for tensor in first.values())
    inbox = Mailbox(
        owner=agent.index,
        fingerprint=agent.fingerprint,
        layers=agent.layers if agent.layers_down is None else agent.layers_down,
        max_staleness=max_staleness,
        dtype=torch.bool if only_masks else None,
        prior=agent.prior,
        first=first,
        run=run,
        lists=agent.layers_by_depth,
        age_decay=age_decay,
        float_types=agent.float_types,
    )
    outbox = Outbox(
        owner=agent.index,
        fingerprint=agent.fingerprint,
        layers=agent.layers,
        prior=agent.prior,
        first=first if only_masks or find_precision(agent.precision).of_differences else None,
        precision=agent.precision,
        run=run,
    )
    return Mail(inbox, outbox, keeper)


def play_round(agent: Agent, mail: Mail, parcel: Parcel[bytes]) -> Reply:
    """Fuse the last round's frames, evaluate if due, train, and encode what goes out.

    A bad frame is refused and reported; its sender's last good mask stays in use. An
    evaluation that fails costs the evaluation, and is reported.

    Raises
    ------
    DivergedError
        If training leaves the finite numbers; the message names the agent.
    """
    start = time.perf_counter()
    turn = _Turn(agent, mail, parcel)
    with turn.naming():
        heard = turn.take_in()
        if heard is not None and heard.votes:
            cast(WeighsVotes, agent).fuse(heard.inbox, round=turn.previous, votes=heard.votes)
        elif heard is not None:
            agent.fuse(heard.inbox, round=turn.previous)
        if parcel.evaluate:
            turn.note_evaluation(agent.evaluate)
        if parcel.train:
            turn.write(agent.train(round=parcel.round), agent.outgoing())
    return turn.reply(seconds=time.perf_counter() - start)


def play_together(
    stack: AgentStack, mails: Sequence[Mail], parcels: Sequence[Parcel[bytes]]
) -> list[Reply]:
    """`play_round` of all agents of a stack, verb by verb; ``seconds`` are their mean.

    The parcels are those of one round, and ask the same of all.
    """
    try:
        return _play_together(stack, mails, parcels)
    except DivergedError as error:
        if any(names_agent(error, agent.index) for agent in stack.agents):
            raise
        index = next((agent.index for agent in stack.diverged()), "of a stack")
        raise DivergedError(f"agent {index}, round {parcels[0].round}: {error}") from error


def alike(parcels: Mapping[int, Parcel[bytes]]) -> list[list[int]]:
    """Agents whose parcels are of one round and ask the same, as a stack plays them."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for agent, parcel in parcels.items():
        asked = (parcel.round, parcel.train, parcel.evaluate, parcel.neighbors is None)
        groups.setdefault(asked, []).append(agent)
    return list(groups.values())


def _play_together(
    stack: AgentStack, mails: Sequence[Mail], parcels: Sequence[Parcel[bytes]]
) -> list[Reply]:
    start = time.perf_counter()
    turns = [_Turn(*each) for each in zip(stack.agents, mails, parcels, strict=True)]
    order = parcels[0]
    distinct = Distinct()  # each agent decodes its neighbors' masks: keep them once
    heard = [(turn.take_in() or Heard({})).among(distinct) for turn in turns]
    if order.neighbors is not None:
        inboxes, votes = [own.inbox for own in heard], [own.votes for own in heard]
        stack.fuse(inboxes, round=order.round - 1, votes=votes)
    if order.evaluate:
        for turn, evaluation in zip(turns, stack.evaluate(), strict=True):
            turn.note_evaluation(partial(given, evaluation))
    if order.train:
        metrics = stack.train(round=order.round)
        for turn, own, payload in zip(turns, metrics, stack.outgoing(), strict=True):
            turn.write(own, payload)
    seconds = (time.perf_counter() - start) / len(turns)
    return [turn.reply(seconds=seconds) for turn in turns]


class Heard(NamedTuple):
    """What an agent is to fuse: payloads by neighbor, and votes if some have faded."""

    inbox: Mapping[int, Payload]
    votes: Mapping[int, float] = WHOLE

    def among(self, distinct: Distinct) -> "Heard":
        """The same, with each payload that others heard as one object with theirs."""
        return Heard(distinct.inbox(self.inbox), self.votes)


@final
class _Turn:
    """One agent's part in a round but for the agent's own verbs, in their order."""

    def __init__(self, agent: Agent, mail: Mail, parcel: Parcel[bytes]) -> None:
        self._agent, self._mail, self._parcel = agent, mail, parcel
        self.previous = parcel.round - 1  # the round whose frames come
        self._metrics: dict[str, float] = {}
        self._refused: list[str] = []
        self._lacking: list[int] = []
        self._frames: Sequence[WrittenFrame] = ()
        self._payload: Payload = {}
        self._evaluation_error = ""

    def take_in(self) -> Heard | None:
        """Take in the frames; return what the agent is to fuse, if anything is."""
        inbox, parcel = self._mail.inbox, self._parcel
        self._refused, self._lacking = _take_in(inbox, parcel)
        if parcel.neighbors is None:
            return None
        current = inbox.current(parcel.neighbors, round=self.previous)
        votes = inbox.votes(current, round=self.previous)
        inbox.forget(older_than=self.previous)
        return Heard(current, votes)

    def note_evaluation(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        """Take note of an evaluation, and keep the state if it is the best so far."""
        evaluation, self._evaluation_error = _outcome(evaluate)
        self._metrics.update(evaluation)
        if evaluation and self._mail.keeper is not None:  # before training changes it
            note = self._mail.keeper.consider(self._agent, evaluation, round=self.previous)
            self._metrics.update(note)

    def write(self, metrics: Mapping[str, float], payload: Payload) -> None:
        """Take note of the training, and encode what goes out.

        Raises
        ------
        ConfigError
            If the algorithm's agent returned something else, or changed what is common.
        """
        self._mail.inbox.check_first()
        _check_training(metrics, payload, taken=self._metrics)
        self._metrics.update(metrics)
        self._payload = payload
        if payload:  # some algorithms have no neighbors
            self._frames = self._mail.outbox.write(
                payload,
                round=self._parcel.round,
                acknowledged=self._parcel.acknowledged,
                key=self._parcel.whole,
            )
            self._agent.sent(self._frames[0].decoded)

    def reply(self, *, seconds: float) -> Reply:
        """What the agent answers."""
        return Reply(
            self._frames,
            {**self._metrics, "seconds": seconds},
            self._mail.inbox.rounds(),
            self._refused,
            self._lacking,
            self._payload,
            self._evaluation_error,
        )

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the agent in an error of diverged numbers."""
        try:
            yield
        except DivergedError as error:
            if names_agent(error, self._agent.index):
                raise
            raise DivergedError(
                f"agent {self._agent.index}, round {self._parcel.round}: {error}"
            ) from error
        except Exception as error:
            agent = self._agent
            error.add_note(
                f"It was raised by agent {agent.index} of algorithm {agent.algorithm}, "
                f"{type(agent).__module__}.{type(agent).__qualname__}, in round "
                f"{self._parcel.round}."
            )
            raise


# what every evaluation may say: names that no metric of training has
_OF_EVALUATION = ("accuracy", "loss", "num-examples", "density")


def _check_training(metrics: Any, payload: Any, *, taken: Mapping[str, float]) -> None:
    check(
        isinstance(metrics, Mapping),
        "an agent's train must return a mapping of metrics, with train-loss",
        type(metrics).__name__,
        "Mend the algorithm's train.",
    )
    for name, value in metrics.items():
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError):
            check(False, f"a metric of train must be one number; {name}", value, "Mend train.")
    check(
        not (both := metrics.keys() & {*taken, *_OF_EVALUATION}),
        "metrics of train must have other names than those of evaluate",
        ", ".join(sorted(both)),
        "Begin them with train-.",
    )
    check(
        isinstance(payload, Mapping),
        "an agent's outgoing must return a mapping of layers to tensors",
        type(payload).__name__,
        "Return {} to send nothing.",
    )


def evaluate(agent: Agent) -> tuple[dict[str, float], str]:
    """Metrics of an agent's evaluation, or none, and why; see `_outcome`."""
    return _outcome(agent.evaluate)


def _outcome(evaluate: Callable[[], Mapping[str, float]]) -> tuple[dict[str, float], str]:
    """Metrics that an evaluation returns, or none, and why.

    What was learned is worth more than its evaluation: nothing that a user's function
    raises or returns may cost the round.
    """
    try:
        metrics = dict(evaluate())
        if metrics:
            _check_evaluation(metrics)
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"
    return metrics, ""


def _check_evaluation(metrics: Mapping[str, float]) -> None:
    if "accuracy" not in metrics and "loss" not in metrics:
        raise AnswerError(
            f"an evaluation needs an accuracy or a loss; got {', '.join(metrics)}. Return one."
        )
    accuracy = metrics.get("accuracy", 0.0)
    if not 0 <= accuracy <= 1:
        raise AnswerError(
            f"an accuracy is a fraction in 0..1; got {accuracy}. Divide it, if it is in percent."
        )
    examples = metrics.get("num-examples", 0)
    if not (0 <= examples <= MOST_EXAMPLES and int(examples) == examples):
        raise AnswerError(
            f"num-examples must be a whole number in 0..{MOST_EXAMPLES}; got {examples}. Let it be "
            "the number of examples that were evaluated."
        )
    for name, value in metrics.items():
        if not (abs(value) <= MOST_METRIC or (name == "loss" and not math.isfinite(value))):
            raise AnswerError(
                f"metric {name} must be a finite number up to {MOST_METRIC:g}; got {value}. Leave "
                "it out where it is not defined, or take its logarithm."
            )


def _take_in(inbox: Mailbox, parcel: Parcel[bytes]) -> tuple[list[str], list[int]]:
    refused, lacking = [], []
    previous, ages = parcel.round - 1, parcel.ages
    for sender, frames in parcel.frames.items():
        try:
            inbox.put(
                sender,
                frames,
                # without a barrier a neighbor may be rounds ahead
                latest_round=previous if ages is None else None,
                kept=parcel.kept.get(sender),
                came=None if ages is None else previous - ages.get(sender, 0),
            )
        except MissingReferenceError:
            pass
        except FrameError as error:
            refused.append(refusal(sender, error))
        if inbox.doubts(sender):
            lacking.append(sender)
    return refused, lacking


def refusal(sender: int | str, error: FrameError) -> str:
    """Whose frame was refused and why, as the relay logs and records it.

    A frame may name layers of its own, at any length, which stand in the error.
    """
    return f"{type(error).__name__}, frame of agent {sender}: {error!s:.900}"
