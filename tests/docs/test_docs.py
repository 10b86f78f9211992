"""What the pages say is true: links, code, commands, keys, names."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict, parse_config_args  # private: tests only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import flower_mcepl
from flower_mcepl import AgentData, ConfigError, MceplConfig, Topology, TopologyError, simulate
from flower_mcepl.agents import ALGORITHMS, make_agent
from flower_mcepl.agents.parts.initial_weights import InitialWeights
from flower_mcepl.agents.tasks.task import TASKS
from flower_mcepl.cli import app as command_line
from flower_mcepl.clients import make_client_app
from flower_mcepl.config.fields import field_keys
from flower_mcepl.data import DataSettings, Partition
from flower_mcepl.personal import save_personal
from flower_mcepl.record import RunRecord, read_run
from flower_mcepl.runs.settings import DeviceSettings, RunSettings
from flower_mcepl.studies import read_study
from tests.fleet.agents import make_fleet
from tests.fleet.grid import InProcessGrid

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
# the last word of the groups of entry points, which are no modules
ENTRY_POINTS = {"algorithms", "topologies", "fusions", "codecs", "tasks"}
# by tests/stories/test_drop_in.py, tests/stories/test_deployment.py, and the test of
# the doors
RUN_ELSEWHERE = {"docs/existing-apps.md", "examples/deployment/README.md", "docs/extending.md"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def table_cells(page: str) -> list[list[str]]:
    """The rows of all tables of a page, without their heads' rules."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if not line.startswith("| ---")
    ]


# --- links ---


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_links_lead_to_something() -> None:
    links = [(page, target) for page in PAGES for target in links_of(page)]
    assert len(links) > 100
    for page, target in links:
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.is_dir() or (place.is_file() and place.stat().st_size > 0), (page, target)
        assert not anchor or anchor in anchors(place), (page, target)


def links_of(page: Path) -> list[str]:
    """Where a page leads within the repository."""
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if not target.startswith("http")]


def test_every_page_of_docs_is_reached_from_another_one() -> None:
    links = {
        (ROOT / name).parent.joinpath(target).resolve()
        for name in NAMES
        for target in re.findall(r"\]\(([^)#]+)", text_of(name))
        if not target.startswith("http")
    }
    # the pages of the reference are also in the table of contents
    assert not {path for path in PAGES if path.parent == DOCS} - links


# --- code ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x)
        return logits


