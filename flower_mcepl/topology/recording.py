"""Records of graphs, to build them again: edges, or parameters of a schedule.

::

    {"name": "path", "num_agents": 3, "directed": false, "edges": [[0, 1], [1, 2]]}
    {"name": "random-neighbors", "num_agents": 9, "degree": 2, "seed": 0}
    {"name": "carousel", "num_agents": 9, "package": "carousels", "step": 2}

A graph that never changes needs nothing else to be read. The parameters of one that
changes are keyword arguments of its spec's ``build``; ``package`` names who adds that.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flower_mcepl.config.specs import Spec
from flower_mcepl.errors import ConfigError, TopologyError
from flower_mcepl.topology import checks
from flower_mcepl.topology.schedules import FixedLinks, Schedule, checked_schedule, links_of
from flower_mcepl.topology.specs import TOPOLOGIES

# rounds whose links are drawn twice before parameters count as the record of a schedule
_REHEARSED = range(1, 6)


class Recorded(NamedTuple):
    """What a topology consists of."""

    name: str
    num_agents: int
    schedule: Schedule


def to_config(name: str, num_agents: int, schedule: Schedule) -> dict[str, Any]:
    """The JSON-able record of a topology.

    Raises
    ------
    TopologyError
        If the links change with time, and nothing that is installed under this name
        builds the same links again from the schedule's parameters.
    """
    head = {"name": name, "num_agents": num_agents}
    if isinstance(schedule, FixedLinks):
        return {**head, **schedule.to_config()}
    if name not in TOPOLOGIES:
        raise _unrecordable(name, schedule, f"no installed package adds {name!r}")
    if not hasattr(schedule, "to_config"):
        raise _unrecordable(name, schedule, "it has no to_config()")
    if (package := TOPOLOGIES.package(name)) is not None:
        head["package"] = package
    config = {**head, **schedule.to_config(), **head}
    _check_rebuilt(name, num_agents, schedule, config)
    return config


def from_config(config: Mapping[str, Any]) -> Recorded:
    """Build again what `to_config` recorded.

    Raises
    ------
    TopologyError
        If it is no such record, or needs a package that is not installed here.
    """
    try:
        options = {**config}
        name, n = str(options.pop("name")), checks.agents(options.pop("num_agents"))
        if "edges" in options:
            edges, directed = options["edges"], bool(options["directed"])
            links = FixedLinks.from_edges(edges, num_agents=n, directed=directed)
            return Recorded(name, n, links)
        schedule = _spec(name, options.pop("package", None)).build(n, **options)
    except (KeyError, TypeError, ConfigError) as error:
        raise TopologyError(
            f"a topology's config must be what to_config() returned; {config!r:.99} fails "
            f"with {error!r}."
        ) from error
    return Recorded(name, n, checked_schedule(schedule, n, name))


def _spec(name: str, package: str | None) -> Spec[Schedule]:
    """The spec of that name, if it is the same package's as in the record."""
    if package is not None and name not in TOPOLOGIES:
        raise TopologyError(
            f"the topology {name!r} is built by the package {package!r}, which is not installed "
            "here, or in a version without it. Install that package where this is read."
        )
    spec = TOPOLOGIES.find(name)
    if (here := TOPOLOGIES.package(name)) != package:
        raise TopologyError(
            f"the topology {name!r} was built by {package or 'flower_mcepl'!r}, and here "
            f"{here or 'flower_mcepl'!r} adds that name. Uninstall the one, install the other."
        )
    return spec


def _check_rebuilt(
    name: str, num_agents: int, schedule: Schedule, config: Mapping[str, Any]
) -> None:
    """Make sure that the record leads back: it is all that stays of the schedule."""
    try:
        again = from_config(json.loads(json.dumps(config))).schedule
    except (TopologyError, TypeError, ValueError) as error:
        reason = f"it is not built again from {config!r:.200}: {error}".rstrip(".")
        raise _unrecordable(name, schedule, reason) from error
    if type(again) is not type(schedule):
        reason = f"from {config!r:.200} a {type(again).__name__} is built"
        raise _unrecordable(name, schedule, reason)
    for t in _REHEARSED:
        if links_of(again, num_agents, t) != links_of(schedule, num_agents, t):
            reason = f"built again from {config!r:.200}, it has other links in round {t}"
            raise _unrecordable(name, schedule, reason)


def _unrecordable(name: str, schedule: Schedule, reason: str) -> TopologyError:
    kind = type(schedule).__name__
    return TopologyError(
        f"a run record must say how its graph is built again; of the schedule {kind} in the "
        f"topology {name!r} it cannot: {reason}. Add a Spec that builds a {kind} to the "
        f"entry points {TOPOLOGIES.group} of a package, build the topology under its name, and "
        "let to_config() return the arguments that its build takes (docs/extending.md)."
    )
