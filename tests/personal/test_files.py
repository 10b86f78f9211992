"""One door for all files of personal models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flower_mcepl import ConfigError
from flower_mcepl.personal.exporting import agreement, tensor_batches
from flower_mcepl.personal.files import Exported, check_ending, export_model
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.runs.settings import DeviceSettings
from tests.fleet.agents import make_agent


@pytest.mark.parametrize("name", ["model.h5", "model", "model.MASK"])
def test_an_ending_says_what_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ending in \.mask, \.pt2, \.onnx"):
        check_ending(tmp_path / name)


def test_nothing_agrees_on_no_inputs() -> None:
    assert not agreement(torch.neg, torch.neg, []).holds(1.0)
    assert agreement(torch.neg, torch.neg, [torch.ones(1, 2)]).holds(0.0)
    with pytest.raises(ConfigError, match="which gave no batch"):
        tensor_batches([])


def test_the_key_and_the_files_know_the_same_endings() -> None:
    for kind in EXPORTS:
        assert DeviceSettings(export=kind).export == kind
        check_ending(Path(f"a{EXPORTS[kind]}"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, ""),
        ({"filters_layers": "0.weight=0.5"}, "filters that are off scale the others' weights"),
        ({"filters_layers": "0.weight=0.5", "weight_init": "signed-constant"}, ""),
    ],
)
def test_why_weights_are_stored_is_said(settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    agent = make_agent(0, **settings)
    agent.train(round=1)
    lines = export_model(Exported(agent, 1), tmp_path / "a.mask")
    stored = [line for line in lines if "are stored" in line]
    assert bool(stored) == bool(why)
    assert all(why in line for line in stored)