def a_split(seed: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % 3


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    assert 0 <= partition_id < num_partitions
    split = TensorDataset(*a_split(partition_id))
    return DataLoader(split, batch_size=4, shuffle=True), DataLoader(split, batch_size=4)


def a_context(**run_config: Any) -> Context:
    node_config = {"partition-id": 3, "num-partitions": 10}
    return Context(1, 7, node_config, RecordDict(), run_config)


def code_of(page: str) -> Iterator[str]:
    """The Python blocks of a page, with two rounds in place of forty."""
    for code in blocks(page, "python"):
        yield code.replace("num_rounds=40", "num_rounds=2")


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_app_of_getting_started_runs(in_a_folder: Path) -> None:
    client, server, without_config, without_flower = code_of("docs/getting-started.md")
    (settings,) = blocks("docs/getting-started.md", "toml")
    config = tomllib.loads(settings)["tool"]["flwr"]["app"]["config"] | {"num-rounds": 2}
    names: dict[str, Any] = {"Net": Net, "load_data": load_data}
    exec(client, names)
    app = names["app"]
    exec(server, names)
    names["main"](InProcessGrid(app, 10, config), a_context(**config))
    exec(without_config, names)
    names["main"](InProcessGrid(app, 10), a_context())
    records = [flower_mcepl.read_run(path) for path in (in_a_folder / "runs").iterdir()]
    assert [len(run.rounds) for run in records] == [10, 10]
    names |= {split: [a_split(agent) for agent in range(10)] for split in ("train", "test")}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(without_flower, names)
    assert 0 <= float(printed.getvalue().split()[-1]) <= 1
    assert torch.isfinite(names["agents"][0].model.bake()(torch.ones(1, 4))).all()


def test_the_code_about_algorithms_runs() -> None:
    stages, code = code_of("docs/algorithms.md")
    staged: dict[str, Any] = {}
    exec(stages, staged)
    assert staged["model_fn"](None).at_depth(1)(torch.zeros(2, 64)).shape == (2, 10)
    names: dict[str, Any] = {"net": Net(), "data": AgentData.of(a_split(1), a_split(2), agent=0)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    assert printed.getvalue().split() == ["dsgd", "0.1", *ALGORITHMS]


def test_the_code_about_pretrained_networks_runs(tmp_path: Path) -> None:
    (code,) = code_of("docs/pretrained.md")
    path = tmp_path / "backbone.safetensors"
    trained = {name: value + 1 for name, value in Net().state_dict().items()}
    safetensors.torch.save_file(trained, path)
    code = code.replace("/data/backbone.safetensors", path.as_posix()).replace('"fc*"', '"*bias"')
    names: dict[str, Any] = {"net": Net(), "data": AgentData.of(a_split(1), a_split(2), agent=0)}
    exec(code, names)
    weights = dict(names["agent"].model.module.named_parameters())
    layers = names["agent"].model.layers
    assert layers
    assert all(torch.equal(weights[name], trained[name]) for name in layers)
    assert names["origin"].startswith("file ")


def test_the_code_about_topologies_runs() -> None:
    (code,) = code_of("docs/topologies.md")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    assert printed.getvalue().startswith("erdos-renyi: 10 agents")
    assert names["bridge"].in_neighbors(2) == (0, 1, 3)


def test_the_code_about_schedules_runs(in_a_folder: Path) -> None:
    (code,) = code_of("docs/schedules.md")
    (spec,) = blocks("docs/schedules.md", "text")
    names: dict[str, Any] = {}
    exec(code, names)
    first = RunRecord.create(name="first", config={})
    options: dict[str, Any] = {"num_rounds": 3, "schedule": "async", "speeds": spec.strip()}
    simulate(make_fleet(4), Topology.ring(4), record=first, **options)
    again = names["again"](make_fleet(4), first.path, 3)
    run = read_run(first.path)
    assert run.result()["mean"] == again.result
    assert len(run.events) > 4


def test_the_code_about_data_runs(tmp_path: Path) -> None:
    # tests/studies/test_chosen.py tries how a best state is tested
    cached, chosen, divided = code_of("docs/data.md")
    assert "evaluate_best" in chosen
    names: dict[str, Any] = {"cache": tmp_path / "cache"}
    exec(cached, names)
    first, second = names["data_fn"](a_context()), names["data_fn"](a_context())
    assert torch.equal(first[0][1], second[0][1])
    assert len(list((tmp_path / "cache").glob("*.tensors"))) == 1
    names = {"labels": torch.arange(600) % 10}
    exec(divided, names)
    train, test = set(names["train"].tolist()), set(names["test"].tolist())
    assert train | test == set(names["mine"].tolist())
    assert not train & test


def test_the_code_about_tasks_runs() -> None:
    (code,) = code_of("docs/tasks.md")
    names: dict[str, Any] = {}
    exec(code, names)
    app = make_client_app(
        lambda context: Net(), lambda context: (a_split(1), a_split(2)), task=names["smooth"]
    )
    agent = app.agent_fn(a_context(algorithm="mcepl"))  # type: ignore[attr-defined]
    assert agent.evaluate().keys() == {"f1", "loss", "num-examples", "density"}


def test_the_code_about_the_resident_worker_names_functions() -> None:
    (code,) = code_of("docs/deployment.md")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["app"].names == ("my_app.task:model_fn", "my_app.task:data_fn", None)


def test_the_page_of_tasks_names_them_all() -> None:
    rows = {cells[0].split("`")[1]: cells for cells in table_cells("docs/tasks.md")[1:]}
    assert set(rows) == set(TASKS)
    for name, cells in rows.items():
        assert re.findall(r"`([a-z0-9-]+)`", cells[4]) == [*TASKS[name].metrics]
        assert re.findall(r"`([a-z0-9-]+)`", cells[4])[0] == TASKS[name].main


def test_the_code_about_records_runs(tmp_path: Path) -> None:
    (code,) = code_of("docs/studies.md")
    net = Net()
    agents = [
        make_agent("mcepl", i, net, AgentData.of(a_split(i), a_split(i), agent=i), {}, seed=1)
        for i in range(3)
    ]
    record = RunRecord.create(tmp_path, name="three", config={})
    simulate(agents, Topology.ring(3), num_rounds=2, evaluate_every=1, record=record)
    (folder,) = tmp_path.iterdir()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"folder": folder})
    head, *rounds = printed.getvalue().splitlines()
    assert head.split()[0] == "three"
    assert [line.split()[0] for line in rounds] == ["1", "2"]


def test_the_code_about_personal_models_runs(in_a_folder: Path) -> None:
    (code,) = code_of("docs/mask-file.md")
    save_personal(Net(), "agent-3.mask")
    names: dict[str, Any] = {"Net": Net, "images": torch.ones(2, 4)}
    exec(code, names)
    assert names["outputs"].shape == (2, 3)


