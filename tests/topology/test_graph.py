import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl.errors import TopologyError
from flower_mcepl.streams import numpy_stream
from flower_mcepl.topology import Topology

light = settings(deadline=None, max_examples=40)

SPECS = [
    "ring",
    "path",
    "star",
    "complete",
    "torus",
    "torus:rows=2",  # from here on random
    "erdos-renyi:degree=5",
    "erdos-renyi:probability=0.5",
    "small-world:degree=4,rewiring=0.1",
    "random-regular:degree=4",
    "random-neighbors:degree=3",
]


@st.composite
def edge_lists(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], bool]:
    n = draw(st.integers(1, 12))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1])
    return n, draw(st.lists(pair, max_size=30)) if n > 1 else [], draw(st.booleans())


def slow_adjacency(n: int, edges: list[tuple[int, int]], directed: bool) -> np.ndarray:
    """The obvious truth: A[i, j] = 1 if i sends to j."""
    adjacency = np.zeros((n, n), dtype=int)
    for i, j in edges:
        adjacency[i, j] = 1
        if not directed:
            adjacency[j, i] = 1
    return adjacency


def adjacency_of(topology: Topology, round: int = 0) -> np.ndarray:
    return slow_adjacency(topology.num_agents, list(topology.links(round=round)), directed=True)


@light
@given(edge_lists())
def test_neighbors_match_the_adjacency_matrix(
    case: tuple[int, list[tuple[int, int]], bool],
) -> None:
    n, edges, directed = case
    adjacency = slow_adjacency(n, edges, directed)
    topology = Topology.from_edges(edges, num_agents=n, directed=directed)
    assert (topology.num_agents, topology.directed, topology.time_varying) == (n, directed, False)
    assert topology.links() == tuple((i, j) for i in range(n) for j in range(n) if adjacency[i, j])
    for i in range(n):
        assert topology.in_neighbors(i, round=7) == tuple(j for j in range(n) if adjacency[j, i])
        assert topology.out_neighbors(i) == tuple(j for j in range(n) if adjacency[i, j])


@light
@given(edge_lists())
def test_mixing_matches_slow_loops(case: tuple[int, list[tuple[int, int]], bool]) -> None:
    n, edges, directed = case
    adjacency = slow_adjacency(n, edges, directed)
    topology = Topology.from_edges(edges, num_agents=n, directed=directed)
    expected = np.zeros((n, n))
    for i in range(n):
        received = adjacency[:, i].sum()
        for j in range(n):
            expected[i, j] = 1 / received if adjacency[j, i] else 0
    mixing = topology.mixing()
    assert mixing.dtype == np.float64
    np.testing.assert_array_equal(mixing, expected)
    assert not mixing.diagonal().any()


@light
@given(edge_lists())
def test_metropolis_is_doubly_stochastic_and_matches_slow_loops(
    case: tuple[int, list[tuple[int, int]], bool],
) -> None:
    n, edges, _ = case
    degree = slow_adjacency(n, edges, directed=False).sum(axis=1)
    topology = Topology.from_edges(edges, num_agents=n)
    expected = np.zeros((n, n))
    for i, j in topology.links():
        expected[i, j] = 1 / (1 + max(degree[i], degree[j]))
    for i in range(n):
        expected[i, i] = 1 - sum(expected[i, j] for j in range(n) if j != i)
    mixing = topology.mixing(kind="metropolis")
    np.testing.assert_allclose(mixing, expected, atol=1e-12)
    np.testing.assert_allclose(mixing.sum(axis=0), 1)
    np.testing.assert_allclose(mixing.sum(axis=1), 1)
    assert (mixing >= 0).all()


@light
@given(edge_lists())
def test_config_networkx_and_pickle_round_trips(
    case: tuple[int, list[tuple[int, int]], bool],
) -> None:
    n, edges, directed = case
    topology = Topology.from_edges(edges, num_agents=n, directed=directed)
    assert Topology.from_config(json.loads(json.dumps(topology.to_config()))) == topology
    assert pickle.loads(pickle.dumps(topology)) == topology
    there_and_back = Topology.from_networkx(topology.to_networkx())
    assert dataclasses.replace(there_and_back, name=topology.name) == topology


