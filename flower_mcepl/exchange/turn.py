"""One agent's part in one round; the same under `simulate` and under Flower."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from flower_mcepl.agents import Agent
from flower_mcepl.agents.agent import AgentState, Payload
from flower_mcepl.errors import (
    AnswerError,
    DivergedError,
    FrameError,
    MissingReferenceError,
    names_agent,
)
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
    agent: Agent, *, max_staleness: int, run: str = "", keeper: Keeper | None = None
) -> Mail:
    """Mail that ``agent`` begins a run with: nothing held, nothing sent.

    Parameters
    ----------
    agent : Agent
        Whose it is.
    max_staleness : int
        As in `Mailbox`.
    run : str (default: "")
        Id of the run, which its frames belong to; empty: to none.
    keeper : Keeper, optional
        Keeps the agent's best state.
    """
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
    try:
        return _play(agent, mail, parcel)
    except DivergedError as error:
        if names_agent(error, agent.index):
            raise
        raise DivergedError(f"agent {agent.index}, round {parcel.round}: {error}") from error


def _play(agent: Agent, mail: Mail, parcel: Parcel[bytes]) -> Reply:
    start = time.perf_counter()
    metrics: dict[str, float] = {}
    previous = parcel.round - 1
    refused, lacking = _take_in(mail.inbox, parcel, latest_round=previous)
    if parcel.neighbors is not None:
        agent.fuse(mail.inbox.current(parcel.neighbors, round=previous), round=previous)
        mail.inbox.forget(older_than=previous)
    evaluation, evaluation_error = evaluate(agent) if parcel.evaluate else ({}, "")
    metrics.update(evaluation)
    if evaluation and mail.keeper is not None:  # before training changes what was evaluated
        metrics.update(mail.keeper.consider(agent, evaluation, round=previous))
    frames: Sequence[WrittenFrame] = ()
    payload: Payload = {}
    if parcel.train:
        metrics.update(agent.train(round=parcel.round))
        payload = agent.outgoing()
        if payload:  # some algorithms have no neighbors
            frames = mail.outbox.write(
                payload, round=parcel.round, acknowledged=parcel.acknowledged, key=parcel.whole
            )
            agent.sent(frames[0].decoded)
    metrics["seconds"] = time.perf_counter() - start
    held = mail.inbox.rounds()
    return Reply(frames, metrics, held, refused, lacking, payload, evaluation_error)


def evaluate(agent: Agent) -> tuple[dict[str, float], str]:
    """Metrics of an agent's evaluation, or none, and why.

    What was learned is worth more than its evaluation: nothing that a user's function
    raises or returns may cost the round.
    """
    try:
        metrics = agent.evaluate()
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


def _take_in(
    inbox: Mailbox, parcel: Parcel[bytes], *, latest_round: int
) -> tuple[list[str], list[int]]:
    refused, lacking = [], []
    for sender, frames in parcel.frames.items():
        try:
            inbox.put(sender, frames, latest_round=latest_round, kept=parcel.kept.get(sender))
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