def test_no_page_has_code_that_no_test_runs() -> None:
    run_here = {f"docs/{page}.md" for page in ("getting-started", "algorithms", "topologies")}
    run_here |= {"docs/data.md", "docs/studies.md", "docs/tasks.md", "docs/pretrained.md"}
    run_here |= {"docs/mask-file.md", "docs/deployment.md", "docs/schedules.md"}
    with_code = {name for name in NAMES if blocks(name, "python")}
    assert with_code - RUN_ELSEWHERE == run_here


def test_the_study_file_is_read(tmp_path: Path) -> None:
    (text,) = blocks("docs/studies.md", "toml")
    app = (ROOT / "examples" / "quickstart").as_posix()
    (tmp_path / "study.toml").write_text(text.replace("../quickstart", app))
    study = read_study(tmp_path / "study.toml")
    assert (study.name, study.engine, study.target) == ("ablation", "in-process", 0.9)
    assert len(study.runs) == 2 * 3 + 3


def test_the_settings_of_algorithms_are_known() -> None:
    (text,) = blocks("docs/algorithms.md", "toml")
    config = flatten_dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    for algorithm in ALGORITHMS:
        RunSettings.from_run_config({**config, "algorithm": algorithm})


# --- commands ---


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, as words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):  # quotes that end on another line
                yield shlex.split(line, comments=True)


