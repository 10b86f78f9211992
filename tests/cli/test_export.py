"""``flower-mcepl export``, as a person uses it, on a small app's run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flower_mcepl import load_personal, read_run
from flower_mcepl.cli import app as command_line
from flower_mcepl.personal import personal_network, read_personal
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.studies import read_study, run_study
from flower_mcepl.studies.chosen import restored_agent
from tests.fleet.study_app import write_app, write_study

SPLITS = "return split(agent, scale), split(1000 + agent, scale)"
SETTINGS = 'evaluate-on = "validation"\nnum-rounds = 3\nkeep-best = true\n'

needs_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="needs torch >= 2.7"
)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An app with three splits that keeps its best states."""
    app = write_app(tmp_path_factory.mktemp("app"), "export")
    client = next(app.glob("*/client_app.py"))
    three = SPLITS.replace(", split(", ", split(2000 + agent, scale), split(")
    text = client.read_text().replace(SPLITS, three)
    reads = "def model_fn(context):\n    assert context.run_config['scale']\n"
    client.write_text(text.replace("def model_fn(context):\n", reads))
    settings = (app / "pyproject.toml").read_text().replace("num-rounds = 2\n", SETTINGS)
    (app / "pyproject.toml").write_text(settings)
    return app


@pytest.fixture(scope="module")
def run(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("study")
    study = read_study(write_study(folder, app, "[config]\nseed = 3\n"))
    assert [outcome.error for outcome in run_study(study)] == [None]
    (record,) = [path.parent for path in study.out.glob("*/config.json")]
    return read_run(record)


def export(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(command_line, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else str(result.exception)


def of_agent(run: Run, app: Path, state: str) -> tuple[torch.nn.Module, dict[str, float], Any]:
    with restored_agent(run, app, 2, state=state) as agent:
        inputs, _ = next(iter(agent.data.test.evaluation_batches(batch_size=99)))  # type: ignore[attr-defined]
        return personal_network(agent), agent.evaluate(), inputs


@pytest.mark.parametrize("state", ["best", "last"])
def test_a_mask_file_is_the_agents_model(run: Run, app: Path, tmp_path: Path, state: str) -> None:
    file = tmp_path / "a.mask"
    text = export(run.path, "--agent", "2", "--to", file, "--app", app, "--state", state)
    network, metrics, inputs = of_agent(run, app, state)
    loaded = load_personal(file)
    assert torch.equal(loaded(inputs), network(inputs))
    facts = read_personal(file).facts
    assert (facts["metrics"], facts["metrics-of"]) == (metrics, "test")
    assert (facts["algorithm"], facts["agent"], facts["task"]) == ("mcepl", 2, "classification")
    best = {row["agent"]: row["round"] for row in run.best_states()}[2]
    assert facts["round"] == (best if state == "best" else 3)
    assert facts["network"]["context"] == {"run_config": {"scale": 1.0}, "node_config": {}}
    assert read_personal(file).stored == 0
    assert f"{file}: {human_bytes(file.stat().st_size)} for 228 masked weights" in text
    assert f"agent 2, {state} state, accuracy {metrics['accuracy']:.4f}" in text


@pytest.mark.parametrize("algorithm", ["dsgd", "dispfl", "fedpm", "fedavg", "mask-averaging"])
def test_the_model_of_any_algorithm_is_exported(app: Path, tmp_path: Path, algorithm: str) -> None:
    settings = f'[config]\nalgorithm = "{algorithm}"\nkeep-best = false\n'
    study = read_study(write_study(tmp_path, app, settings))
    assert [outcome.error for outcome in run_study(study)] == [None]
    (record,) = [path.parent for path in study.out.glob("*/config.json")]
    to = tmp_path / "a.mask"
    text = export(record, "--agent", "1", "--to", to, "--app", app)
    run = read_run(record)
    with restored_agent(run, app, 1, state="last") as agent:
        inputs, _ = next(iter(agent.data.test.evaluation_batches(batch_size=99)))  # type: ignore[attr-defined]
        assert torch.equal(load_personal(to)(inputs), personal_network(agent)(inputs))
        assert read_personal(to).facts["metrics"] == agent.evaluate()
    stored = read_personal(to).stored
    assert (stored == 0) == (algorithm == "fedpm")
    assert ("weights that are stored" in text) == bool(stored)
    trained = "the algorithm trains weights" in text
    assert trained == (algorithm not in ("fedpm", "mask-averaging"))
    assert ("its rule of fusion blends masks" in text) == (algorithm == "mask-averaging")


def test_the_best_state_is_exported_where_there_is_one(run: Run, app: Path, tmp_path: Path) -> None:
    assert ", best state" in export(
        run.path, "--agent", "1", "--to", tmp_path / "a.mask", "--app", app
    )


def test_the_app_is_looked_for_around_the_record_and_here(
    run: Run, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (run.path, "--agent", "2", "--to", tmp_path / "a.mask")
    monkeypatch.chdir(tmp_path)
    assert "no folder around" in export(*arguments, code=1)
    monkeypatch.chdir(app)
    assert "agent 2" in export(*arguments)


@needs_torch
def test_a_program_gives_what_the_agent_predicts(run: Run, app: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.pt2"
    text = export(run.path, "--agent", "2", "--to", file, "--app", app)
    network, _, inputs = of_agent(run, app, "best")
    for size in (1, 5, 24):
        outputs = torch.export.load(file).module()(inputs[:size])
        torch.testing.assert_close(outputs, network(inputs[:size]))
    assert "same prediction for 24 of 24 inputs" in text


@pytest.mark.slow
@needs_torch
def test_an_onnx_file_gives_what_the_agent_predicts(run: Run, app: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "a.onnx"
    text = export(run.path, "--agent", "2", "--to", file, "--app", app)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    network, _, inputs = of_agent(run, app, "best")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in (1, 5, 24):
        (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs), network(inputs[:size]))
    assert re.search(r"outputs within \d.\de-0\d, the same prediction for 24 of 24", text)


def test_what_cannot_be_exported_says_why(run: Run, app: Path, tmp_path: Path) -> None:
    to, record = tmp_path / "a.mask", run.path
    for arguments, what in (
        ((record, "--agent", "2", "--to", tmp_path / "a.h5"), "ending in .mask, .pt2, .onnx"),
        ((record, "--agent", "2", "--to", tmp_path / "no" / "a.mask"), "the folder of"),
        ((record, "--agent", "9", "--to", to, "--app", app), "of the agents 0, 1, 2, 3; got 9"),
        ((record, "--agent", "2", "--to", to, "--app", tmp_path), "pyproject.toml"),
        ((record, "--agent", "2", "--to", to, "--app", app, "--state", "x"), "last or best"),
        ((tmp_path, "--agent", "2", "--to", to, "--app", app), "a run record is a folder"),
    ):
        assert what in export(*arguments, code=1)
    assert not to.exists()


@needs_torch
def test_a_network_that_gives_something_else_is_not_written(
    run: Run, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of exported files can fail."""
    monkeypatch.setattr(
        torch.export, "load", lambda file: SimpleProgram(torch.nn.Linear(36, 3)), raising=True
    )
    file = tmp_path / "a.pt2"
    assert "It was not written" in export(
        run.path, "--agent", "2", "--to", file, "--app", app, code=1
    )
    assert not file.exists()


@needs_torch
def test_a_network_that_onnx_does_not_have_is_said(
    run: Run, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")

    def refuses(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuses)
    text = export(run.path, "--agent", "2", "--to", tmp_path / "a.onnx", "--app", app, code=1)
    assert "cannot make ONNX of the network (RuntimeError: no such operator)" in text
    assert [*tmp_path.iterdir()] == []


class SimpleProgram:
    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer

    def module(self) -> Any:
        return lambda inputs: self.layer(inputs.flatten(1))


def test_how_images_become_inputs_goes_into_the_file(run: Run, app: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.mask"
    arguments = (run.path, "--agent", "2", "--to", to, "--app", app)
    export(*arguments, "--mean", ".5,.25", "--std", "2")
    assert read_personal(to).facts["pixels"] == {"mean": [0.5, 0.25], "std": [2.0]}
    assert "Give both" in export(*arguments, "--mean", ".5", code=1)


def test_a_file_that_is_replaced_is_said(run: Run, app: Path, tmp_path: Path) -> None:
    arguments = (run.path, "--agent", "0", "--to", tmp_path / "a.mask", "--app", app)
    assert "it replaces the file that was there" not in export(*arguments)
    assert "it replaces the file that was there" in export(*arguments)


def test_facts_of_a_file_are_json(run: Run, app: Path, tmp_path: Path) -> None:
    export(run.path, "--agent", "0", "--to", tmp_path / "a.mask", "--app", app)
    assert json.loads(json.dumps(read_personal(tmp_path / "a.mask").facts))["seed"] == 3
