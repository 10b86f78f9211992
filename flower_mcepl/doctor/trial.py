"""Trial of a few rounds of one agent alone: time of a local step, size of frames."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from flower_mcepl.agents import Agent
from flower_mcepl.agents.parts.local_steps import local_steps
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.turn import Mail, evaluate, open_mail
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.options import RoundOptions

TIMED_ROUNDS = 3  # after one that warms up
_LONGEST = 30.0  # seconds of training, after which no further round is begun
_SEAL = 26  # bytes of a stored state before its body, see `flower_mcepl.files.sealed`


@dataclass(frozen=True)
class Trial:
    """Cost of a few rounds of one agent; neighbors' masks are the common first ones."""

    seconds: list[float]  # of training in each timed round
    steps: int | None  # local steps in a round, None where the app's own function takes them
    whole_bytes: int  # the first frame; 0: the algorithm sends nothing
    delta_bytes: list[int]  # the later ones, each building on the one before
    own_state_bytes: int  # the largest stored state, without what neighbors sent
    # the most that it holds of each neighbor, if that sends the same as this agent
    neighbor_state_bytes: int
    evaluation: dict[str, float]  # metrics of one evaluation; empty where there is none
    evaluation_error: str  # why there is none

    @property
    def rounds(self) -> int:
        """Number of rounds that were played."""
        return 1 + len(self.delta_bytes)

    @property
    def train_seconds(self) -> float:
        """Median training time of a round."""
        return statistics.median(self.seconds)

    @property
    def later_bytes(self) -> int:
        """Median size of a frame that builds on the one before."""
        return round(statistics.median(self.delta_bytes))

    def state_bytes(self, neighbors: int) -> int:
        """Size of the largest stored state of an agent with so many neighbors."""
        return self.own_state_bytes + neighbors * self.neighbor_state_bytes


@dataclass
class _Seen:
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of frames
    states: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # by a neighbor


def try_rounds(agent: Agent, neighbors: Sequence[int], options: RoundOptions) -> Trial:
    """Let the agent train for some rounds, alone as nobody else answers, and evaluate.

    The first round warms up and gives the whole frame; at most three more follow, fewer
    where training is slow. The agent could go on with the round after them.
    """
    max_staleness = options.max_staleness
    keeper = BestState() if options.keep_best else None
    mail = open_mail(agent, max_staleness=max_staleness, age_decay=options.age_decay, keeper=keeper)
    neighbor = _neighbor_of(agent, max_staleness)
    seen = _Seen()
    for number in range(1, TIMED_ROUNDS + 2):
        _play(agent, mail, neighbor, neighbors, number, seen)
        if number >= 2 and sum(seen.seconds) > _LONGEST:
            break
    evaluation, evaluation_error = evaluate(agent)
    return Trial(
        seconds=seen.seconds[1:],
        steps=local_steps(agent),
        whole_bytes=seen.sizes[0],
        delta_bytes=seen.sizes[1:],
        own_state_bytes=max(seen.states),
        neighbor_state_bytes=max(seen.held),
        evaluation=evaluation,
        evaluation_error=evaluation_error,
    )


def _play(
    agent: Agent, mail: Mail, neighbor: Mailbox, neighbors: Sequence[int], number: int, seen: _Seen
) -> None:
    if number > 1:
        agent.fuse(mail.inbox.current(neighbors, round=number - 1), round=number - 1)
    began = time.perf_counter()
    agent.train(round=number)
    if torch.device(getattr(agent, "device", "cpu")).type == "cuda":
        torch.cuda.synchronize()
    seen.seconds.append(time.perf_counter() - began)
    payload = agent.outgoing()
    frames = (
        mail.outbox.write(payload, round=number, acknowledged=number - 1 or None) if payload else []
    )
    if frames:
        agent.sent(frames[0].decoded)
    neighbor.put(agent.index, [frame.data for frame in frames], latest_round=number)
    seen.sizes.append(sum(len(frame.data) for frame in frames))
    if mail.keeper is not None:
        mail.keeper.state = agent.state()  # as large as the best one will be
    seen.states.append(len(Generation.of(agent, mail, run="0" * 16, round=number).encode()) + _SEAL)
    seen.held.append(sum(array.nbytes for array in neighbor.arrays().values()))


def _neighbor_of(agent: Agent, max_staleness: int) -> Mailbox:
    """Return the mailbox of one who hears this agent."""
    return Mailbox(
        owner=agent.index + 1,
        fingerprint=agent.fingerprint,
        layers=agent.layers,
        max_staleness=max_staleness,
        dtype=None,
        prior=agent.prior,
        first=agent.first_payload(),
        lists=agent.layers_by_depth,
        float_types=agent.float_types,
    )
