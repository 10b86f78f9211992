"""The fleet of a simulation: all agents, each with its mail, in one process."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from flower_mcepl.agents import Agent, agent_file, save_state
from flower_mcepl.agents.agent import best_file
from flower_mcepl.agents.handshake import introduction
from flower_mcepl.agents.server import Server
from flower_mcepl.agents.stack import AgentStack
from flower_mcepl.agents.stacking import check_stack, stacks_of
from flower_mcepl.config.engines import BATCHED
from flower_mcepl.errors import RecordError
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.exchange.turn import Reply, alike, open_mail, play_round, play_together
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.book import RunBook
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.store import StateStore

SERVER_FILE = "server.safetensors"
OnReply = Callable[[int, int, Reply], None]
"""Gets ``(round, agent, reply)`` of every agent and round."""


@final
class Fleet:
    """All agents, each with its mail, and their side of checkpoints.

    Parameters
    ----------
    agents : sequence of Agent
        Agent i at place i.
    engine : str
        Which one calculates, "loop" or "batched".
    max_staleness, age_decay : int, float
        As in `open_mail`.
    keep_best, tell_classes : bool
        As in `simulate`.
    on_reply : callable
        Gets every reply.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        *,
        engine: str,
        max_staleness: int,
        age_decay: float,
        keep_best: bool,
        tell_classes: bool,
        on_reply: OnReply,
    ) -> None:
        self.agents = agents
        self._stacks = stacks_of(agents) if engine == BATCHED else []
        self._tell_classes, self._on_reply = tell_classes, on_reply
        # frames of no run: equal seeds give equal bytes
        self._mails = [
            open_mail(
                agent,
                max_staleness=max_staleness,
                age_decay=age_decay,
                keeper=BestState() if keep_best else None,
            )
            for agent in agents
        ]

    def play(
        self, numbers: Iterable[int], parcels: Iterable[Parcel[bytes]]
    ) -> dict[int, Answer[bytes]]:
        """Let agents answer their parcels: one after the other, or stack by stack."""
        orders = dict(zip(numbers, parcels, strict=True))
        answers = {}
        for number, reply in self._replies(orders):
            self._on_reply(orders[number].round, number, reply)
            answers[number] = reply.answer(self._introduction(self.agents[number]), bytes)
        return answers

    def introductions(self) -> Iterator[dict[str, Any]]:
        """What the agents say of themselves."""
        return map(self._introduction, self.agents)

    def _introduction(self, agent: Agent) -> dict[str, Any]:
        return introduction(agent, tell_classes=self._tell_classes)

    def check(self) -> None:
        """Check what each is to learn from, and the stacks against each alone."""
        for agent in self.agents:
            agent.check()
        for stack in self._stacks:
            check_stack(stack)

    def _replies(self, parcels: Mapping[int, Parcel[bytes]]) -> Iterator[tuple[int, Reply]]:
        if not self._stacks:
            for number, parcel in parcels.items():
                yield number, play_round(self.agents[number], self._mails[number], parcel)
        for stack in self._stacks:
            agents = {agent.index: agent for agent in stack.agents if agent.index in parcels}
            for numbers in alike({number: parcels[number] for number in agents}):
                part = AgentStack([agents[number] for number in numbers])
                mails = [self._mails[number] for number in numbers]
                replies = play_together(part, mails, [parcels[number] for number in numbers])
                yield from zip(numbers, replies, strict=True)

    def store(self, book: RunBook[bytes], round: int) -> None:
        """Write the agents' states after ``round`` into the record."""
        for agent, mail in zip(self.agents, self._mails, strict=True):
            _states(book).save(Generation.of(agent, mail, run=book.run, round=round))

    def go_back(self, book: RunBook[bytes]) -> None:
        """Let the agents go on from the checkpoint that the run is resumed from."""
        last = book.first - 1
        for agent, mail in zip(self.agents, self._mails, strict=True):
            stored = _states(book).load(agent.index, run=book.run, before=book.first)
            if stored is None or stored.round != last:
                raise RecordError(
                    f"{_states(book).folder} must hold the state of every agent after round "
                    f"{last}, and that of agent {agent.index} is missing. Put it back, or start "
                    "the run anew."
                )
            stored.restore(agent, mail)

    def save(self, folder: Path, server: Server | None) -> None:
        """Write the final and the best states, each as one safetensors file."""
        for agent, mail in zip(self.agents, self._mails, strict=True):
            save_state(agent.state(), folder / agent_file(agent.index))
            if mail.keeper is not None and mail.keeper.state is not None:
                save_state(mail.keeper.state, folder / best_file(agent.index))
        if server is not None:
            save_state(server.state(), folder / SERVER_FILE)


def _states(book: RunBook[bytes]) -> StateStore:
    assert book.record is not None
    return StateStore(book.record.agents_dir)
