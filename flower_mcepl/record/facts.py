"""Facts of a run record beside its run config: what the run was of, whatever its seed.

Two records with equal run configs may be of different apps, networks or graphs, and a
record of `simulate` has no run config at all. Nothing here depends on the seed: what
differs between the agents of one run may be drawn, so it says no more than that.
"""

import json
from collections.abc import Iterable
from typing import Any

from flower_mcepl.record.reading import Run

BY_AGENT = "differs by agent"
# names of strategies that were given none; with that of the algorithm, they say nothing
# of the app
_NO_APP = {"gossip", "server"}
_OTHER_BITS, _ITS_BITS = "batched", "loop"  # engines: all but one have the same bits
_GRAPH = {"name": "graph", "num_agents": "num-agents"}
_NO_FACTS = {"seed", "number", "edges", "package"}
_RUN = (
    *("num_rounds", "evaluate_every", "schedule", "time_budget", "timeout_factor"),
    *("round_timeout", "max_staleness", "key_interval", "age_decay", "patience"),
)


def facts_of(run: Run) -> dict[str, Any]:
    """Facts of a run by name, the most telling first; what it lacks is absent."""
    facts = {
        "app": _app(run),
        "algorithm": _algorithms(run),
        "engine": _engine(run),
        "evaluate-on": _split(run),
        **_graph(run),
        **{_kebab(key): run.config.get(key) for key in _RUN},
        "weights": _of_all(agent.get("num_weights") for agent in run.handshakes.values()),
        **_parameters(run),
    }
    return {key: _scalar(value) for key, value in facts.items() if value is not None}


def _app(run: Run) -> str | None:
    if (app := run.study.get("app")) is not None:
        return str(app)
    names = {str(agent.get("algorithm")) for agent in run.handshakes.values()} | _NO_APP
    return None if run.name in names else run.name


def _algorithms(run: Run) -> str | None:
    names = {str(agent.get("algorithm") or "") for agent in run.handshakes.values()} - {""}
    return ", ".join(sorted(names)) or None


def _split(run: Run) -> str | None:
    told = {"num_test_examples", "num_validation_examples"}
    known = any(told & agent.keys() for agent in run.handshakes.values())
    return run.evaluated_on if known else run.setting("evaluate-on")


def _engine(run: Run) -> str:
    engine = run.config.get("engine") or run.setting("engine") or run.study.get("engine")
    return engine_of_bits(engine)


def engine_of_bits(engine: str | None) -> str:
    """Engine as far as bits depend on it; records without one are older than stacks."""
    return _OTHER_BITS if engine == _OTHER_BITS else _ITS_BITS


def _graph(run: Run) -> dict[str, Any]:
    return {
        _GRAPH.get(key, f"graph.{_kebab(key)}"): value
        for key, value in run.topology.items()
        if key not in _NO_FACTS
    }


def _parameters(run: Run) -> dict[str, Any]:
    agents = [agent["parameters"] for agent in run.handshakes.values()]
    server = run.config.get("server") or {}
    keys = dict.fromkeys(key for one in (*agents, server) for key in one if key not in _NO_FACTS)
    of_agents = {key: _of_all(one.get(key) for one in agents) for key in keys}
    return {
        **{f"agents.{_kebab(key)}": value for key, value in of_agents.items()},
        **{f"server.{_kebab(key)}": server.get(key) for key in keys},
    }


def _of_all(values: Iterable[Any]) -> Any:
    """Value that all agents have; where they have several, that they do."""
    values = list(values)
    alike = all(_scalar(value) == _scalar(values[0]) for value in values)
    return (values[0] if values else None) if alike else BY_AGENT


def _scalar(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _kebab(key: str) -> str:
    return key.replace("_", "-")
