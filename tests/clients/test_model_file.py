"""The personal model that a device or a simulation writes at the end of a run."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from flower_mcepl import ConfigError, load_personal
from flower_mcepl.clients import app as client_app
from flower_mcepl.clients import memory, model_file
from flower_mcepl.clients.memory import DiskMemory
from flower_mcepl.personal import files, read_personal
from flower_mcepl.runs.settings import DeviceSettings
from tests.fleet.agents import small_net, split
from tests.fleet.flower_messages import RUN, a_context, a_message, be_a_node, the_answer, the_app


@pytest.fixture(autouse=True)
def identity() -> None:
    be_a_node()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What Flower's logger is given."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def app_state(context: Context) -> dict[str, Any]:
    """What a device's newest state says of the best one that it keeps."""
    folder = Path(str(context.node_config["state-dir"]))
    state = DiskMemory(folder, run=RUN, agent=2, keep_runs=2, checkpoints=()).recall(before=99)
    assert state is not None
    assert state.best is not None
    best: dict[str, Any] = state.best.facts["best"]
    return best


def a_device(root: Path, **run: Any) -> Context:
    return a_context(2, node={"state-dir": str(root)}, **run)


def whole_run(context: Context, **closing: Any) -> dict[str, float]:
    """Two rounds and the end; the metrics of the last evaluation."""
    app = the_app()
    for round in (1, 2):
        app(a_message(round, neighbors=() if round > 1 else None), context)
    last = app(a_message(3, neighbors=(), evaluate=True, train=False, **closing), context)
    return the_answer(last).metrics


def test_a_device_keeps_its_model_below_its_states(tmp_path: Path, lines: list[str]) -> None:
    metrics = whole_run(a_device(tmp_path, export="mask"))
    file = tmp_path / "models" / RUN / "agent-0002.mask"
    facts = read_personal(file).facts
    assert facts["round"] == 2  # the last one in which anybody trained
    assert facts["metrics"]["accuracy"] == metrics["accuracy"]
    assert facts["metrics"].keys() == {"accuracy", "loss", "density", "num-examples"}
    images, labels = split(1002)
    predicted = load_personal(file, small_net)(images).argmax(1)
    accuracy = float((predicted == labels).float().mean())
    assert accuracy == pytest.approx(metrics["accuracy"])
    assert any(f"agent 2: {file}: " in line for line in lines)


def test_nothing_is_written_before_the_end_or_without_the_key(tmp_path: Path) -> None:
    the_app()(a_message(1), a_device(tmp_path / "a", export="mask"))
    whole_run(a_device(tmp_path / "b"))
    assert not (tmp_path / "a" / "models").exists()
    assert not (tmp_path / "b" / "models").exists()


def test_a_simulated_agent_hands_its_model_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    for module in (memory, client_app, model_file):
        monkeypatch.setattr(module, "in_simulation", lambda: True)
    context = a_context(2, node={"state-dir": str(tmp_path / "state")}, export="pt2")
    answer = the_answer(the_app()(a_message(1, train=False, store=True), context))
    assert [*answer.exported] == [".pt2"]
    assert not (tmp_path / "state").exists()
    file = tmp_path / "handed.pt2"
    file.write_bytes(answer.exported[".pt2"])
    program = torch.export.load(file).module()
    assert program(split(1002)[0][:3]).shape == (3, 3)
    assert any(line.startswith("agent 2: agent-0002.pt2: ") for line in lines)


def test_a_model_that_cannot_be_exported_is_not_handed_over(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    for module in (memory, client_app, model_file):
        monkeypatch.setattr(module, "in_simulation", lambda: True)

    def fails(model: Any, to: Path) -> list[str]:
        to.write_bytes(b"half of a file")
        raise RuntimeError("an exporter's own error")

    monkeypatch.setattr(files, "export_model", fails)
    context = a_context(2, node={"state-dir": ""}, export="pt2")
    answer = the_answer(the_app()(a_message(1, train=False, store=True), context))
    assert answer.state
    assert answer.exported == {}
    assert any("agent 2: its model was not exported to agent-0002.pt2" in line for line in lines)


def test_the_best_model_is_exported_where_one_was_kept(tmp_path: Path) -> None:
    context = a_device(tmp_path, export="mask")
    app = the_app()
    app(a_message(1), context)
    app(a_message(2, neighbors=(), evaluate=True, keep_best=True), context)
    before = tmp_path / "models" / RUN / "agent-0002.mask"
    app(a_message(3, neighbors=(), evaluate=True, train=False, keep_best=True), context)
    facts = read_personal(before).facts
    best = app_state(context)
    assert facts["round"] == best["round"]
    assert "metrics" not in facts  # the last evaluation was of another model


def test_a_file_that_cannot_be_written_costs_no_answer(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "models").write_text("a file in the folder's place", encoding="utf-8")
    metrics = whole_run(a_device(tmp_path, export="mask"))
    assert "accuracy" in metrics
    assert any("agent 2: its model was not exported to " in line for line in lines)


def test_whatever_an_exporter_meets_costs_no_answer(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> list[str]:
        raise RuntimeError("an exporter's own error")

    monkeypatch.setattr(files, "export_model", fails)
    assert "accuracy" in whole_run(a_device(tmp_path, export="mask"))
    assert any("an exporter's own error" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"export": "h5"}, 'export must be "mask", "pt2", "onnx", or "" for no file'),
        ({"export": "mask", "state_dir": "none"}, 'state-dir must not be "none" beside it'),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_run(
    settings: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        DeviceSettings(**settings)
