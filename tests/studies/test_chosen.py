"""Best states of a whole app's run, tested once the choice is made."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import ConfigError, read_run
from flower_mcepl.agents import load_state
from flower_mcepl.errors import RecordError, StateError
from flower_mcepl.record.reading import Run
from flower_mcepl.studies import evaluate_best, read_study, run_study
from flower_mcepl.studies.engines import agent_of_node
from flower_mcepl.studies.flower_app import read_app
from tests.fleet.study_app import write_app, write_study

ROOT = Path(__file__).parents[2]
SPLITS = "return split(agent, scale), split(1000 + agent, scale)"
SETTINGS = 'evaluate-on = "validation"\nnum-rounds = 9\nkeep-best = true\npatience = 1\n'


# One a worker: worksteal may come back to this file, and a process has one module of
# a name.
@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An app with three splits that keeps its best states."""
    app = write_app(tmp_path_factory.mktemp("app"), "chosen")
    client = next(app.glob("*/client_app.py"))
    text = client.read_text()
    assert SPLITS in text
    three = SPLITS.replace(", split(", ", split(2000 + agent, scale), split(")
    client.write_text(text.replace(SPLITS, three))
    settings = (app / "pyproject.toml").read_text().replace("num-rounds = 2\n", SETTINGS)
    (app / "pyproject.toml").write_text(settings)
    return app


@pytest.fixture(scope="module")
def run(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The record of its run in a study."""
    folder = tmp_path_factory.mktemp("study")
    study = read_study(write_study(folder, app, "[config]\nseed = 3\n"))
    assert [outcome.error for outcome in run_study(study)] == [None]
    (found,) = [read_run(path.parent) for path in study.out.glob("*/config.json")]
    return found


def test_a_study_in_process_chooses_too(run: Run) -> None:
    assert run.finished
    assert run.stopped_early["planned"] == 9
    assert run.num_rounds == run.stopped_early["round"] < 9
    assert [*run.best_agents] == [0, 1, 2, 3]


def test_best_states_are_tested_on_the_test_split(run: Run, app: Path) -> None:
    tested = evaluate_best(run, app)
    assert [*tested] == [0, 1, 2, 3]
    assert {metrics["num-examples"] for metrics in tested.values()} == {24}
    validated = {entry["agent"]: entry["value"] for entry in run.best_states()}
    by_split = {"test": {a: m["accuracy"] for a, m in tested.items()}, "validation": validated}
    for split, values in by_split.items():
        assert {agent: evaluated(app, run, agent, split) for agent in values} == values
    assert by_split["test"] != validated


def evaluated(app: Path, run: Run, agent: int, split: str) -> float:
    """By hand: the agent built on a split, with the state from its file."""
    chooses_nothing = {"keep-best": False, "patience": 0}
    config: dict[str, Any] = {**run.settings, **chooses_nothing, "evaluate-on": split}
    with agent_of_node(read_app(app), config, {"partition-id": agent}) as built:
        built.restore(load_state(run.path / "agents" / f"agent-{agent:04d}-best.safetensors"))
        return built.evaluate()["accuracy"]


def test_the_code_of_the_page_runs(run: Run, app: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "best" in c)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("examples/quickstart", str(app)), {"folder": run.path})
    lines = [line.split() for line in printed.getvalue().splitlines() if "talks" not in line]
    tested = evaluate_best(run, app)
    assert lines == [[str(agent), str(m["accuracy"])] for agent, m in tested.items()]


def test_other_runs_are_refused(run: Run, app: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(run.config))
    with pytest.raises(RecordError, match="kept by a simulated run with keep-best = true"):
        evaluate_best(read_run(tmp_path), app)
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "agent-0000-best.safetensors").write_bytes(b"x")
    with pytest.raises(StateError, match="is no readable agent state"):
        evaluate_best(read_run(tmp_path), app)


def test_an_agent_of_other_parameters_gets_no_state(run: Run, app: Path, tmp_path: Path) -> None:
    """Its app is no longer that of the run: it would be another model."""
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    config = json.loads((copy / "config.json").read_text())
    parameters = config["agents"][0]["parameters"]
    parameters["of_another_release"] = parameters.pop("momentum")
    (copy / "config.json").write_text(json.dumps(config))
    assert evaluate_best(read_run(copy), app) == evaluate_best(run, app)
    parameters["retention"]["linear"] = 0.75
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"retention of agent 0 was \{.*'linear': 0\.75\} in .* builds it with \{"
    ):
        evaluate_best(read_run(copy), app)


def test_the_test_split_is_refused_before_anything_starts(app: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, app, "[config]\nevaluate-on = 'test'\n")
    with pytest.raises(ConfigError, match="evaluate-on must be \"validation\"; got 'test'"):
        read_study(study)
