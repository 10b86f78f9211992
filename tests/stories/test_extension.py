"""A package of somebody else: built, installed into a folder, and used by name wherever
names are read.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from flower_mcepl import ConfigError
from flower_mcepl.agents import ALGORITHMS, make_server
from flower_mcepl.record.reading import read_run
from flower_mcepl.runs.settings import RunSettings
from tests.fleet.agents import small_net
from tests.fleet.deployment import NODES, Fleet
from tests.fleet.study_app import write_app, write_study

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "extension"
PAGE = ROOT / "docs" / "extending.md"
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the example package is installed: its wheel, unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(PACKAGE, folder / "source")  # building leaves files behind
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")
    return folder / "site"


def run(code: str, *, site: Path | None, folder: Path) -> str:
    """What a fresh interpreter prints that finds the folder on its path."""
    path = [str(place) for place in (site, ROOT) if place is not None]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


SIMULATION = """
import numpy as np
from flower_mcepl import RunRecord, Topology, read_run, simulate
from flower_mcepl import ConfigError
from flower_mcepl.agents import ALGORITHMS, make_server
from flower_mcepl.report.final_masks import final_masks
from tests.oracles.baselines import fleet_of
from tests.fleet.agents import same_tensors, small_net, split

assert list(ALGORITHMS)[-1] == "hard-threshold"
graph = Topology.parse("chordal-ring:chord=2", num_agents=5, seed=0)
assert graph.in_neighbors(0, round=1) == (1, 2, 3, 4)
options = {"model_fn": small_net, "split": split}


def play(algorithm, **settings):
    agents = fleet_of(algorithm, 5, **options, **settings)
    record = RunRecord.create(name="own", config={"run_config": {"algorithm": algorithm}})
    simulate(agents, graph, num_rounds=2, evaluate_every=1, record=record)
    return agents, read_run(record.path)


agents, run = play("hard-threshold", kept=0.25)
masks, problem = final_masks(run)
assert problem is None, problem
for agent in agents:
    assert agent.describe()["algorithm"] == "hard-threshold"
    assert masks[agent.index].keys() == {"0.weight", "3.weight"}
    for name, mask in masks[agent.index].items():
        assert np.array_equal(mask, agent.weights[name].detach().numpy() != 0)
        assert mask.sum() == mask.size - int(0.75 * mask.size)
    assert run.final()[agent.index]["density"] == agent.density() < 0.3

overlap, plain = (play("mcepl", fusion=rule) for rule in ("overlap", "mcepl"))
assert final_masks(overlap[1])[1] is final_masks(plain[1])[1] is None
for own, other in zip(overlap[0], plain[0], strict=True):
    assert own.parameters()["fusion"] == "overlap"
    assert not same_tensors(own.state().tensors, other.state().tensors)
    for name, mask in final_masks(overlap[1])[0][own.index].items():
        assert np.array_equal(mask, own.model.masks()[name].numpy())

coarse, exact = (play("dfedavgm", precision=p)[1] for p in ("int4", "float32"))
assert coarse.summary["bytes"]["links_total"] < 0.4 * exact.summary["bytes"]["links_total"]
print(run.path)
"""


@pytest.mark.slow
def test_its_names_work_in_simulate(installed: Path, tmp_path: Path) -> None:
    path = run(SIMULATION, site=installed, folder=tmp_path).strip()
    # without the package a record says whose masks it cannot read
    alone = f"""
from flower_mcepl import read_run
from flower_mcepl.report.final_masks import final_masks
print(final_masks(read_run({path!r}))[1])
"""
    assert "no package that is installed here gives the algorithm hard-threshold" in run(
        alone, site=None, folder=tmp_path
    )


COMMANDS = """
import sys
from typer.testing import CliRunner
from flower_mcepl.cli import app

