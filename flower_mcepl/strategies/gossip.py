"""The relay as a Flower strategy: every agent gets the frames of its own graph neighbors and nothing else."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from flwr.app import Array

from flower_mcepl.agents.registry import find_algorithm
from flower_mcepl.errors import ConfigError
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies.rounds import ExchangeStrategy, common_settings
from flower_mcepl.topology import Topology


@final
class GossipStrategy(ExchangeStrategy):
    """Decentralized learning without a global model: relay each agent's frame to its graph neighbors only.

    One message per agent and round: the train message of a round carries the neighbors'
    frames of the round before; the answer carries the agent's own. A closing message
    after the last round fuses and evaluates. The strategy never opens a frame, and
    aggregates nothing.

    Parameters
    ----------
    topology : Topology
        The communication graph; agent i is the node whose node config says
        ``partition-id = i``.
    evaluate_every : int (default: 10)
        Evaluate the personal models after each such number of rounds, and after the
        last one.
    max_staleness : int (default: 5)
        For how many rounds an absent neighbor's last mask stays in use.
    key_interval : int (default: 0)
        Rounds after which an agent sends a whole frame beside its delta; 0: when the
        deltas since the last whole frame have as many bytes as that.
    min_agents : int (default: 0)
        Agents that must take part in round 1, and in the first round after a
        resumption; 0 stands for all of the graph, and after a resumption for as many as
        took part last. Other rounds go on with those who answer.
    wait_timeout : float (default: 120.0)
        Seconds to wait for these agents' nodes, and in any other round in which no node
        is online for the first one.
    timeout_factor : float (default: 5.0)
        A round goes on without its last agents after so many times the time that most
        answers took of late, but not before a minute; 0 always waits for the timeout
        that `start` is given. Late answers count when they come.
    record : str, optional (default: "runs")
        Folder in which the run record is made; None writes none.
    name : str (default: "gossip")
        Name of the run, part of the record's folder.
    keep_frames : bool (default: False)
        Keep every frame in the run record, for study.
    checkpoint_every : int (default: 25)
        Rounds between checkpoints in the run record, from which a run that broke off is
        resumed; 0 writes none.
    resume : str, optional
        The run record of a run that broke off: go on from its last checkpoint, in the
        same record.
    config : mapping, optional
        What else is needed to repeat the run, such as ``dict(context.run_config)``;
        goes into the record.

    Examples
    --------
    >>> strategy = GossipStrategy(topology=Topology.ring(10))
    >>> strategy.start(grid=grid, num_rounds=100)  # doctest: +SKIP
    """

    def __init__(
        self,
        topology: Topology,
        *,
        evaluate_every: int = 10,
        max_staleness: int = 5,
        key_interval: int = 0,
        min_agents: int = 0,
        wait_timeout: float = 120.0,
        timeout_factor: float = 5.0,
        record: str | Path | None = "runs",
        name: str = "gossip",
        keep_frames: bool = False,
        checkpoint_every: int = 25,
        resume: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(topology, Topology):
            raise ConfigError(
                "topology must be a Topology, such as Topology.ring(10); got "
                f"{type(topology).__name__}."
            )
        super().__init__(
            Relay[Array](
                topology,
                evaluate_every=evaluate_every,
                max_staleness=max_staleness,
                key_interval=key_interval,
            ),
            min_agents=min_agents,
            wait_timeout=wait_timeout,
            timeout_factor=timeout_factor,
            record=record,
            name=name,
            keep_frames=keep_frames,
            checkpoint_every=checkpoint_every,
            resume=resume,
            config=config,
        )

    @classmethod
    def from_run_config(
        cls, run_config: Mapping[str, Any], *, app_keys: Iterable[str] = (), name: str = "gossip"
    ) -> "GossipStrategy":
        """Build the strategy from Flower's run config, which is checked whole (see `RunSettings`).

        ``app_keys`` are further keys that the app itself reads.
        """
        settings = RunSettings.from_run_config(run_config, app_keys=app_keys)
        if find_algorithm(settings.algorithm).server is not None:
            raise ConfigError(
                f"the agents of algorithm {settings.algorithm!r} hear a server, not each other. "
                "Use make_strategy(context, model_fn), which knows both kinds."
            )
        strategy = cls(
            settings.graph(),
            max_staleness=settings.max_staleness,
            key_interval=settings.key_interval,
            **common_settings(settings, run_config, name),
        )
        strategy.begin_from(settings)
        return strategy
