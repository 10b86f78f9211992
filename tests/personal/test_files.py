"""One door for all files of personal models."""

from pathlib import Path
from typing import Any

import pytest

from flower_mcepl import ConfigError
from flower_mcepl.personal.files import Exported, check_ending, export_model
from tests.fleet.agents import make_agent


@pytest.mark.parametrize("name", ["model.h5", "model", "model.MASK"])
def test_an_ending_says_what_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ending in \.mask, \.pt2, \.onnx"):
        check_ending(tmp_path / name)


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
