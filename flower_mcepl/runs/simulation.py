"""Simulation in one process, without Flower: the oracle for what runs under it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent, agent_file, save_state
from flower_mcepl.agents.agent import best_file
from flower_mcepl.agents.handshake import check_common_ground, introduction
from flower_mcepl.agents.parts.pacing import Decisions, StepSeconds, set_pace
from flower_mcepl.agents.server import Server
from flower_mcepl.agents.stacking import check_stack, stacks_of
from flower_mcepl.config.checks import check
from flower_mcepl.config.engines import BATCHED, LOOP, check_engine
from flower_mcepl.errors import ConfigError, RecordError, TopologyError
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.exchange.turn import Reply, open_mail, play_round, play_together
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.book import RunBook, check_selection, open_book
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.store import StateStore
from flower_mcepl.streams import torch_threads
from flower_mcepl.terminal import any_encoding
from flower_mcepl.topology import Topology

SERVER_FILE = "server.safetensors"


@dataclass(frozen=True)
class SimulationResult:
    """What came of a simulation."""

    rows: list[dict[str, Any]]  # one per agent and evaluated round, as in the run record
    summary: dict[str, Any]  # as in summary.json

    @property
    def result(self) -> float:
        """Mean main metric over the agents, on their own splits, after the last round.

        Not a number where no agent was evaluated.
        """
        mean = self.summary["result"]["mean"]
        return math.nan if mean is None else float(mean)

    @property
    def personalized_accuracy(self) -> float:
        """Mean accuracy over the agents, on their own splits, after the last round.

        Of the last evaluated round; not a number where no agent told one.
        """
        mean = self.summary["accuracy"]["mean"]
        return math.nan if mean is None else float(mean)


def simulate(
    agents: Sequence[Agent],
    topology: Topology | None = None,
    *,
    server: Server | None = None,
    num_rounds: int,
    evaluate_every: int = 10,
    max_staleness: int = 5,
    key_interval: int = 0,
    keep_best: bool = False,
    patience: int = 0,
    threads: int = 1,
    engine: str = LOOP,
    tell_classes: bool = True,
    record: RunRecord | None = None,
    checkpoint_every: int = 0,
    resume: str | Path | None = None,
    decisions: Decisions | None = None,
    step_seconds: StepSeconds | None = None,
    log: Callable[[str], None] = lambda line: None,
    on_reply: Callable[[int, int, Reply], None] = lambda round, agent, reply: None,
) -> SimulationResult:
    """Run agents over a topology, or around a server, in one process.

    The same seeds give the same masks, bit for bit, as under ``flwr run`` (with the
    same number of threads, on the same processor and torch version).

    Parameters
    ----------
    agents : sequence of Agent
        Agent i stands at place i.
    topology : Topology, optional
        The communication graph over them.
    server : Server, optional
        The server of a server-based algorithm, in place of a graph.
    num_rounds : int
        Number of training rounds; a closing exchange follows.
    evaluate_every, max_staleness, key_interval : int (default: 10, 5, 0)
        As in `GossipStrategy`; a server needs no ``key_interval``.
    keep_best : bool (default: False)
        Keep each agent's best state by the main metric in the record, too; the agents
        must be evaluated on their validation splits.
    patience : int (default: 0)
        Stop when the mean over the agents of the main metric has not become better for
        so many evaluations in succession, on their validation splits; 0: never.
    threads : int (default: 1)
        Threads of torch; float sums depend on it. 0 leaves torch's own choice.
    engine : str (default: "loop")
        "loop": one agent after the other, to the bits of ``flwr run``; "batched": equal
        agents of MCE-PL and its variants as stacks, their networks, masks and steps at
        once (`torch.vmap`), a class of arithmetic of its own: floats are summed in
        another order. What cannot be stacked is refused before the first round.
    tell_classes : bool (default: True)
        Let the record say which classes each agent holds, and how many examples of
        each.
    record : RunRecord, optional
        Where to write the run record, final states of agents and server included.
    checkpoint_every : int (default: 0)
        Rounds between checkpoints in the record, agents' states included; 0 writes
        none.
    resume : str or Path, optional
        The record of a simulation that broke off, in place of ``record``: go on from
        its last checkpoint, with agents, graph and settings as they were made for it.
    decisions : mapping, optional
        Share of filters by agent, by round, as `Run.decisions` of a record: agents with
        ``filters = "auto"`` take these, and so give that run's bits again.
    step_seconds : callable, optional
        ``step_seconds(agent, round, share)``: what a local step takes in place of
        measured times, for the same agents; of round 0 before the first.
    log : callable, optional
        Gets one line a round, for example ``print``.
    on_reply : callable, optional
        Gets ``(round, agent, reply)`` of every agent and round.

    Raises
    ------
    ConfigError, TopologyError, FingerprintError
        If agents, graph or server, and weights do not fit together, or not with the run
        that is resumed.
    DataError
        If an agent's data do not fit its task.
    RecordError
        If the record cannot be written, or its run not be resumed.
    """
    if checkpoint_every and record is None and resume is None:
        raise ConfigError(
            f"checkpoints are part of a run record; got checkpoint_every {checkpoint_every} "
            "without one."
        )
    if keep_best and record is None and resume is None:
        raise ConfigError("best states are part of a run record; got keep_best without one.")
    check(patience >= 0, "patience must be >= 0 evaluations (0: off)", patience)
    if record is not None and resume is not None:
        raise ConfigError(
            "a resumed run goes on in its own record; got another one, too. Leave out record."
        )
    check_engine(engine)
    exchange = _exchange(topology, server, evaluate_every, max_staleness, key_interval)
    _check_fleet(agents, exchange.topology, num_rounds)
    _check_server(agents[0], server)
    set_pace(agents, decisions=decisions, step_seconds=step_seconds)
    if keep_best or patience:
        check_selection(agent.describe() for agent in agents)
    fleet = _Fleet(agents, engine, max_staleness=max_staleness, keep_best=keep_best)
    with torch_threads(threads):  # a second thread of the process is refused here already
        if resume is None:
            fleet.check()
    config = {
        "seed": agents[0].seed,
        "threads": threads,
        "engine": engine,
        **({} if server is None else {"server": {"number": server.index, **server.parameters()}}),
    }
    with open_book(
        exchange,
        config,
        num_rounds=num_rounds,
        record=None if record is None else lambda _: record,
        resume=None if resume is None else Path(resume),
        checkpoint_every=checkpoint_every,
        keep_best=keep_best,
        patience=patience,
        log=any_encoding(log),
    ) as book:
        if book.resumed is not None:
            fleet.go_back(book)

        def play(round: int, *, closing: bool = False) -> None:
            parcels = [exchange.parcel(i, round=round, closing=closing) for i in fleet.indices]
            answers = {}
            for agent, reply in fleet.play(parcels):
                on_reply(round, agent.index, reply)
                facts = introduction(agent, tell_classes=tell_classes)
                answers[agent.index] = reply.answer(facts, bytes)
            book.close_round(round, answers)

        with torch_threads(threads):
            for round in book.rounds():
                play(round)
                if book.due(round):
                    fleet.store(book, round)  # first, so that no exchange's side lacks the other
                    book.keep(round)
            play(book.monitor.num_rounds + 1, closing=True)
        if book.record is not None:
            fleet.save(book.record.agents_dir, server)
    return SimulationResult(book.monitor.rows, book.summary)


class _Fleet:
    """All agents, each with its mail, and their side of checkpoints."""

    def __init__(
        self, agents: Sequence[Agent], engine: str, *, max_staleness: int, keep_best: bool
    ) -> None:
        self._agents = agents
        self._stacks = stacks_of(agents) if engine == BATCHED else []
        # frames of no run: equal seeds give equal bytes
        self._mails = [
            open_mail(agent, max_staleness=max_staleness, keeper=BestState() if keep_best else None)
            for agent in agents
        ]
        self.indices = [agent.index for agent in agents]

    def check(self) -> None:
        """Check what each is to learn from, and the stacks against each alone."""
        for agent in self._agents:
            agent.check()
        for stack in self._stacks:
            check_stack(stack)

    def play(self, parcels: Sequence[Parcel[bytes]]) -> Iterator[tuple[Agent, Reply]]:
        """Let all agents answer: one after the other, or stack by stack."""
        if not self._stacks:
            for agent, mail, parcel in zip(self._agents, self._mails, parcels, strict=True):
                yield agent, play_round(agent, mail, parcel)
        for stack in self._stacks:
            places = [agent.index for agent in stack.agents]
            mails = [self._mails[i] for i in places]
            replies = play_together(stack, mails, [parcels[i] for i in places])
            yield from zip(stack.agents, replies, strict=True)

    def store(self, book: RunBook[bytes], round: int) -> None:
        """Write the agents' states after ``round`` into the record."""
        for agent, mail in zip(self._agents, self._mails, strict=True):
            _states(book).save(Generation.of(agent, mail, run=book.run, round=round))

    def go_back(self, book: RunBook[bytes]) -> None:
        """Let the agents go on from the checkpoint that the run is resumed from."""
        last = book.first - 1
        for agent, mail in zip(self._agents, self._mails, strict=True):
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
        for agent, mail in zip(self._agents, self._mails, strict=True):
            save_state(agent.state(), folder / agent_file(agent.index))
            if mail.keeper is not None and mail.keeper.state is not None:
                save_state(mail.keeper.state, folder / best_file(agent.index))
        if server is not None:
            save_state(server.state(), folder / SERVER_FILE)


