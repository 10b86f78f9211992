"""Graphs that a package of somebody else adds work wherever a name does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_mcepl.doctor import OK, Order, examine
from flower_mcepl.errors import ConfigError, TopologyError
from flower_mcepl.record.reading import read_run
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.runs.simulation import simulate
from flower_mcepl.topology import TOPOLOGIES, Topology
from tests.fleet.agents import make_fleet
from tests.fleet.installed import install, installed
from tests.fleet.study_app import write_app

CAROUSELS = Path(__file__).parents[1] / "fleet" / "carousels.py"
ENTRY_POINTS = """[flower_mcepl.topologies]
lattice = carousels:LATTICE
carousel = carousels:CAROUSEL"""
RECORD = {"name": "carousel", "num_agents": 9, "package": "carousels", "step": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "packages"
    install(folder, "carousels", ENTRY_POINTS, CAROUSELS.read_text(encoding="utf-8"))
    return folder


@pytest.fixture
def packages(folder: Path) -> Iterator[Path]:
    with installed(folder, TOPOLOGIES):
        yield folder


@pytest.mark.usefixtures("packages")
def test_its_names_are_names_like_others() -> None:
    assert list(TOPOLOGIES)[-2:] == ["carousel", "lattice"]
    grid = Topology.parse("lattice:width=3", num_agents=6)
    assert (
        grid.links()
        == Topology.from_edges(
            [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)], num_agents=6
        ).links()
    )
    assert (grid.name, grid.directed, grid.time_varying) == ("lattice", False, False)
    turning = Topology.parse("carousel:step=2", num_agents=9, seed=5)
    assert (turning.name, turning.directed, turning.time_varying) == ("carousel", True, True)
    assert [turning.out_neighbors(8, round=t) for t in range(5)] == [(0,), (2,), (4,), (6,), (0,)]
    with pytest.raises(TopologyError, match=r"known: carousel, complete.*Did you mean 'lattice'"):
        Topology.parse("latice:width=3", num_agents=6)
    with pytest.raises(TopologyError, match="lattice needs width"):
        Topology.parse("lattice", num_agents=6)
    with pytest.raises(TopologyError, match="width must divide the 7 agents"):
        Topology.parse("lattice:width=3", num_agents=7)


@pytest.mark.usefixtures("packages")
def test_its_graphs_come_back_from_their_records() -> None:
    for line in ("carousel", "carousel:step=2", "carousel:step=7", "lattice:width=3"):
        topology = Topology.parse(line, num_agents=9, seed=3)
        again = Topology.from_config(json.loads(json.dumps(topology.to_config())))
        assert again == topology
        assert all(again.links(round=t) == topology.links(round=t) for t in range(40))


@pytest.mark.usefixtures("packages")
def test_settings_know_them() -> None:
    settings = RunSettings.from_run_config({"topology": "lattice:width=2", "num-agents": 4})
    assert settings.graph() == Topology.parse("lattice:width=2", num_agents=4)
    with pytest.raises(ConfigError, match="need an undirected graph"):
        RunSettings.from_run_config({"topology": "carousel", "algorithm": "dsgd"})


@pytest.mark.usefixtures("packages")
def test_the_doctor_examines_a_run_over_them(tmp_path: Path) -> None:
    app = write_app(tmp_path, "carousel")
    checks = {finding.check: finding for finding in examine(Order(app, ["topology='carousel'"]))}
    assert checks["graph"].status == OK
    assert checks["graph"].found.startswith("carousel: 4 agents, round 0: 4 directed links")


def test_a_run_is_recorded_and_its_graph_read_where_the_package_is(
    packages: Path, tmp_path: Path
) -> None:
    topology = Topology.parse("carousel:step=2", num_agents=9)
    record = RunRecord.create(tmp_path, name="turning", config={})
    simulate(make_fleet(9), topology, num_rounds=2, record=record)
    recorded = read_run(record.path).config["topology"]
    assert recorded == RECORD
    assert Topology.from_config(recorded) == topology
    heard = {(link["sender"], link["receiver"]) for link in read_run(record.path).summary["links"]}
    assert heard == {*topology.links(round=1), *topology.links(round=2)}


def test_a_record_says_which_package_is_missing() -> None:
    with pytest.raises(
        TopologyError, match="'carousel' is built by the package 'carousels', which"
    ):
        Topology.from_config(RECORD)
    # the edges of a graph that never changes need no package
    lattice = {"name": "lattice", "num_agents": 2, "directed": False, "edges": [[0, 1]]}
    assert Topology.from_config(lattice).links() == ((0, 1), (1, 0))


@pytest.mark.usefixtures("packages")
def test_a_record_of_another_package_is_not_read_with_this_one() -> None:
    with pytest.raises(TopologyError, match="was built by 'merry', and here 'carousels' adds"):
        Topology.from_config({**RECORD, "package": "merry"})
    without = {key: value for key, value in RECORD.items() if key != "package"}
    with pytest.raises(TopologyError, match="was built by 'flower_mcepl', and here 'carousels'"):
        Topology.from_config(without)
    with pytest.raises(TopologyError, match=r"what to_config.*unexpected keyword argument 'stop'"):
        Topology.from_config({**RECORD, "stop": 1})


@pytest.mark.slow
def test_another_process_needs_no_import_of_it(folder: Path) -> None:
    code = (
        "import sys, json; from flower_mcepl.topology import Topology\n"
        "assert 'carousels' not in sys.modules and 'networkx' not in sys.modules\n"
        f"graph = Topology.from_config({RECORD})\n"
        "assert Topology.parse('carousel:step=2', num_agents=9) == graph\n"
        "print(json.dumps(graph.to_config()))"
    )
    path = os.pathsep.join([str(folder), str(CAROUSELS.parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert json.loads(done.stdout) == RECORD