@functools.cache
def help_of(command: str) -> str:
    result = CliRunner().invoke(command_line, [command, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, f"flower-mcepl {command}: {result.output}"
    return result.output


def test_commands_and_their_options_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for words in (words for name in NAMES for words in commands(name)):
        if words[:1] == ["flower-mcepl"]:
            explained = help_of(words[1])
            for option in (word for word in words if word.startswith("--")):
                assert option in explained, " ".join(words)
        if words[:1] == ["make"]:
            assert all(word in targets or "=" in word for word in words[1:]), words
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        if words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


def app_of(words: list[str], page: str) -> Path | None:
    """The folder of the app that a command runs, if it is one of the examples."""
    folders = [(base / word) for word in words for base in (ROOT, (ROOT / page).parent)]
    return next((folder for folder in folders if (folder / "pyproject.toml").is_file()), None)


def test_run_configs_name_keys_that_the_app_declares() -> None:
    """Flower takes no others."""
    for page, words in ((name, words) for name in NAMES for words in commands(name)):
        app = app_of(words, page)
        if app is None or app == ROOT or "--run-config" not in words:
            continue
        given = words[words.index("--run-config") + 1]
        if not given.endswith(".toml"):
            project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
            declared = flatten_dict(project["tool"]["flwr"]["app"]["config"])
            assert parse_config_args([given]).keys() <= declared.keys(), words


def test_contributing_names_targets_and_rooms_that_exist() -> None:
    text = text_of("CONTRIBUTING.md")
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= set(targets)
    assert all((ROOT / file).is_file() for file in re.findall(r"`python ([\w/.]+)`", text))
    (plan,) = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    drawn = set(re.findall(r"\b(\w+)(?:/|\.py)(?= |$)", plan, re.MULTILINE)) - {"parts", "tasks"}
    files = {path.name for path in (ROOT / "flower_mcepl").iterdir() if path.name[0] not in "_."}
    assert drawn == {name.removesuffix(".py") for name in files - {"py.typed"}}


def test_names_of_the_package_exist() -> None:
    text = "\n".join(text_of(name) for name in NAMES if name != "CHANGELOG.md")
    for dotted in set(re.findall(r"\bflower_mcepl(?:\.\w+)+(?!\.md)\b", text)):
        if dotted.endswith((".md", ".py")):
            continue
        module, _, attribute = dotted.rpartition(".")
        if attribute in ENTRY_POINTS:
            continue
        known = importlib.util.find_spec(module)
        assert known, dotted
        inside = hasattr(importlib.import_module(module), attribute)
        assert inside or importlib.util.find_spec(dotted), dotted


def test_the_page_of_commands_names_every_command() -> None:
    named = set(re.findall(r"^\| `flower-mcepl ([a-z]+)", text_of("docs/commands.md"), re.M))
    result = CliRunner().invoke(command_line, ["--help"], env={"COLUMNS": "300"})
    listed = result.output.partition("Commands:\n")[2].partition("\n\n")[0]
    assert named == set(re.findall(r"^  ([a-z]+) ", listed, re.MULTILINE))


# --- keys and names ---


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_keys_are_up_to_date(reference: ModuleType) -> None:
    """If this fails: python docs/reference.py."""
    page = text_of("docs/configuration.md")
    assert reference.with_tables(page) == page
    assert page.count("<!-- keys: ") == len(reference.TABLES)


def test_the_tables_name_every_key_with_its_true_default() -> None:
    rows = [cells for cells in table_cells("docs/configuration.md") if cells[0].startswith("`")]
    defaults = {
        cells[0].strip("`"): tomllib.loads(f"x = {cells[-2].split(';')[0].strip('`')}")["x"]
        for cells in rows
    }
    of_a_run = {key: value for key, value in defaults.items() if key != "state-dir"}
    assert RunSettings.from_run_config({**of_a_run, "threads": 1}, app_keys=defaults) == (
        RunSettings()
    )
    here = MceplConfig.from_run_config(defaults, agent=0)
    assert here == MceplConfig(first_retention={"conv": 0.3, "linear": 0.9})
    keys = field_keys(RunSettings, DeviceSettings, DataSettings, InitialWeights)
    for name, algorithm in ALGORITHMS.items():
        own = algorithm.keys()
        keys |= own
        for cells in rows:
            key = cells[0].strip("`")
            if key in own and len(cells) == 4 and not key.startswith("retention-"):
                value = getattr(algorithm.config(), key.replace("-", "_"))
                others = re.findall(r"`([^`]+)` in ([a-z, -]+)", cells[2])
                (text,) = [text for text, names in others if name in names.split(", ")] or [
                    cells[2].split(";")[0].strip("`")
                ]
                assert tomllib.loads(f"x = {text}")["x"] == value, (name, key)
    assert keys == set(defaults)


def test_the_page_about_resuming_names_what_may_change() -> None:
    free = {field.name for field in dataclasses.fields(RunSettings) if "free" in field.metadata}
    (named,) = re.findall(r"Only these may change: (.*?)\. ", text_of("docs/resume.md"), re.DOTALL)
    of_devices = {"state-runs", "tell-classes", "agent-cache", "export", "worker", "worker-idle"}
    free = {name.replace("_", "-") for name in free} - {"resume"}
    assert set(re.findall(r"`([a-z-]+)`", named)) == free | of_devices


def test_a_field_without_a_comment_is_refused(reference: ModuleType) -> None:
    @dataclasses.dataclass
    class Silent:
        """A class.

        Parameters
        ----------
        listed : int
            Said in the docstring,
            in two lines.

        Notes
        -----
        None.
        """

        beside: int = 1  # said beside
        # said above,
        # in two lines
        above: int = 2
        listed: int = 3
        unsaid: int = 4

    assert reference.meaning(Silent, "beside") == "said beside"
    assert reference.meaning(Silent, "above") == "said above, in two lines"
    assert reference.meaning(Silent, "listed") == "said in the docstring, in two lines"
    with pytest.raises(SystemExit, match=r"Silent\.unsaid needs a comment"):
        reference.meaning(Silent, "unsaid")


def first_codes(page: str) -> list[str]:
    """The code in the first cells of a page's tables."""
    return [code for cells in table_cells(page) for code in re.findall(r"`([^`]+)`", cells[0])]


def known_names(error: pytest.ExceptionInfo[Exception]) -> set[str]:
    """The names that an error lists as known."""
    return set(str(error.value).partition("known: ")[2].partition(".")[0].split(", "))


def test_the_page_of_algorithms_names_them_all() -> None:
    assert first_codes("docs/algorithms.md") == ["algorithm", *ALGORITHMS]


def test_every_topology_of_the_page_can_be_built(in_a_folder: Path) -> None:
    (graph,) = blocks("docs/topologies.md", "text")
    (in_a_folder / "graph.txt").write_text(graph)
    specs = first_codes("docs/topologies.md")[1:]
    with pytest.raises(TopologyError) as error:
        Topology.parse("?", num_agents=12)
    assert {spec.partition(":")[0] for spec in specs} == known_names(error)
    for spec in [*specs, "torus:rows=4", "erdos-renyi:probability=0.5"]:
        assert f"`{spec}`" in text_of("docs/topologies.md")
        assert Topology.parse(spec, num_agents=12, seed=1).num_agents == 12


def test_every_partition_of_the_page_is_known() -> None:
    specs = first_codes("docs/data.md")[1:]
    with pytest.raises(ConfigError) as error:
        Partition.parse("?")
    assert {Partition.parse(spec).text.partition(":")[0] for spec in specs} == known_names(error)


def test_the_table_of_extras_is_that_of_the_package() -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(first_codes("docs/getting-started.md")) == set(extras)


def test_the_first_page_of_the_reference_names_all_of_the_core() -> None:
    named = set(first_codes("docs/api/flower_mcepl.md"))
    errors = {name for name in flower_mcepl.__all__ if name.endswith("Error")}
    assert named == set(flower_mcepl.__all__) - errors
