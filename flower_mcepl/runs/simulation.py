"""Simulation in one process, without Flower: the oracle for what runs under it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent
from flower_mcepl.agents.handshake import check_common_ground
from flower_mcepl.agents.parts.pacing import Decisions, StepSeconds
from flower_mcepl.agents.server import Server
from flower_mcepl.config.checks import check
from flower_mcepl.config.engines import LOOP, check_engine
from flower_mcepl.config.schedules import ASYNC, ROUNDS
from flower_mcepl.errors import ConfigError, TopologyError
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.record.layout import FRAMES
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.book import check_selection, open_book
from flower_mcepl.runs.fleet import Fleet, OnReply
from flower_mcepl.runs.options import check_nodes
from flower_mcepl.runs.playing import play_own_rounds, play_rounds
from flower_mcepl.runs.schedules import check_schedule, check_votes_of_server
from flower_mcepl.runs.speeds import Speeds
from flower_mcepl.runs.timing import Events, Timing
from flower_mcepl.streams import torch_threads
from flower_mcepl.terminal import any_encoding
from flower_mcepl.topology import Topology


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
    age_decay: float = 1.0,
    agents_per_node: int = 1,
    schedule: str = ROUNDS,
    time_budget: float = 0.0,
    speeds: str | Speeds = "",
    events: Events | None = None,
    timeout_factor: float = 0.0,
    round_timeout: float = math.inf,
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
    on_reply: OnReply = lambda round, agent, reply: None,
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
    age_decay : float (default: 1.0)
        As in `GossipStrategy`.
    agents_per_node : int (default: 1)
        Agents that one node would play under Flower, neighbors by number: what they
        hand to each other is over no link, and counted apart.
    schedule : str (default: "rounds")
        With "async" no agent waits for others: whoever answers gets its next parcel at
        once, with its neighbors' newest masks, up to ``num_rounds`` of its own.
    time_budget : float (default: 0.0)
        Virtual seconds after which no agent begins a round of its own, with schedule
        "async"; 0: none.
    speeds : str or Speeds (default: "")
        What a local step and a message take, such as ``"1, 1, 5; noise=0.2"``, see
        `runs.speeds`: the run then has a virtual clock, which the record tells. By
        rounds, the slowest agent is waited for.
    events : str, Path or sequence of Event, optional
        The record of a run of schedule "async": play its events again, which gives its
        bits.
    timeout_factor, round_timeout : float (default: 0.0, infinite)
        As in `RoundOptions`, on the virtual clock: who is late misses the round.
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
        none. With schedule "async" rounds of an agent in the mean.
    resume : str or Path, optional
        The record of a simulation that broke off, in place of ``record``: go on from
        its last checkpoint, with agents, graph and settings as they were made for it.
    decisions : mapping, optional
        Share of filters by agent, by round, as `Run.decisions` of a record: agents with
        ``filters = "auto"`` take these, and so give that run's bits again.
    step_seconds : callable, optional
        ``step_seconds(agent, round, share)``: what a local step takes in place of
        measured times, for the same agents; of round 0 before the first. With speeds,
        times the agent's own.
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
    timing = Timing(
        schedule=schedule,
        time_budget=time_budget,
        speeds=speeds,
        events=events,
        timeout_factor=timeout_factor,
        round_timeout=round_timeout,
    )
    _check_timing(
        timing,
        patience,
        checkpoint_every,
        agents_per_node=agents_per_node,
        resume=resume,
        server=server,
    )
    exchange = _exchange(
        topology,
        server,
        evaluate_every=evaluate_every,
        max_staleness=max_staleness,
        key_interval=key_interval,
        age_decay=age_decay,
        schedule=schedule,
        agents_per_node=agents_per_node,
    )
    _check_fleet(agents, exchange.topology, num_rounds)
    check_nodes(len(agents), agents_per_node)
    _check_server(agents[0], server)
    replayed = timing.checked_events(num_agents=len(agents), num_rounds=num_rounds)
    times = timing.times(agents, decisions=decisions, step_seconds=step_seconds)
    if keep_best or patience:
        check_selection(agent.describe() for agent in agents)
    fleet = Fleet(
        agents,
        engine=engine,
        max_staleness=max_staleness,
        age_decay=age_decay,
        keep_best=keep_best,
        tell_classes=tell_classes,
        on_reply=on_reply,
    )
    with torch_threads(threads):  # a second thread of the process is refused here already
        if resume is None:
            fleet.check()
    config = {
        "seed": agents[0].seed,
        "threads": threads,
        "engine": engine,
        **timing.config(replayed),
        **({} if server is None else {"server": {"number": server.index, **server.parameters()}}),
    }
    with open_book(
        exchange,
        config,
        num_rounds=num_rounds,
        record=None if record is None else lambda _: record,
        resume=None if resume is None else Path(resume),
        agents=fleet.introductions(),
        checkpoint_every=checkpoint_every,
        keep_best=keep_best,
        patience=patience,
        keep_frames=resume is not None and (Path(resume) / FRAMES).is_dir(),
        log=any_encoding(log),
    ) as book:
        if book.resumed is not None:
            fleet.go_back(book)
        with torch_threads(threads):
            if schedule == ASYNC:
                assert times is not None
                play_own_rounds(book, exchange, fleet, timing, times, replayed)
            else:
                play_rounds(book, exchange, fleet, timing, times)
        if book.record is not None:
            fleet.save(book.record.agents_dir, server)
    return SimulationResult(book.monitor.rows, book.summary)


def _check_timing(
    timing: Timing,
    patience: int,
    checkpoint_every: int,
    *,
    agents_per_node: int,
    resume: str | Path | None,
    server: Server | None,
) -> None:
    check_schedule(
        timing.schedule,
        time_budget=timing.time_budget,
        patience=patience,
        agents_per_node=agents_per_node,
        has_server=server is not None,
    )
    check(
        not timing.has_deadlines or (checkpoint_every == 0 and resume is None),
        "a simulation with deadlines writes no checkpoints: answers that are late would be lost; "
        "checkpoint_every must be 0, and resume None",
        (checkpoint_every, None if resume is None else str(resume)),
        "Leave them out, or timeout_factor and round_timeout.",
    )


def _exchange(
    topology: Topology | None,
    server: Server | None,
    *,
    evaluate_every: int,
    max_staleness: int,
    key_interval: int,
    age_decay: float,
    schedule: str,
    agents_per_node: int,
) -> Exchange[bytes]:
    if server is not None:
        check_votes_of_server(age_decay)
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
        age_decay=age_decay,
        schedule=schedule,
        agents_per_node=agents_per_node,
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
