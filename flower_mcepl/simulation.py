"""Agents over a graph in one process, without Flower: the oracle for everything that runs under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent, agent_file, save_state
from flower_mcepl.errors import ConfigError, TopologyError
from flower_mcepl.handshake import check_common_ground
from flower_mcepl.monitor import Answer, RunMonitor, frame_digest
from flower_mcepl.record import RunRecord
from flower_mcepl.relay import Parcel, Relay
from flower_mcepl.rounds import Reply, open_mailbox, play_round
from flower_mcepl.threads import torch_threads
from flower_mcepl.topology import Topology


@dataclass(frozen=True)
class SimulationResult:
    """What came of a simulation."""

    rows: list[dict[str, Any]]  # one per agent and evaluated round, as in the run record
    summary: dict[str, Any]  # as in summary.json

    @property
    def personalized_accuracy(self) -> float:
        """Mean accuracy over the agents on their own test splits after the last round."""
        return float(self.summary["accuracy"]["mean"])


def simulate(
    agents: Sequence[Agent],
    topology: Topology,
    *,
    num_rounds: int,
    evaluate_every: int = 10,
    max_staleness: int = 5,
    threads: int = 1,
    record: RunRecord | None = None,
    log: Callable[[str], None] = lambda line: None,
    on_reply: Callable[[int, int, Reply], None] = lambda round, agent, reply: None,
) -> SimulationResult:
    """Run agents over a topology in one process.

    The same seeds give the same masks, bit for bit, as under ``flwr run`` (with the same number of threads, on
    the same processor and torch version).

    Parameters
    ----------
    agents : sequence of Agent
        Agent i stands at place i.
    topology : Topology
        The communication graph over them.
    num_rounds : int
        Number of training rounds; a closing exchange follows.
    evaluate_every, max_staleness : int (default: 10, 5)
        As in `GossipStrategy`.
    threads : int (default: 1)
        Threads of torch; float sums depend on it. 0 leaves torch's own choice.
    record : RunRecord, optional
        Where to write the run record, agents' final states included.
    log : callable, optional
        Gets one line a round, for example ``print``.
    on_reply : callable, optional
        Gets ``(round, agent, reply)`` of every agent and round.

    Raises
    ------
    ConfigError, TopologyError, FingerprintError
        If agents, graph and weights do not fit together.
    """
    _check_fleet(agents, topology, num_rounds)
    relay = Relay[bytes](topology, evaluate_every=evaluate_every, max_staleness=max_staleness)
    monitor = RunMonitor(relay, num_rounds, record, log)
    mailboxes = [open_mailbox(agent, max_staleness=max_staleness) for agent in agents]
    if record is not None:
        record.amend_config(
            seed=agents[0].seed,
            num_rounds=num_rounds,
            evaluate_every=evaluate_every,
            max_staleness=max_staleness,
            threads=threads,
            topology=topology.to_config(),
        )
    status = "failed"
    try:
        with torch_threads(threads):
            for round in range(1, num_rounds + 2):
                parcels = [relay.parcel(agent.index, round=round, closing=round > num_rounds) for agent in agents]
                answers = {}
                for agent, mailbox, parcel in zip(agents, mailboxes, parcels, strict=True):
                    answers[agent.index] = _answer(agent, play_round(agent, mailbox, parcel), parcel, on_reply)
                monitor.close_round(round, answers)
            if record is not None:
                save_agents(agents, record.agents_dir)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        summary = monitor.finish(status)
    return SimulationResult(monitor.rows, summary)


def _answer(
    agent: Agent, reply: Reply, parcel: Parcel[bytes], on_reply: Callable[[int, int, Reply], None]
) -> Answer[bytes]:
    on_reply(parcel.round, agent.index, reply)
    frame = reply.frame
    digest = None if frame is None else frame_digest(frame)
    facts = {**agent.describe(), "parameters": agent.parameters()}
    return Answer(facts, reply.metrics, frame, len(frame or b""), digest, reply.refused)


def save_agents(agents: Sequence[Agent], folder: Path) -> None:
    """Write each agent's state as ``agent-0003.safetensors``."""
    for agent in agents:
        save_state(agent.state(), folder / agent_file(agent.index))


def _check_fleet(agents: Sequence[Agent], topology: Topology, num_rounds: int) -> None:
    if num_rounds < 1:
        raise ConfigError(f"num_rounds must be >= 1; got {num_rounds}.")
    indices = [agent.index for agent in agents]
    if indices != list(range(topology.num_agents)):
        raise TopologyError(
            f"the graph has agents 0..{topology.num_agents - 1}, in this order; got agents {indices}. "
            "Pass one agent per place, or a graph of their number."
        )
    first = agents[0].describe()
    for agent in agents[1:]:
        check_common_ground(f"agent {agent.index}", agent.describe(), "agent 0", first)