@light
@given(edge_lists())
def test_components_match_reachability(case: tuple[int, list[tuple[int, int]], bool]) -> None:
    n, edges, directed = case
    reach = np.eye(n, dtype=int) + slow_adjacency(n, edges, directed)
    for _ in range(n):
        reach = (reach @ reach > 0).astype(int)
    both = reach & reach.T
    expected = sorted({tuple(int(j) for j in np.flatnonzero(both[i])) for i in range(n)})
    topology = Topology.from_edges(edges, num_agents=n, directed=directed)
    assert topology.components() == tuple(expected)
    assert topology.is_connected() == (len(expected) == 1)


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_parses_deterministically(spec: str) -> None:
    topology = Topology.parse(spec, num_agents=12, seed=3)
    random.seed(1)
    assert topology == Topology.parse(f" {spec} ", num_agents=12, seed=3)
    assert topology.num_agents == 12
    assert topology.name == spec.partition(":")[0]
    assert topology.links(round=2) == tuple(sorted(set(topology.links(round=2))))
    for i in range(12):
        senders = topology.in_neighbors(i, round=2)
        assert i not in senders
        assert senders == tuple(sorted(set(senders)))
        assert all(i in topology.out_neighbors(j, round=2) for j in senders)
    again = Topology.from_config(json.loads(json.dumps(topology.to_config())))
    assert again == pickle.loads(pickle.dumps(topology)) == topology
    assert hash(again) == hash(topology)
    assert again.links(round=5) == topology.links(round=5)


@pytest.mark.parametrize("spec", SPECS[6:])
def test_the_seed_matters(spec: str) -> None:
    drawn = {Topology.parse(spec, num_agents=12, seed=seed).links() for seed in range(4)}
    assert len(drawn) > 1


def test_global_randomness_is_neither_used_nor_moved() -> None:
    random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for spec in SPECS:
        Topology.parse(spec, num_agents=12).links()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_named_shapes() -> None:
    assert Topology.ring(4).links() == (
        (0, 1),
        (0, 3),
        (1, 0),
        (1, 2),
        (2, 1),
        (2, 3),
        (3, 0),
        (3, 2),
    )
    assert Topology.path(3).links() == ((0, 1), (1, 0), (1, 2), (2, 1))
    assert Topology.star(3).links() == ((0, 1), (0, 2), (1, 0), (2, 0))
    assert Topology.complete(3).links() == ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
    assert Topology.torus(3, 4).in_neighbors(0) == (1, 3, 4, 8)
    assert Topology.torus(1, 5).links() == Topology.ring(5).links()
    assert Topology.parse("torus", num_agents=12) == Topology.torus(3, 4)
    assert Topology.parse("torus:rows=4", num_agents=12) == Topology.torus(4, 3)
    assert Topology.parse("torus:rows=1", num_agents=7) == Topology.torus(1, 7)
    assert nx.is_isomorphic(
        Topology.torus(3, 4).to_networkx(), nx.grid_2d_graph(3, 4, periodic=True)
    )


@pytest.mark.parametrize("name", ["ring", "path", "star", "complete"])
def test_smallest_graphs(name: str) -> None:
    alone, pair = Topology.parse(name, num_agents=1), Topology.parse(name, num_agents=2)
    assert alone.links() == ()
    assert alone.is_connected()
    assert alone.mixing().tolist() == [[0.0]]
    assert alone.mixing(kind="metropolis").tolist() == [[1.0]]
    assert pair.links() == ((0, 1), (1, 0))


@light
@given(n=st.integers(2, 30), data=st.data())
def test_random_graphs_keep_their_promises(n: int, data: st.DataObject) -> None:
    seed, degree = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, n - 1))
    if n * degree % 2 == 0:
        regular = Topology.random_regular(n, degree=degree, seed=seed)
        assert {len(regular.in_neighbors(i)) for i in range(n)} == {degree}
    if degree % 2 == 0:
        world = Topology.small_world(n, degree=degree, rewiring=0.3, seed=seed)
        assert len(world.links()) == n * degree
    by_degree = Topology.erdos_renyi(n, mean_degree=degree, seed=seed)
    assert by_degree == Topology.erdos_renyi(n, probability=degree / (n - 1), seed=seed)
    assert Topology.erdos_renyi(n, probability=1, seed=seed).links() == Topology.complete(n).links()