for line in sys.argv[1:]:
    done = CliRunner().invoke(app, line.split("|"), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    print(done.output)
"""

STUDY = """
[config]
topology = "chordal-ring:chord=2"
[[runs]]
label = "own-fusion"
fusion = "overlap"
[[runs]]
label = "own-algorithm"
algorithm = "hard-threshold"
"hard-threshold.kept" = 0.4
[[runs]]
label = "own-codec"
algorithm = "dfedavgm"
"dfedavgm.precision" = "int4"
"""

SECTIONS = """
[tool.flwr.app.config.hard-threshold]
kept = 0.5

[tool.flwr.app.config.dfedavgm]
precision = "float32"
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """An app whose config has the keys of the package."""
    app = write_app(tmp_path, "extension")
    pyproject = app / "pyproject.toml"
    text = pyproject.read_text().replace("seed = 7", 'seed = 7\nfusion = "mcepl"', 1)
    pyproject.write_text(text + SECTIONS)
    return app


@pytest.mark.slow
def test_its_names_work_in_studies_and_all_commands(
    installed: Path, tmp_path: Path, app: Path
) -> None:
    study = write_study(tmp_path, app, STUDY)
    settings = """algorithm="hard-threshold" topology="chordal-ring:chord=2"
        hard-threshold.kept=0.3
        """
    lines = [
        f"data|{app}|--run-config|{settings}",
        f"doctor|{app}|--run-config|{settings}|--json",
        f"run|{study}",
        f"plot|{tmp_path / 'out'}",
    ]
    printed = run(
        f"import sys; sys.argv[1:] = {lines!r}\n{COMMANDS}", site=installed, folder=tmp_path
    )
    assert "algorithm hard-threshold" in printed
    assert "chordal-ring" in printed
    drawn = sorted(path.name for path in (tmp_path / "out" / "plots").glob("[af][gi]*.png"))
    # DFedAvgM has no masks
    assert drawn == [
        f"{picture}-{run}.png"
        for picture in ("agreement", "filters")
        for run in ("01-own-fusion", "02-own-algorithm")
    ]


@pytest.mark.slow
def test_a_setting_of_its_own_is_checked(installed: Path, tmp_path: Path, app: Path) -> None:
    code = """
from flower_mcepl import ConfigError, TopologyError
from flower_mcepl.runs.settings import RunSettings

def refused(error, **config):
    try:
        RunSettings.from_run_config({key.replace("_", "-"): value for key, value in config.items()})
    except error as problem:
        return str(problem)

print(refused(ConfigError, algorithm="hard-treshold"))
print(refused(ConfigError, algorithm="hard-threshold", kept="half"))
print(refused(ConfigError, algorithm="hard-threshold", keept=0.5))
print(refused(TopologyError, topology="chordal-ring:chord=99"))
print(refused(ConfigError, fusion="overlapp"))
"""
    lines = run(code, site=installed, folder=tmp_path).splitlines()
    expected = [
        r"unknown algorithm 'hard-treshold'; .*Did you mean 'hard-threshold'\?",
        r"run-config key kept must be float; got 'half'",
        r"unknown run-config key 'keept'. Did you mean 'kept'\?",
        r"the chord of a chordal-ring must be in 2\.\.9 .*got 99",
        r"unknown fusion rule 'overlapp'; known: .*, overlap\. Did you mean 'overlap'\?",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line


def test_a_package_that_does_not_load_disturbs_its_own_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = metadata.EntryPoint("broken", "no_such_package:ALGORITHM", ALGORITHMS.group)
    monkeypatch.setitem(ALGORITHMS._built_in, "broken", entry)
    assert "broken" in ALGORITHMS
    assert RunSettings.from_run_config({"dsgd.lr": 0.1}) == RunSettings()
    with pytest.raises(ConfigError, match=r"'broken' cannot be loaded .*no_such_package"):
        RunSettings.from_run_config({"algorithm": "broken", "broken.lr": 0.1})
    with pytest.raises(
        ConfigError, match=r"algorithms with a server are fedavg, ditto, fedspa, fedpm;"
    ):
        make_server("dsgd", small_net(), 2, {}, seed=1)


ONE_AGENT = """
import sys, torch
import flower_mcepl.clients
from flower_mcepl import AgentData, shared_module
from flower_mcepl.agents import make_agent

net = shared_module(lambda: torch.nn.Linear(4, 3), seed=1)
split = (torch.randn(6, 4), torch.arange(6) % 3)
agent = make_agent(NAME, 0, net, AgentData.of(split, split, agent=0), {"fusion": "mcepl"}, seed=1)
agent.train(round=1)
print(*sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dsgd", {"dsgd"}),
        ("mask-averaging", {"mask_variants", "mcepl"}),
        ("hard-threshold", {"algorithm"}),
    ],
)
def test_a_device_loads_its_own_algorithm_alone(
    name: str, own: set[str], installed: Path, tmp_path: Path
) -> None:
    loaded = run(ONE_AGENT.replace("NAME", repr(name)), site=installed, folder=tmp_path).split()
    built_in = {reference.value.partition(":")[0] for reference in ALGORITHMS._built_in.values()}
    others = {f"flower_mcepl.agents.{name}" for name in ("neighbor_average", "own_loop")}
    extras = {f"mcepl_extras.{path.stem}" for path in (PACKAGE / "mcepl_extras").glob("[a-z]*.py")}
    assert {
        module.rpartition(".")[2] for module in loaded if module in built_in | others | extras
    } == own


# --- the page ---


def test_the_page_shows_the_files_of_the_package() -> None:
    shown = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    files = [PACKAGE / "pyproject.toml", *(PACKAGE / "mcepl_extras").glob("[a-z]*.py")]
    assert sorted(shown) == sorted(file.read_text() for file in files)
    for file in files:
        assert len(file.read_text().splitlines()) <= 40, file


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "mcepl_extras").glob("*.py")), ids=lambda f: f.name
)
def test_the_package_uses_public_names_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Attribute) or not node.attr.startswith("_")
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flower_mcepl"):
            face = importlib.import_module(str(node.module))
            assert {alias.name for alias in node.names} <= set(face.__all__)


def test_a_face_shows_what_it_names() -> None:
    from flower_mcepl import agents

    assert set(agents.__all__) <= set(dir(agents))
    assert all(getattr(agents, name) is not None for name in agents.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FedavgAgent'"):
        agents.FedavgAgent  # type: ignore[attr-defined]  # noqa: B018


# --- under Flower ---


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        'algorithm="hard-threshold" topology="chordal-ring:chord=2"',
        'algorithm="mcepl" fusion="overlap" topology="chordal-ring"',
        'algorithm="dfedavgm" dfedavgm.precision="int4"',
    ],
)
def test_its_names_work_under_flower_with_ray_workers(
    settings: str, installed: Path, tmp_path: Path
) -> None:
    command = ["-m", "flower_mcepl.launch", str(QUICKSTART), "--timeout", "600", "--run-config"]
    done = subprocess.run(
        [sys.executable, *command, f"num-rounds=2 num-agents=6 evaluate-every=1 {settings}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (installed, ROOT)))},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = (tmp_path / "runs").iterdir()
    run = read_run(record)
    assert run.summary is not None
    assert run.summary["status"] == "finished"
    assert len(run.final()) == 6
    for key, value in re.findall(r'(algorithm|topology|fusion)="([^"]+)"', settings):
        assert run.config["run_config"][key] == value


@pytest.mark.flower
@pytest.mark.slow
def test_its_names_work_on_supernodes(
    installed: Path, tmp_path: Path, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (installed, ROOT))))
    with Fleet(tmp_path / "fleet") as fleet:
        fleet.up()
        settings = (
            'num-agents=3 num-rounds=2 algorithm="hard-threshold" topology="chordal-ring:chord=2"'
        )
        fleet.finish(fleet.start_run(app, settings))
        run = read_run(fleet.record())
        states = [fleet.stored_state(agent).state for agent in range(len(NODES))]
    assert {state.facts["algorithm"] for state in states} == {"hard-threshold"}
    assert run.config["topology"]["name"] == "chordal-ring"
    assert all(row["density"] < 0.6 for row in run.final().values())
