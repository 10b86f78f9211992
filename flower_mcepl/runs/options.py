"""Options of a run's rounds, for both strategies and the run config."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import FREE
from flower_mcepl.config.schedules import ROUNDS
from flower_mcepl.exchange.exchange import check_rounds
from flower_mcepl.runs.schedules import check_schedule


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How the rounds of a run go, whatever the algorithm and the graph.

    Parameters
    ----------
    evaluate_every : int (default: 10)
        Evaluate the personal models after each such number of rounds, and after the
        last one.
    max_staleness : int (default: 5)
        Rounds for which an absent neighbor's last mask stays in use; with a server,
        rounds for which an agent that hears nothing goes on with its last model.
    key_interval : int (default: 0)
        Rounds after which an agent sends a whole frame beside its delta; 0: when the
        deltas since the last whole frame have as many bytes as that.
    age_decay : float (default: 1.0)
        λ in (0, 1]: a neighbor's vote counts ``λ^a``, a being the age of its last mask,
        in rounds of the agent that hears it; 1: all votes count alike.
    schedule : str (default: "rounds")
        "rounds": all agents play each round together; "async": whoever answers gets its
        next parcel at once, with its neighbors' newest masks, and so many rounds are
        its own ones.
    time_budget : float (default: 0.0)
        Seconds after which no agent begins a round of its own, with schedule "async";
        0: none.
    min_agents : int (default: 0)
        Agents that must take part in every round, or the run ends; 0: all of the graph
        in round 1, as many as took part last in the first round after a resumption, and
        more than half of the graph in any round.
    wait_timeout : float (default: 120.0)
        Seconds to wait in a round for these agents' nodes.
    timeout_factor : float (default: 5.0)
        A round goes on without its last agents after so many times the time that a
        typical agent took of late, but not before a minute; 0 always waits for the
        round's timeout. Late answers count when they come.
    keep_best : bool (default: False)
        Keep each agent's best state by the main metric beside its last one; the agents
        must be evaluated on their validation splits.
    patience : int (default: 0)
        Stop when the mean over the agents of the main metric has not become better for
        so many evaluations in succession, on their validation splits; 0: never.
    agents_per_node : int (default: 1)
        Agents that one node plays: that with partition-id p has ``p * k`` to ``p * k +
        k - 1``. One message carries what all of them get.
    keep_frames : bool (default: False)
        Keep every frame in the run record, for study.
    checkpoint_every : int (default: 25)
        Rounds between checkpoints in the run record, from which a run that broke off is
        resumed; 0 writes none. Without a barrier rounds of the mean agent.
    agents : str (default: "")
        File of lines with an agent's number and the public key of its SuperNode: no
        other node is let in as that agent, and no other agent at all. Without it a
        number belongs to the node that is the first to bear it, for the whole run.
    takeover : bool (default: False)
        Let another node be an agent whose node is not online: for SuperNodes without a
        key file, which come back as another node. Anybody in the fleet could then pose
        as a device that is offline.
    resume : str or Path, optional
        The run record of a run that broke off: go on from its last checkpoint, in the
        same record.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    evaluate_every: int = 10
    max_staleness: int = 5
    key_interval: int = 0
    age_decay: float = 1.0
    schedule: str = ROUNDS
    time_budget: float = 0.0
    min_agents: int = field(default=0, metadata=FREE)
    wait_timeout: float = field(default=120.0, metadata=FREE)
    timeout_factor: float = field(default=5.0, metadata=FREE)
    keep_best: bool = False
    patience: int = 0
    agents_per_node: int = field(default=1, metadata=FREE)
    keep_frames: bool = field(default=False, metadata=FREE)
    checkpoint_every: int = field(default=25, metadata=FREE)
    agents: str = field(default="", metadata=FREE)
    takeover: bool = field(default=False, metadata=FREE)
    resume: str | Path | None = field(default=None, metadata=FREE)

    def __post_init__(self) -> None:
        check_rounds(
            evaluate_every=self.evaluate_every,
            max_staleness=self.max_staleness,
            key_interval=self.key_interval,
            age_decay=self.age_decay,
        )
        check(self.min_agents >= 0, "min-agents must be >= 0 (0: all)", self.min_agents)
        check(self.wait_timeout > 0, "wait-timeout must be > 0 seconds", self.wait_timeout)
        check(self.timeout_factor >= 0, "timeout-factor must be >= 0 (0: off)", self.timeout_factor)
        check(self.agents_per_node >= 1, "agents-per-node must be >= 1", self.agents_per_node)
        check(self.patience >= 0, "patience must be >= 0 evaluations (0: off)", self.patience)
        check(
            self.checkpoint_every >= 0,
            "checkpoint-every is a number of rounds, or 0 for no checkpoints; it must be >= 0",
            self.checkpoint_every,
        )
        check_schedule(
            self.schedule,
            time_budget=self.time_budget,
            patience=self.patience,
            agents_per_node=self.agents_per_node,
        )


class RoundKeywords(TypedDict, total=False):
    """Fields of `RoundOptions` as keyword arguments."""

    evaluate_every: int
    max_staleness: int
    key_interval: int
    age_decay: float
    schedule: str
    time_budget: float
    min_agents: int
    wait_timeout: float
    timeout_factor: float
    keep_best: bool
    patience: int
    agents_per_node: int
    keep_frames: bool
    checkpoint_every: int
    agents: str
    takeover: bool
    resume: str | Path | None


def check_nodes(num_agents: int, agents_per_node: int) -> None:
    """Raise ConfigError unless agents divide evenly over nodes of so many."""
    check(
        agents_per_node >= 1 and num_agents % agents_per_node == 0,
        f"the graph's {num_agents} agents must divide evenly over nodes of agents-per-node",
        agents_per_node,
    )
