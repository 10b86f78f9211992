"""Checks of an app whose ClientApp is its own: no agent can be built before a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.errors import ConfigError
from flower_mcepl.studies.flower_app import FlowerApp
from flower_mcepl.studies.own_client import OwnClient


def examine_own(
    app: FlowerApp, own: OwnClient, node_config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Say what the app is, and nothing of graph, rounds or data, its own affair."""
    state = f"{app.client} is {own.what}; no agent can be built of it before a run"
    with Examination("client-app", remedy="") as check:
        if own.remedy:
            check.warn(state, own.remedy)
        else:
            check.ok(f"{state}: its graph, rounds, data and model are told by its own code alone")
    yield check.finding
    with Examination("node-config", remedy="Correct it in --node-config.") as check:
        agent = node_config.get("partition-id")
        if type(agent) is not int or agent < 0:
            raise ConfigError(
                f"partition-id, the agent's number in the graph, counts from 0; got {agent!r}. "
                "Give each device one of its own."
            )
        check.ok(f"agent {agent}", node_config=dict(node_config))
    yield check.finding
