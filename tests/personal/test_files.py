"""One door for all files of personal models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flower_mcepl import AgentData, ConfigError
from flower_mcepl.personal import predict, read_personal, reference_to
from flower_mcepl.personal.exporting import agreement, tensor_batches
from flower_mcepl.personal.files import Exported, check_ending, export_model
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.runs.settings import DeviceSettings
from tests.fleet.agents import make_agent, small_net, split


@pytest.mark.parametrize("name", ["model.h5", "model", "model.MASK"])
def test_an_ending_says_what_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ending in \.mask, \.pt2, \.onnx"):
        check_ending(tmp_path / name)


def test_nothing_agrees_on_no_inputs() -> None:
    assert not agreement(torch.neg, torch.neg, []).holds(1.0)
    assert agreement(torch.neg, torch.neg, [torch.ones(1, 2)]).holds(0.0)
    with pytest.raises(ConfigError, match="which gave no batch"):
        tensor_batches([], nn.Linear(2, 1))


@pytest.mark.parametrize("of_inputs", [torch.float64, torch.float16, torch.float32])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.float64])
def test_a_model_that_learned_from_any_floats_can_be_used(
    of_inputs: torch.dtype, of_weights: torch.dtype, tmp_path: Path
) -> None:
    """As training does, everything casts floats to the type of the weights."""
    build = small_net if of_weights == torch.float32 else double_net
    agent = make_agent(0, model_fn=build)
    (inputs, labels), other = split(0), split(1)
    kept = [(x.to(of_inputs), y) for x, y in ((inputs, labels), other)]
    agent.data = AgentData.of(*kept, agent=0)
    agent.train(round=1)
    exported = Exported(agent, 1, network=reference_to(build))
    for ending in EXPORTS.values():
        if ending != ".onnx":  # which needs the extra, and takes the same batches
            export_model(exported, tmp_path / f"a{ending}")
    assert read_personal(tmp_path / "a.mask").facts["probe"]["shape"] == [1, 1, 6, 6]
    np.save(tmp_path / "x.npy", kept[1][0].numpy())
    found = list(predict(tmp_path / "a.mask", [tmp_path / "x.npy"]))
    network = agent.personal_model()
    with torch.no_grad():
        outputs = network(kept[1][0].to(of_weights)).softmax(1)
    assert [row["class"] for row in found] == outputs.argmax(1).tolist()
    assert [row["probability"] for row in found] == pytest.approx(outputs.amax(1).tolist())


def double_net() -> nn.Module:
    return small_net().double()


def test_the_key_and_the_files_know_the_same_endings() -> None:
    for kind in EXPORTS:
        assert DeviceSettings(export=kind).export == kind
        check_ending(Path(f"a{EXPORTS[kind]}"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filters_layers": "0.weight=0.5"},
        {"filters_layers": "0.weight=0.5", "weight_init": "signed-constant"},
    ],
)
def test_no_weights_are_stored_of_masks_over_drawn_ones(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    agent = make_agent(0, **settings)
    agent.train(round=1)
    lines = export_model(Exported(agent, 1), tmp_path / "a.mask")
    assert not [line for line in lines if "are stored" in line]


def test_why_weights_are_stored_is_said(tmp_path: Path) -> None:
    agent = make_agent(0, model_fn=normal_net)
    lines = export_model(Exported(agent, 1), tmp_path / "a.mask")
    assert any("the run's seed does not draw them again" in line for line in lines)


def normal_net() -> nn.Module:
    module = small_net()
    nn.init.normal_(module.get_parameter("3.weight"))
    return module


@pytest.mark.parametrize("split", ["test", "validation"])
def test_metrics_name_the_split_that_they_are_of(split: str, tmp_path: Path) -> None:
    agent = make_agent(0)
    agent.data = replace(agent.data, evaluated=split)
    export_model(Exported(agent, 1, agent.evaluate()), tmp_path / "a.mask")
    facts = read_personal(tmp_path / "a.mask").facts
    assert (facts["metrics"], facts["metrics-of"]) == (agent.evaluate(), split)
    export_model(Exported(agent, 1), tmp_path / "b.mask")
    assert "metrics-of" not in read_personal(tmp_path / "b.mask").facts