def _states(book: RunBook[bytes]) -> StateStore:
    assert book.record is not None
    return StateStore(book.record.agents_dir)


def _exchange(
    topology: Topology | None,
    server: Server | None,
    evaluate_every: int,
    max_staleness: int,
    key_interval: int,
) -> Exchange[bytes]:
    if server is not None and topology is None:
        return Center[bytes](
            server,
            open_frame=bytes,
            wrap_frame=bytes,
            evaluate_every=evaluate_every,
            max_staleness=max_staleness,
        )
    if topology is None or server is not None:
        raise ConfigError(
            "agents exchange over a graph or through a server; got "
            f"{'both' if server else 'neither'}. Pass topology, or server for a server-based "
            "algorithm."
        )
    return Relay[bytes](
        topology,
        evaluate_every=evaluate_every,
        max_staleness=max_staleness,
        key_interval=key_interval,
    )


def _check_server(agent: Agent, server: Server | None) -> None:
    if agent.server_based and server is None:
        raise ConfigError(
            f"agents of algorithm {agent.algorithm} hear a server, not each other; got a graph. "
            "Pass server=make_server(...) in place of it."
        )
    if server is not None:
        check_common_ground(
            f"agent {agent.index}", agent.describe(), "the server", server.describe()
        )


def _check_fleet(agents: Sequence[Agent], topology: Topology, num_rounds: int) -> None:
    if num_rounds < 1:
        raise ConfigError(f"num_rounds must be >= 1; got {num_rounds}.")
    indices = [agent.index for agent in agents]
    if indices != list(range(topology.num_agents)):
        raise TopologyError(
            f"the graph has agents 0..{topology.num_agents - 1}, in this order; got agents "
            f"{indices}. Pass one agent per place, or a graph of their number."
        )
    first = agents[0].describe()
    for agent in agents[1:]:
        check_common_ground(f"agent {agent.index}", agent.describe(), "agent 0", first)
