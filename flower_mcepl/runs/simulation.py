"""Agents over a graph in one process, without Flower: the oracle for everything that runs under it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent, agent_file, save_state
from flower_mcepl.agents.server import Server
from flower_mcepl.errors import ConfigError, RecordError, TopologyError
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, Posted
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.exchange.turn import Mail, Reply, open_mail, play_round
from flower_mcepl.messages.handshake import check_common_ground, introduction
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.checkpoint import Checkpoint
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.runs.resumption import (
    RUN,
    RunCheckpoints,
    new_run_id,
    only_writer,
    reopen,
    run_id_of,
)
from flower_mcepl.runs.store import StateStore
from flower_mcepl.streams import torch_threads
from flower_mcepl.topology import Topology

SERVER_FILE = "server.safetensors"


@dataclass(frozen=True)
class SimulationResult:
    """What came of a simulation."""

    rows: list[dict[str, Any]]  # one per agent and evaluated round, as in the run record
    summary: dict[str, Any]  # as in summary.json

    @property
    def personalized_accuracy(self) -> float:
        """Mean accuracy over the agents on their own evaluated splits after the last round."""
        return float(self.summary["accuracy"]["mean"])


def simulate(
    agents: Sequence[Agent],
    topology: Topology | None = None,
    *,
    server: Server | None = None,
    num_rounds: int,
    evaluate_every: int = 10,
    max_staleness: int = 5,
    key_interval: int = 0,
    threads: int = 1,
    tell_classes: bool = True,
    record: RunRecord | None = None,
    checkpoint_every: int = 0,
    resume: str | Path | None = None,
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
    threads : int (default: 1)
        Threads of torch; float sums depend on it. 0 leaves torch's own choice.
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
    log : callable, optional
        Gets one line a round, for example ``print``.
    on_reply : callable, optional
        Gets ``(round, agent, reply)`` of every agent and round.

    Raises
    ------
    ConfigError, TopologyError, FingerprintError
        If agents, graph or server, and weights do not fit together, or not with the run
        that is resumed.
    RecordError
        If the record cannot be written, or its run not be resumed.
    """
    relay = _exchange(topology, server, evaluate_every, max_staleness, key_interval)
    _check_fleet(agents, relay.topology, num_rounds)
    _check_server(agents[0], server)
    monitor = RunMonitor(relay, num_rounds, record, log)
    fleet = _Fleet(agents, [open_mail(agent, max_staleness=max_staleness) for agent in agents])
    config = {
        "seed": agents[0].seed,
        "num_rounds": num_rounds,
        "evaluate_every": evaluate_every,
        "max_staleness": max_staleness,
        "key_interval": relay.key_interval,
        "threads": threads,
        "topology": relay.topology.to_config(),
        **({} if server is None else {"server": {"number": server.index, **server.parameters()}}),
    }
    status = "failed"
    with contextlib.ExitStack() as held:
        book = _open_book(monitor, fleet, record, resume, checkpoint_every, config, held)
        try:
            with torch_threads(threads):
                for round in range(book.first if book else 1, num_rounds + 2):
                    parcels = [
                        relay.parcel(agent.index, round=round, closing=round > num_rounds)
                        for agent in agents
                    ]
                    answers = {}
                    for agent, mail, parcel in zip(agents, fleet.mails, parcels, strict=True):
                        reply = play_round(agent, mail, parcel)
                        on_reply(round, agent.index, reply)
                        answers[agent.index] = _answer(
                            reply, introduction(agent, tell_classes=tell_classes)
                        )
                    monitor.close_round(round, answers)
                    if book is not None and round <= num_rounds:
                        book.keep(round)
                if book is not None:
                    save_agents(agents, book.record.agents_dir)
                    if server is not None:
                        save_state(server.state(), book.record.agents_dir / SERVER_FILE)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            summary = monitor.finish(status)
        if book is not None:
            book.checkpoints.clear()
    return SimulationResult(monitor.rows, summary)


@dataclass(frozen=True)
class _Fleet:
    agents: Sequence[Agent]
    mails: Sequence[Mail]


@dataclass(frozen=True)
class _Book:
    """The record of a simulation, with the checkpoints of its two sides: the relay, and the agents."""

    record: RunRecord
    fleet: _Fleet
    checkpoints: RunCheckpoints[bytes]
    run: str
    first: int  # the first round that is still to be played

    def keep(self, round: int) -> None:
        """Write a checkpoint if one is due; the agents first, so that no relay's side lacks the other one."""
        if self.checkpoints.due(round):
            for agent, mail in zip(self.fleet.agents, self.fleet.mails, strict=True):
                self._states().save(Generation.of(agent, mail, run=self.run, round=round))
            self.checkpoints.save(round)

    def go_back(self, checkpoint: Checkpoint) -> None:
        """Let both sides go on from a checkpoint."""
        self.checkpoints.restore(checkpoint)
        for agent, mail in zip(self.fleet.agents, self.fleet.mails, strict=True):
            found = self._states().load(agent.index, run=self.run, before=self.first)
            if found is None or found.round != checkpoint.round:
                raise RecordError(
                    f"{self.record.agents_dir} must hold the state of every agent after round "
                    f"{checkpoint.round}, and that of agent {agent.index} is missing. Put it "
                    "back, or start the run anew."
                )
            found.restore(agent, mail)

    def _states(self) -> StateStore:
        return StateStore(self.record.agents_dir)


def _open_book(
    monitor: RunMonitor[bytes],
    fleet: _Fleet,
    record: RunRecord | None,
    resume: str | Path | None,
    every: int,
    config: Mapping[str, Any],
    held: contextlib.ExitStack,
) -> _Book | None:
    """Begin the record of a new run, or go back to the checkpoint of the one that is resumed; hold it either way."""
    checkpoint = None
    if resume is not None:
        if record is not None:
            raise ConfigError(
                "a resumed run goes on in its own record; got another one, too. Leave out record."
            )
        record, checkpoint, _ = reopen(Path(resume).absolute(), config, held=held, log=monitor.log)
    elif record is not None:
        held.enter_context(only_writer(record.path))
        record.amend_config(**{RUN: new_run_id()}, **config)
    if record is None:
        if every:
            raise ConfigError(
                f"checkpoints are part of a run record; got checkpoint_every {every} without one."
            )
        return None
    monitor.record = record
    checkpoints = RunCheckpoints[bytes](
        record, monitor.relay, monitor, every=every, pack=bytes, unpack=bytes
    )
    book = _Book(
        record,
        fleet,
        checkpoints,
        run_id_of(record),
        first=1 if checkpoint is None else checkpoint.round + 1,
    )
    if checkpoint is not None:
        book.go_back(checkpoint)
    return book


def _answer(reply: Reply, facts: Mapping[str, Any]) -> Answer[bytes]:
    posts = [
        Posted(frame.data, len(frame.data), frame.header_bytes, frame.reference)
        for frame in reply.frames
    ]
    return Answer(
        facts,
        reply.metrics,
        posts,
        reply.frames[0].content if reply.frames else None,
        reply.held,
        reply.refused,
        reply.lacking,
        raw=[frame.data for frame in reply.frames],
    )


def save_agents(agents: Sequence[Agent], folder: Path) -> None:
    """Write each agent's state as ``agent-0003.safetensors``."""
    for agent in agents:
        save_state(agent.state(), folder / agent_file(agent.index))


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
