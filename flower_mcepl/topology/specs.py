"""The names that ``Topology.parse`` knows, and what may stand after their colon."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_mcepl.errors import TopologyError
from flower_mcepl.topology import checks
from flower_mcepl.topology.graph import Topology


@dataclass(frozen=True)
class Spec:
    """One name that ``Topology.parse`` knows: how to build it and what stands after the colon."""

    build: Callable[..., Topology]  # (num_agents, seed, **options)
    needs: Mapping[str, type] = field(default_factory=dict)
    takes: Mapping[str, type] = field(default_factory=dict)

    def options(self, name: str, text: str) -> dict[str, Any]:
        """Read what stands after the colon."""
        pairs = [part.partition("=")[::2] for part in text.split(",")] if text else []
        if text and "path" in self.needs:
            pairs = [("path", text)]  # a path may hold , and =
        options: dict[str, Any] = {}
        for key, value in ((key.strip(), value.strip()) for key, value in pairs):
            kind = checks.lookup({**self.needs, **self.takes}, key, f"parameter of {name}")
            if key in options:
                raise TopologyError(f"{name} takes {key} once; got {text!r}. Leave one out.")
            options[key] = _convert(kind, value, f"{name}:{key}")
        if missing := [key for key in self.needs if key not in options]:
            example = ",".join(f"{key}=..." for key in self.needs)
            raise TopologyError(f"{name} needs {' and '.join(missing)}; got {text!r}. Write '{name}:{example}'.")
        return options


def _convert(kind: type, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise TopologyError(f"{what} must be {noun}; got {text!r}. Write it as key=value.") from None


def _torus(n: int, seed: int, rows: int | None = None) -> Topology:
    n = checks.agents(n)
    if rows is None:
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        if rows == 1 < n:
            raise TopologyError(
                f"a torus needs agents that fill rows and columns; {n} is prime. "
                "Change the number of agents, or ask for 'torus:rows=1', which is a ring."
            )
    if n % checks.whole(rows, "torus:rows", least=1, most=n):
        raise TopologyError(
            f"the rows of a torus must divide the number of agents; got rows={rows} for {n} agents. "
            "Change rows, or leave it out for the most square torus."
        )
    return Topology.torus(rows, n // rows)


def _erdos_renyi(n: int, seed: int, degree: float | None = None, probability: float | None = None) -> Topology:
    return Topology.erdos_renyi(n, mean_degree=degree, probability=probability, seed=seed)


SPECS: dict[str, Spec] = {
    "ring": Spec(lambda n, seed: Topology.ring(n)),
    "path": Spec(lambda n, seed: Topology.path(n)),
    "star": Spec(lambda n, seed: Topology.star(n)),
    "complete": Spec(lambda n, seed: Topology.complete(n)),
    "torus": Spec(_torus, takes={"rows": int}),
    "erdos-renyi": Spec(_erdos_renyi, takes={"degree": float, "probability": float}),
    "small-world": Spec(
        lambda n, seed, **options: Topology.small_world(n, seed=seed, **options),
        needs={"degree": int, "rewiring": float},
    ),
    "random-regular": Spec(
        lambda n, seed, degree: Topology.random_regular(n, degree=degree, seed=seed), needs={"degree": int}
    ),
    "random-neighbors": Spec(
        lambda n, seed, degree: Topology.random_neighbors(n, degree=degree, seed=seed), needs={"degree": int}
    ),
    "directed-file": Spec(
        lambda n, seed, path: Topology.from_file(path, num_agents=n, directed=True), needs={"path": Path}
    ),
    "file": Spec(lambda n, seed, path: Topology.from_file(path, num_agents=n), needs={"path": Path}),
}
