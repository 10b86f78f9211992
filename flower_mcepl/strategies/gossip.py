"""The relay as a Flower strategy: each agent gets its neighbors' frames alone."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, final

from flwr.app import Array

from flower_mcepl.agents.registry import find_algorithm
from flower_mcepl.errors import ConfigError
from flower_mcepl.exchange.relay import Relay
from flower_mcepl.runs.options import RoundKeywords, RoundOptions
from flower_mcepl.runs.settings import RunSettings, recorded
from flower_mcepl.strategies.answers import frame_array, frame_bytes
from flower_mcepl.strategies.rounds import ExchangeStrategy
from flower_mcepl.topology import Topology


@final
class GossipStrategy(ExchangeStrategy):
    """Decentralized learning: relay each agent's frame to its graph neighbors only.

    One message per agent and round: the train message of a round carries the neighbors'
    frames of the round before; the answer carries the agent's own. A closing message
    after the last round fuses and evaluates. The strategy never opens a frame, and
    aggregates nothing.

    Parameters
    ----------
    topology : Topology
        The communication graph; agent i is the node whose node config says
        ``partition-id = i``.
    options : RoundOptions, optional
        How the rounds go; its fields are taken as keyword arguments, too:
        ``GossipStrategy(topology, evaluate_every=5)``.
    record : str, optional (default: "runs")
        Folder in which the run record is made; None writes none.
    name : str (default: "gossip")
        Name of the run, part of the record's folder.
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
        options: RoundOptions | None = None,
        *,
        record: str | Path | None = "runs",
        name: str = "gossip",
        config: Mapping[str, Any] | None = None,
        **keywords: Unpack[RoundKeywords],
    ) -> None:
        if not isinstance(topology, Topology):
            raise ConfigError(
                "topology must be a Topology, such as Topology.ring(10); got "
                f"{type(topology).__name__}."
            )
        options = replace(options or RoundOptions(), **keywords)
        relay = Relay[Array](
            topology,
            open_frame=frame_bytes,
            wrap_frame=frame_array,
            evaluate_every=options.evaluate_every,
            max_staleness=options.max_staleness,
            key_interval=options.key_interval,
            age_decay=options.age_decay,
            schedule=options.schedule,
            agents_per_node=options.agents_per_node,
        )
        super().__init__(relay, options, record=record, name=name, config=config)

    @classmethod
    def from_run_config(
        cls, run_config: Mapping[str, Any], *, app_keys: Iterable[str] = (), name: str = "gossip"
    ) -> "GossipStrategy":
        """Build the strategy from a run config, checked whole (see `RunSettings`).

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
            settings,
            record=settings.record_dir,
            name=name,
            config=recorded(settings, run_config),
        )
        strategy.begin_from(settings)
        return strategy