def test_mean_degree_is_the_expected_degree() -> None:
    links = [len(Topology.erdos_renyi(50, mean_degree=8, seed=s).links()) for s in range(20)]
    assert np.mean(links) / 50 == pytest.approx(8, rel=0.05)


@light
@given(n=st.integers(1, 15), data=st.data(), seed=st.integers(0, 99), round=st.integers(0, 10**6))
def test_random_neighbors_have_the_degree_and_random_access(
    n: int, data: st.DataObject, seed: int, round: int
) -> None:
    degree = data.draw(st.integers(0, n - 1))
    topology = Topology.random_neighbors(n, degree=degree, seed=seed)
    assert topology.time_varying
    assert topology.directed
    late = [topology.in_neighbors(i, round=round) for i in range(n)]
    for i, senders in enumerate(late):
        assert len(set(senders)) == degree
        assert i not in senders
        assert set(senders) <= set(range(n))
        if degree:
            others = [j for j in range(n) if j != i]  # the slow obvious draw
            stream = numpy_stream(seed, "topology", agent=i, round=round)
            assert set(senders) == {
                others[k] for k in stream.choice(n - 1, size=degree, replace=False)
            }
    fresh = Topology.random_neighbors(n, degree=degree, seed=seed)
    for t in (0, 1, round):  # rounds asked for in any order, by another object
        fresh.links(round=t)
    assert [fresh.in_neighbors(i, round=round) for i in range(n)] == late
    assert fresh.links(round=round) == tuple(sorted((j, i) for i in range(n) for j in late[i]))
    mixing = fresh.mixing(round=round)
    np.testing.assert_allclose(mixing.sum(axis=1), float(degree > 0))
    np.testing.assert_array_equal(mixing > 0, adjacency_of(fresh, round).T)


def test_random_neighbors_change_between_rounds_and_reach_everyone_equally() -> None:
    topology = Topology.random_neighbors(6, degree=2, seed=0)
    assert len({topology.links(round=t) for t in range(10)}) > 1
    heard = sum(adjacency_of(topology, t) for t in range(500))
    off_diagonal = heard[~np.eye(6, dtype=bool)]
    assert off_diagonal.min() > 150  # expected 200 of 500, standard deviation 11
    assert off_diagonal.max() < 250


def test_describe() -> None:
    assert Topology.ring(4).describe() == (
        "ring: 4 agents, 4 links (directed count 8), degree 2 to 2 (mean 2.0), connected"
    )
    assert Topology.ring(1).describe().startswith("ring: 1 agent, 0 links")
    assert Topology.ring(2).describe().startswith("ring: 2 agents, 1 link (")
    apart = Topology.from_edges([(0, 1), (1, 2)], num_agents=5)
    assert apart.describe().endswith("NOT connected: 3 components, isolated agents 3, 4")
    assert Topology.from_edges([], num_agents=13).describe().endswith(" 8, 9 and 3 more")
    pairs = Topology.from_edges([(0, 1), (2, 3)], num_agents=4)
    assert pairs.describe().endswith("NOT connected: 2 components")
    chain = Topology.from_edges([(0, 1), (1, 2)], num_agents=3, directed=True)
    assert chain.describe() == (
        "edges: 3 agents, 2 directed links, in-degree 0 to 1 (mean 0.7), out-degree 0 to 1 (mean "
        "0.7), NOT strongly connected: 3 components"
    )


def test_describe_time_varying_reports_the_union() -> None:
    sparse = Topology.random_neighbors(20, degree=1, seed=0)
    assert "round 4: 20 directed links, in-degree 1 to 1" in sparse.describe(4)
    assert not sparse.is_connected()
    said = sparse.describe().rpartition("; ")[2]
    last = int(said.removeprefix("union of rounds 0 to ").removesuffix(" strongly connected"))
    unions = [
        nx.DiGraph([e for t in range(k + 1) for e in sparse.links(round=t)])
        for k in range(last + 1)
    ]
    assert [len(g) == 20 and nx.is_strongly_connected(g) for g in unions] == [False] * last + [True]
    silent = Topology.random_neighbors(3, degree=0, seed=0)
    assert silent.describe().endswith("union of rounds 0 to 2 NOT strongly connected")


