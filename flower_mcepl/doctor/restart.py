"""Check that an agent built anew from its state plays on as if nothing had happened.

Under Flower every message may be a process of its own: what an agent remembers and its
state lacks would be lost between any two rounds, and data that each process draws
otherwise would mix its splits.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.agents import Agent, MceplAgent
from flower_mcepl.agents.agent import AgentState, Payload
from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.doctor.trial import Trial
from flower_mcepl.exchange.turn import evaluate, open_mail
from flower_mcepl.runs.options import RoundOptions

SHOWN = 3  # names of what differs
LONGEST = 30  # seconds of a round, above which no further ones are played
_STATE = (
    "Save all that the agent remembers in its state(), and take it back in restore(): under "
    "Flower each message may be a process of its own."
)
_RANDOM = (
    "Runs of it cannot be repeated, and under Flower each message may build the agent and its "
    "data anew: let the model and data functions draw from seeds of their own, such as that of "
    "the agent. On a GPU it may be the order of sums."
)


@dataclass(frozen=True)
class Played:
    """What an agent did in a round, and its state thereafter."""

    metrics: Mapping[str, float]
    payload: Payload
    state: AgentState


def check_restart(
    agent: Agent,
    rebuild: Callable[[], Agent],
    heard: Sequence[int],
    *,
    trial: Trial,
    options: RoundOptions,
) -> Finding:
    """Finding on whether an agent's state holds all that it remembers.

    Parameters
    ----------
    agent : Agent
        The one that was tried; it plays two rounds more.
    rebuild : callable
        Builds the agent anew, as another process would.
    heard : sequence of int
        Its neighbors; each of them sends what the agent itself sends.
    trial : Trial
        Of the agent.
    options : RoundOptions
        How the run's rounds go.
    """
    with Examination("restart", remedy=_STATE) as check:
        if isinstance(agent, MceplAgent) and agent.pacer is not None:
            check.ok("not compared: the time of its steps chooses the filters", compared=False)
            return check.finding
        if trial.train_seconds > LONGEST:
            check.ok(f"not compared: a round takes longer than {LONGEST} s", compared=False)
            return check.finding
        next_round = trial.rounds + 1
        sent = play_on(agent, {}, next_round, options=options).payload
        inbox = {neighbor: sent for neighbor in heard} if sent else {}
        state = agent.state()

        def restarted() -> Played:
            twin = rebuild()
            twin.restore(AgentState.decode(state.encode()))
            return play_on(twin, inbox, next_round + 1, options=options)

        played = play_on(agent, inbox, next_round + 1, options=options)
        again = restarted()
        if not (lost := differences(played, again)):
            check.ok(
                "built anew from its state, it plays the next round to the same bits",
                compared=True,
            )
        elif drawn := differences(again, restarted()):
            check.warn(
                f"built anew twice from one state, it plays two different rounds: {_shown(drawn)}",
                _RANDOM,
                compared=True,
                differs=drawn,
            )
        else:
            check.fail(
                f"built anew from its state, it plays another round than if it had gone on: "
                f"{_shown(lost)}",
                _STATE,
                compared=True,
                differs=lost,
            )
    return check.finding


def play_on(
    agent: Agent, inbox: Mapping[int, Payload], round: int, *, options: RoundOptions
) -> Played:
    """Let an agent play ``round``; the payload is as its neighbors decode it."""
    agent.fuse(inbox, round=round - 1)
    evaluation, _ = evaluate(agent)  # that it fails is another check's
    metrics = {**evaluation, **agent.train(round=round)}
    payload = agent.outgoing()
    if payload:
        outbox = open_mail(agent, max_staleness=options.max_staleness).outbox
        decoded = outbox.write(payload, round=round, acknowledged=None)[0].decoded
        agent.sent(decoded)
        payload = {**payload, **decoded}
    return Played(metrics, payload, agent.state())


def differences(one: Played, other: Played) -> list[str]:
    """Names of what is not the same bit for bit."""
    return [
        *_unlike("metric", one.metrics, other.metrics, _text),
        *_unlike("sent", one.payload, other.payload, _bits_of_tensor),
        *_unlike("state", one.state.facts, other.state.facts, _text),
        *_unlike("state", one.state.arrays, other.state.arrays, _bits_of_array),
    ]


def _unlike(
    what: str, one: Mapping[str, Any], other: Mapping[str, Any], bits: Callable[[Any], Any]
) -> list[str]:
    return [
        f"{what} {name}"
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or bits(one[name]) != bits(other[name])
    ]


def _bits_of_array(array: NDArray[Any]) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def _text(fact: Any) -> str:
    return json.dumps(float(fact) if isinstance(fact, Tensor) else fact, default=repr)


def _bits_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    dense = tensor.to_dense().cpu().contiguous()
    return tensor.dtype, tuple(tensor.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
