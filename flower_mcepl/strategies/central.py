"""Server-based algorithms as a Flower strategy: every agent hears the server alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, final

from flwr.app import Array, Context
from torch import nn

from flower_mcepl.agents import find_algorithm, make_server, save_state
from flower_mcepl.agents.handshake import check_common_ground
from flower_mcepl.agents.server import Server
from flower_mcepl.exchange.center import Center
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.masks.model import shared_module
from flower_mcepl.runs.fleet import SERVER_FILE
from flower_mcepl.runs.options import RoundKeywords, RoundOptions
from flower_mcepl.runs.schedules import check_schedule, check_votes_of_server
from flower_mcepl.runs.settings import RunSettings, recorded
from flower_mcepl.strategies.answers import frame_array, frame_bytes
from flower_mcepl.strategies.fedavg import FlowerFedavgServer
from flower_mcepl.strategies.gossip import GossipStrategy
from flower_mcepl.strategies.rounds import ExchangeStrategy


@final
class ServerStrategy(ExchangeStrategy):
    """FedAvg, FedSpa or FedPM with the messages, frames and records of gossip.

    From a run config, FedAvg's mean is that of Flower's own ``FedAvg``.

    The train message of a round carries the server's frame of the round before; the
    answer carries the agent's own, which the server opens and aggregates.

    Parameters
    ----------
    server : Server
        As from `make_server`; agent i is the node whose node config says ``partition-id
        = i``.
    options, record, name, config
        As in `GossipStrategy`; a checkpoint holds the server's model, too.
    """

    def __init__(
        self,
        server: Server,
        options: RoundOptions | None = None,
        *,
        record: str | Path | None = "runs",
        name: str = "server",
        config: Mapping[str, Any] | None = None,
        **keywords: Unpack[RoundKeywords],
    ) -> None:
        self.server = server
        options = replace(options or RoundOptions(), **keywords)
        check_schedule(options.schedule, has_server=True)
        check_votes_of_server(options.age_decay)
        center = Center[Array](
            server,
            open_frame=frame_bytes,
            wrap_frame=frame_array,
            evaluate_every=options.evaluate_every,
            max_staleness=options.max_staleness,
        )
        super().__init__(center, options, record=record, name=name, config=config)

    @classmethod
    def from_run_config(
        cls,
        run_config: Mapping[str, Any],
        model_fn: Callable[[], nn.Module],
        *,
        app_keys: Iterable[str] = (),
        name: str = "server",
    ) -> "ServerStrategy":
        """Build the strategy from a run config, checked whole (see `RunSettings`).

        ``model_fn`` makes the agents' network; it is called on the run's seed.
        ``app_keys`` are further keys that the app itself reads.
        """
        settings = RunSettings.from_run_config(run_config, app_keys=app_keys)
        module = shared_module(model_fn, seed=settings.seed)
        kind = FlowerFedavgServer if settings.algorithm == FlowerFedavgServer.algorithm else None
        server = make_server(
            settings.algorithm,
            module,
            settings.num_agents,
            run_config,
            seed=settings.seed,
            kind=kind,
        )
        strategy = cls(
            server,
            settings,
            record=settings.record_dir,
            name=name,
            config=recorded(settings, run_config),
        )
        strategy.begin_from(settings)
        return strategy

    def describe(self) -> str:
        """Say in one line who hears whom."""
        return f"{self.server.algorithm}: {self.server.num_agents} agents and a server"

    def _about(self) -> dict[str, Any]:
        return {"server": {"number": self.server.index, **self.server.parameters()}}

    def _check_agent(self, agent: int, answer: Answer[Array]) -> None:
        super()._check_agent(agent, answer)
        server = self.server.describe()
        check_common_ground(f"agent {agent}", answer.facts, "the server", server)

    def _finish(self) -> None:
        if self.record is not None:
            save_state(self.server.state(), self.record.agents_dir / SERVER_FILE)


def make_strategy(
    context: Context,
    model_fn: Callable[[Context], nn.Module],
    *,
    app_keys: Iterable[str] = (),
    name: str | None = None,
) -> GossipStrategy | ServerStrategy:
    """Make the strategy of the algorithm that the run-config key ``algorithm`` names.

    Parameters
    ----------
    context : Context
        That of the ServerApp.
    model_fn : callable
        ``model_fn(context)`` as for `make_client_app`; only server-based algorithms
        need it here.
    app_keys : iterable of str
        Further keys that the app itself reads.
    name : str, optional
        Name of the run, part of the record's folder (default: the algorithm's name).
    """
    algorithm = str(context.run_config.get("algorithm", "mcepl"))
    if find_algorithm(algorithm).server is None:
        return GossipStrategy.from_run_config(
            context.run_config, app_keys=app_keys, name=name or algorithm
        )
    return ServerStrategy.from_run_config(
        context.run_config, lambda: model_fn(context), app_keys=app_keys, name=name or algorithm
    )
