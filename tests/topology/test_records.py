"""Records of graphs: the bytes stay, and the graph comes back in all rounds."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl.errors import TopologyError
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.simulation import simulate
from flower_mcepl.topology import TOPOLOGIES, FixedLinks, Spec, Topology, families
from tests.fleet.agents import make_fleet

RECORDED = {  # as they were written before schedules said how they are built again
    "ring": (
        Topology.ring(3),
        '{"name": "ring", "num_agents": 3, "directed": false, "edges": [[0, 1], [0, 2], [1, 2]]}',
    ),
    "star": (
        Topology.star(3),
        '{"name": "star", "num_agents": 3, "directed": false, "edges": [[0, 1], [0, 2]]}',
    ),
    "torus": (
        Topology.torus(2, 2),
        '{"name": "torus", "num_agents": 4, "directed": false, '
        '"edges": [[0, 1], [0, 2], [1, 3], [2, 3]]}',
    ),
    "one-way": (
        Topology.from_edges([(2, 1), (0, 1), (1, 0)], num_agents=4, directed=True),
        '{"name": "edges", "num_agents": 4, "directed": true, "edges": [[0, 1], [1, 0], [2, 1]]}',
    ),
    "alone": (
        Topology.path(1),
        '{"name": "path", "num_agents": 1, "directed": false, "edges": []}',
    ),
    "random-neighbors": (
        Topology.random_neighbors(5, degree=2, seed=3),
        '{"name": "random-neighbors", "num_agents": 5, "degree": 2, "seed": 3}',
    ),
}


@pytest.mark.parametrize(("topology", "text"), RECORDED.values(), ids=RECORDED)
def test_a_record_is_what_it_always_was(topology: Topology, text: str) -> None:
    assert json.dumps(topology.to_config()) == text
    assert Topology.from_config(json.loads(text)) == topology


@st.composite
def lines(draw: st.DrawFn, name: str) -> tuple[str, int]:
    """One line for ``Topology.parse``, and a number of agents that it fits."""
    n = draw(st.integers(2, 14))
    match name:
        case "torus":
            return draw(
                st.sampled_from([f"torus:rows={r}" for r in range(1, n + 1) if not n % r])
            ), n
        case "erdos-renyi":
            return f"erdos-renyi:probability={draw(st.floats(0, 1))}", n
        case "small-world":
            degree = 2 * draw(st.integers(0, (n - 1) // 2))
            return f"small-world:degree={degree},rewiring={draw(st.floats(0, 1))}", n
        case "random-regular":
            return f"random-regular:degree={draw(st.integers(0, n - 1))}", n + n % 2
        case "random-neighbors":
            return f"random-neighbors:degree={draw(st.integers(0, n - 1))}", n
    return name, n


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_graph_comes_back_from_its_record(name: str, tmp_path_factory: Any) -> None:
    @settings(deadline=None, max_examples=10)
    @given(st.data(), st.integers(0, 2**40))
    def comes_back(data: st.DataObject, seed: int) -> None:
        if "file" in name:
            path = tmp_path_factory.mktemp("graphs") / "edges.txt"
            path.write_text("0 1\n2 1\n")
            line, n = f"{name}:{path}", 4
        else:
            line, n = data.draw(lines(name))
        check_it_comes_back(Topology.parse(line, num_agents=n, seed=seed))

    comes_back()


def check_it_comes_back(topology: Topology) -> None:
    again = Topology.from_config(json.loads(json.dumps(topology.to_config())))
    assert again == topology
    assert (again.directed, again.time_varying) == (topology.directed, topology.time_varying)
    for t in (*range(12), 10**6):
        assert again.links(round=t) == topology.links(round=t)


def test_families_are_the_edges_of_their_topologies() -> None:
    for built, edges in (
        (Topology.ring(5), families.ring(5)),
        (Topology.path(5), families.path(5)),
        (Topology.torus(2, 3), families.torus(2, 3)),
        (Topology.star(5), families.star(5)),
        (Topology.complete(5), families.complete(5)),
        (
            Topology.erdos_renyi(9, mean_degree=3, seed=4),
            families.erdos_renyi(9, mean_degree=3, seed=4),
        ),
        (
            Topology.small_world(9, degree=4, rewiring=0.5, seed=4),
            families.small_world(9, degree=4, rewiring=0.5, seed=4),
        ),
        (
            Topology.random_regular(9, degree=4, seed=4),
            families.random_regular(9, degree=4, seed=4),
        ),
    ):
        pairs = list(edges)
        assert set(built.links()) == {*pairs, *((j, i) for i, j in pairs)}


# --- schedules of one's own ---


@dataclass(frozen=True)
class Turn:
    """A link both ways between agent 0 and another one in turn."""

    num_agents: int
    every: int = 1
    directed: bool = False

    def edges(self, round: int) -> Iterable[tuple[int, int]]:
        return [(0, 1 + round // self.every % (self.num_agents - 1))] * 2

    def to_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Bare:
    """A schedule that says nothing."""

    directed = True

    def edges(self, round: int) -> Iterable[tuple[int, int]]:
        return [(round % 3, 3)]


class Fickle(Bare):
    """A schedule whose links depend on how often they were asked for."""

    asked = itertools.count()

    def edges(self, round: int) -> Iterable[tuple[int, int]]:
        return [(next(self.asked) % 9, 9)]

    def to_config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Forgetful(Turn):
    """A schedule that leaves out a parameter."""

    def to_config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Unwritable(Turn):
    """A schedule with a parameter that JSON lacks."""

    def to_config(self) -> dict[str, Any]:
        return {"every": {1, 2}}


@dataclass(frozen=True)
class Listed:
    """A schedule that cannot be hashed."""

    directed = True
    table: list[int] = field(default_factory=list)

    def edges(self, round: int) -> Iterable[tuple[int, int]]:
        return []


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specs that count as built-in while a test runs."""
    specs = {
        "turn": Spec(Turn),
        "fickle": Spec(lambda num_agents: Fickle()),
        "bare": Spec(lambda num_agents: Bare()),
        "forgetful": Spec(lambda num_agents, every=1: Forgetful(num_agents, every)),
        "unwritable": Spec(lambda num_agents, every=1: Unwritable(num_agents, every)),
        "shared": Spec(lambda num_agents, seed=0: Turn(num_agents, every=12 // num_agents)),
        "edges-of": Spec(lambda num_agents, seed: [(0, 1)]),
        "small": Spec(lambda num_agents, seed: Topology.ring(2)._schedule),
    }
    points = {name: metadata.EntryPoint(name, "x:y", "test") for name in specs}
    monkeypatch.setattr(TOPOLOGIES, "_built_in", {**TOPOLOGIES._built_in, **points})
    monkeypatch.setattr(TOPOLOGIES, "_loaded", {**TOPOLOGIES._loaded, **specs})


def of(schedule: Any, name: str = "mine", n: int = 10) -> Topology:
    return Topology.from_schedule(schedule, num_agents=n, name=name)


def test_a_schedule_gives_the_links_of_every_round() -> None:
    topology = of(Turn(10))
    assert (topology.directed, topology.time_varying) == (False, True)
    assert [topology.links(round=t) for t in (0, 4, 9)] == [
        ((0, 1), (1, 0)),
        ((0, 5), (5, 0)),
        ((0, 1), (1, 0)),
    ]
    assert topology.in_neighbors(0, round=4) == topology.out_neighbors(0, round=4) == (5,)
    assert topology == of(Turn(10)) != of(Turn(10, every=2))
    one_way = of(Turn(10, directed=True))
    assert one_way.directed
    assert one_way.links(round=4) == ((0, 5),)
    assert "union of rounds 0 to 8 strongly connected" in topology.describe()


def test_schedules_that_compare_equal_are_still_two() -> None:
    class Left(NamedTuple):
        directed: bool = True

        def edges(self, round: int) -> list[tuple[int, int]]:
            return [(0, 1)]

    class Right(NamedTuple):
        directed: bool = True

        def edges(self, round: int) -> list[tuple[int, int]]:
            return [(1, 0)]

    assert Left() == Right()
    assert of(Left()).links() != of(Right()).links()


@pytest.mark.usefixtures("known")
def test_a_schedule_that_is_known_comes_back() -> None:
    topology = of(Turn(10, every=3), name="turn")
    assert topology.to_config() == {
        "name": "turn", "num_agents": 10, "every": 3, "directed": False,
    }  # fmt: skip
    check_it_comes_back(topology)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("schedule", "name", "reason"),
    [
        (Turn(10), "mine", "no installed package adds 'mine'"),
        (Bare(), "bare", r"it has no to_config\(\)"),
        (Turn(10), "fickle", "not built again from .*unexpected keyword argument"),
        (Turn(10), "ring", "not built again from .*missing 1 required .*'seed'"),
        (Fickle(), "fickle", "it has other links in round 1"),
        (Forgetful(10, every=3), "forgetful", "it has other links in round 1"),
        (Unwritable(10), "unwritable", "not built again from .*not JSON serializable"),
        (Forgetful(10), "turn", "a Turn is built"),
        (Turn(5), "turn", "it has other links in round 4"),  # made for 5 agents, told 10
    ],
)
def test_what_does_not_come_back_is_not_recorded(schedule: Any, name: str, reason: str) -> None:
    topology = of(schedule, name=name)
    topology.links(round=3)
    with pytest.raises(TopologyError, match=reason) as refused:
        topology.to_config()
    kind = type(schedule).__name__
    assert f"the schedule {kind} in the topology {name!r}" in str(refused.value)
    assert "flower_mcepl.topologies" in str(refused.value)


def test_another_name_for_a_known_schedule_is_not_recorded() -> None:
    renamed = dataclasses.replace(Topology.random_neighbors(5, degree=1, seed=0), name="fresh")
    with pytest.raises(TopologyError, match="RandomNeighbors in the topology 'fresh' it cannot"):
        renamed.to_config()
    fixed = dataclasses.replace(Topology.ring(5), name="fresh")
    assert Topology.from_config(fixed.to_config()) == fixed


def test_a_run_record_is_refused_before_the_run(tmp_path: Path) -> None:
    record = RunRecord.create(tmp_path, name="own", config={})
    with pytest.raises(TopologyError, match="of the schedule Turn in the topology 'mine'"):
        simulate(make_fleet(3), of(Turn(3), n=3), num_rounds=1, record=record)
    assert read_run(record.path).summary is None
    result = simulate(make_fleet(3), of(Turn(3), n=3), num_rounds=1)  # without one it runs
    assert len(result.rows) == 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (iter([(0, 1)]), "those of 'mine' are a list_iterator. Return FixedLinks.from_edges"),
        (nx.path_graph(4), "those of 'mine' are a Graph"),
        (Topology.ring(3), "those of 'mine' are a Topology"),
        (Topology.ring(3)._schedule, "'mine' must have 10 agents; its links are of 3"),
        (
            FixedLinks(((1,), *[()] * 9), ((), (0,), *[()] * 8), directed=False),
            "the same from either end; the tables of 'mine' do not. Build them with FixedLinks",
        ),
        (Listed(), "the Listed of 'mine' is not .*unhashable.*frozen dataclass"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        of(schedule)


@pytest.mark.usefixtures("known")
def test_a_spec_that_builds_no_schedule_is_refused() -> None:
    with pytest.raises(TopologyError, match="those of 'edges-of' are a list"):
        Topology.parse("edges-of", num_agents=4)
    with pytest.raises(TopologyError, match="'small' must have 4 agents; its links are of 2"):
        Topology.parse("small", num_agents=4)
    with pytest.raises(TopologyError, match="those of 'edges-of' are a list"):
        Topology.from_config({"name": "edges-of", "num_agents": 4, "seed": 0})


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("n", [0, 2.5, None])
def test_a_spec_is_asked_for_at_least_one_agent(n: Any) -> None:
    for ask in (
        lambda: Topology.from_config({"name": "shared", "num_agents": n}),
        lambda: Topology.parse("shared", num_agents=n),
        lambda: of(Bare(), n=n),
    ):
        with pytest.raises(TopologyError, match=r"num_agents must be (at least 1|a whole number)"):
            ask()


def test_edges_of_a_schedule_are_checked_in_every_round() -> None:
    topology = of(Bare(), n=4)
    assert topology.links(round=2) == ((2, 3),)
    with pytest.raises(TopologyError, match=r"edge \(2, 3\) names agent 3"):
        of(Bare(), n=3).in_neighbors(0, round=2)