def test_immutable() -> None:
    topology = Topology.ring(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.num_agents = 4  # type: ignore[misc]
    topology.mixing()[:] = 7
    assert topology.mixing()[0, 1] == 0.5


def test_numpy_integers_are_welcome() -> None:
    topology = Topology.from_edges(np.array([[0, 1], [1, 2]]), num_agents=np.int64(3))  # type: ignore[arg-type]
    assert topology.in_neighbors(np.int64(1)) == (0, 2)  # type: ignore[arg-type]
    json.dumps(topology.to_config())


CHAIN = "0 1 0\n0 0 1\n0 0 0\n"  # 0 sends to 1, 1 sends to 2


@pytest.mark.parametrize(
    "text", [CHAIN, "# who sends\n" + CHAIN.replace(" ", ",") + "\n", "\ufeff" + CHAIN]
)
def test_text_matrix(tmp_path: Path, text: str) -> None:
    (tmp_path / "graph.csv").write_text(text, encoding="utf-8")
    topology = Topology.from_file(tmp_path / "graph.csv")
    assert topology.directed
    assert topology.links() == ((0, 1), (1, 2))
    assert topology == Topology.parse(f"file:{tmp_path / 'graph.csv'}", num_agents=3)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_saved_matrices(tmp_path: Path, dtype: type) -> None:
    ring = Topology.ring(5)
    np.save(tmp_path / "ring.npy", adjacency_of(ring).astype(dtype))
    np.savetxt(tmp_path / "ring.txt", adjacency_of(ring).astype(float))
    for name in ("ring.npy", "ring.txt"):
        topology = Topology.from_file(str(tmp_path / name))
        assert topology == dataclasses.replace(ring, name="file")
        assert Topology.from_file(tmp_path / name, directed=True).directed
        assert Topology.from_config(topology.to_config()) == topology


def test_edge_list_file(tmp_path: Path) -> None:
    path = tmp_path / "a=b,c.txt"
    path.write_text("# i j\n0 1\n\n1 0  # again\n3 1\n")
    topology = Topology.from_file(path)
    assert (topology.num_agents, topology.directed) == (4, False)
    assert topology.links() == ((0, 1), (1, 0), (1, 3), (3, 1))
    assert Topology.from_file(path, directed=True).links() == ((0, 1), (1, 0), (3, 1))
    assert Topology.parse(f"file:{path}", num_agents=9).num_agents == 9


@pytest.mark.parametrize("rows", ["0 1\n1 0", "0 0\n0 0", "0 1\n0 0", "0 0\n1 0", "1 0\n0 1"])
def test_text_of_two_pairs_is_never_misread_as_a_matrix(tmp_path: Path, rows: str) -> None:
    (tmp_path / "two.txt").write_text(rows)
    try:
        topology = Topology.from_file(tmp_path / "two.txt")
    except TopologyError as error:
        assert "to itself" in str(error)  # noqa: PT017
    else:
        assert topology.links() == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.txt", "0 1 0\n1 0 1\n", "must be square.* 2 rows of 3 numbers"),
        ("g.txt", "0 1 0\n1 0\n0 0 0\n", "must be square.* 3 rows of 2 or 3 numbers"),
        ("g.txt", "0 1 0\n1 0 2\n0 1 0\n", r"only 0 and 1.* 2 in row 1, column 2"),
        ("g.txt", "0 1 0\n1 nan 1\n0 1 0\n", "only 0 and 1"),
        ("g.txt", "0 1 0\n1 1 1\n0 1 0\n", r"edge \(1, 1\) links agent 1 to itself"),
        ("g.txt", "0 one\n", "line 1 of .* is '0 one'"),
        ("g.txt", "0 1\n1 2.5\n", r"pairs of agents.*\[1.0, 2.5\]"),
        ("g.txt", "0 1\n1 inf\n", "pairs of agents"),
        ("g.txt", "0 -1\n", "pairs of agents"),
        ("g.txt", "0 99999999999\n", "names 2 agents, the highest of them 99999999999. Number"),
        ("g.txt", "# nothing\n", "num_agents must be at least 1; got 0"),
        ("g.npy", "not numpy", "saved matrix"),
        ("g.txt", None, "readable text file"),
        ("g.npy", None, "saved matrix"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TopologyError, match=message):
        Topology.from_file(tmp_path / name)


def test_bad_arrays_and_sizes_in_files(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(TopologyError, match="must be square"):
        Topology.from_file(tmp_path / "flat.npy")
    np.save(tmp_path / "three.npy", np.zeros((3, 3)))
    with pytest.raises(TopologyError, match="has 3 agents, but 4 are asked for"):
        Topology.from_file(tmp_path / "three.npy", num_agents=4)
    np.save(tmp_path / "complex.npy", np.array([[0, 1j], [1, 0]]))
    with pytest.raises(TopologyError, match=r"saved matrix of 0 and 1.*complex128"):
        Topology.from_file(tmp_path / "complex.npy")
    (tmp_path / "list.txt").write_text("0 5\n")
    with pytest.raises(
        TopologyError, match=r"edge \(0, 5\) names agent 5, but the graph has agents 0..3"
    ):
        Topology.parse(f"file:{tmp_path / 'list.txt'}", num_agents=4)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ((3, 12), r"edge \(3, 12\) names agent 12, but the graph has agents 0\.\.9"),
        ((-1, 2), r"edge \(-1, 2\) names agent -1"),
        ((4, 4), r"edge \(4, 4\) links agent 4 to itself"),
        ((1, 2, 3), r"pair of agents 0\.\.9; got \(1, 2, 3\)"),
        ((1.5, 2), "pair of agents"),
        (7, "pair of agents"),
    ],
)
def test_bad_edges(edge: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_edges([(0, 1), edge], num_agents=10)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rnig", r"unknown topology 'rnig'; known: complete, .*torus\. Did you mean 'ring'\?"),
        ("Ring", "Did you mean 'ring'"),
        ("erdos_renyi:degree=3", "Did you mean 'erdos-renyi'"),
        ("xyzzy", "known: .*star, torus.$"),
        ("", "unknown topology ''"),
        ("ring:degree=2", "unknown parameter of ring 'degree'; known: none"),
        (
            "erdos-renyi:degre=3",
            "unknown parameter of erdos-renyi 'degre'; known: degree, probability. Did",
        ),
        ("erdos-renyi", "either a probability or a mean degree"),
        ("erdos-renyi:degree=3,probability=0.1", "not both"),
        ("erdos-renyi:degree=12", r"mean degree must be in \[0, 11\]; got 12"),
        ("erdos-renyi:probability=1.5", r"probability must be in \[0, 1\]; got 1.5"),
        ("erdos-renyi:probability=nan", "probability must be in"),
        ("erdos-renyi:probability=half", "erdos-renyi:probability must be a number; got 'half'"),
        ("small-world:degree=4", "small-world needs rewiring"),
        ("small-world", "needs degree and rewiring"),
        ("small-world:degree=3,rewiring=0.1", "even degree.*Take 2 or 4"),
        ("small-world:degree=4,rewiring=2", "rewiring must be in"),
        ("random-regular:degree=12", r"degree among 12 agents must be in 0\.\.11; got 12"),
        ("random-regular:degree=2.5", "random-regular:degree must be a whole number; got '2.5'"),
        ("random-regular:degree", "must be a whole number; got ''"),
        ("random-neighbors:degree=12", "must be in 0..11"),
        ("random-neighbors:degree=-1", "must be in 0..11"),
        ("random-neighbors:degree=2,degree=3", "takes degree once"),
        ("torus:rows=5", "must divide the number of agents; got rows=5 for 12"),
        ("torus:rows=0", "torus:rows must be in 1..12; got 0"),
        ("file", "file needs path"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.parse(spec, num_agents=12)


def test_torus_of_a_prime() -> None:
    with pytest.raises(TopologyError, match=r"13 is prime.*torus:rows=1"):
        Topology.parse("torus", num_agents=13)


def test_regular_of_odd_sum() -> None:
    with pytest.raises(TopologyError, match=r"to be even; got 5 \* 3 = 15"):
        Topology.random_regular(5, degree=3, seed=0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [0, -3, 2.0, None])
def test_bad_number_of_agents(spec: str, n: Any) -> None:
    with pytest.raises(TopologyError, match="num_agents must be"):
        Topology.parse(spec, num_agents=n)


@pytest.mark.parametrize(
    "topology", [Topology.ring(4), Topology.random_neighbors(4, degree=1, seed=0)]
)
def test_bad_questions(topology: Topology) -> None:
    for ask in (topology.in_neighbors, topology.out_neighbors):
        for agent in (-1, 4):
            with pytest.raises(TopologyError, match=rf"agent must be in 0\.\.3; got {agent}"):
                ask(agent)
        with pytest.raises(TopologyError, match=r"agent must be a whole number; got 1\.5"):
            ask(1.5)  # type: ignore[arg-type]
        with pytest.raises(TopologyError, match="round must be at least 0; got -1"):
            ask(0, round=-1)
    with pytest.raises(TopologyError, match="round must be"):
        topology.mixing(round=-1)
    with pytest.raises(
        TopologyError, match=r"unknown mixing kind 'metropolitan'.*Did you mean 'metropolis'"
    ):
        topology.mixing(kind="metropolitan")  # type: ignore[arg-type]


def test_metropolis_refuses_directed_graphs() -> None:
    with pytest.raises(TopologyError, match="undirected graph; this one is directed"):
        Topology.random_neighbors(4, degree=1, seed=0).mixing(kind="metropolis")


def test_networkx_nodes_must_be_numbered() -> None:
    with pytest.raises(TopologyError, match="convert_node_labels_to_integers"):
        Topology.from_networkx(nx.grid_2d_graph(2, 2))
    assert Topology.from_networkx(nx.MultiDiGraph([(1, 0), (1, 0)])).links() == ((1, 0),)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "what to_config"),
        ({"name": "ring", "num_agents": 3, "edges": [[0, 1]]}, "what to_config.*directed"),
        ({"name": "ring", "num_agents": 3, "edges": None, "directed": False}, "what to_config"),
        ({"name": "ring", "num_agents": 2, "edges": [[0, 2]], "directed": False}, "names agent 2"),
        ({"name": "random-neighbors", "num_agents": 3, "degree": 1}, "what to_config.*seed"),
        (
            {"name": "random-neighbors", "num_agents": 3, "degree": 1, "seed": "x"},
            "seed must be a whole",
        ),
        ({"name": "random-neighbor", "num_agents": 3, "degree": 1, "seed": 0}, "Did you mean"),
        ([], "what to_config"),
    ],
)
def test_bad_configs(config: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_config(config)


def test_a_directed_edge_list_from_a_spec(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("0 1\n1 2\n")
    assert Topology.parse(f"directed-file:{path}", num_agents=3).links() == ((0, 1), (1, 2))
    assert Topology.parse(f"file:{path}", num_agents=3).links() == ((0, 1), (1, 0), (1, 2), (2, 1))


def test_networkx_weights_are_refused_and_not_dropped() -> None:
    ones = nx.from_numpy_array(np.array([[0, 1], [1, 0]]))  # each edge has the weight 1
    assert Topology.from_networkx(ones).links() == ((0, 1), (1, 0))
    ones[0][1]["weight"] = 0.5
    with pytest.raises(TopologyError, match=r"no weights here; edge \(0, 1\).* has 0.5"):
        Topology.from_networkx(ones)


@pytest.mark.parametrize(("n", "degree"), [(100, 90), (60, 57), (9, 6), (8, 7), (7, 6)])
def test_dense_regular_graphs_are_drawn_at_once(n: int, degree: int) -> None:
    graph = Topology.random_regular(n, degree=degree, seed=3)
    assert {len(graph.in_neighbors(i)) for i in range(n)} == {degree}
