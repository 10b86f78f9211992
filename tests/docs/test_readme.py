"""What the READMEs show works: the change of an ordinary app, the examples' keys."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flower_mcepl import Topology
from flower_mcepl.agents import ALGORITHMS
from flower_mcepl.clients import make_client_app
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.studies import read_study
from tests.fleet.grid import InProcessGrid

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Rows(Dataset[dict[str, Any]]):
    """As flwr-datasets gives them: dicts of columns."""

    def __init__(self, partition: int) -> None:
        self.img = torch.randn(12, 4, generator=torch.Generator().manual_seed(partition))

    def __len__(self) -> int:
        return len(self.img)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"img": self.img[index], "label": int(self.img[index].sum() > 0)}


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """As in Flower's own quickstart."""
    assert 0 <= partition_id < num_partitions
    return DataLoader(Rows(partition_id), batch_size=4, shuffle=True), DataLoader(
        Rows(partition_id), batch_size=4
    )


def added_lines() -> str:
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    changed = [line for line in diff.splitlines() if line[:1] in "+-"]
    assert len(diff.splitlines()) <= 12
    return "\n".join(line[1:] for line in changed if line.startswith("+"))


def test_the_change_of_an_ordinary_app_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = added_lines().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("app"))
    names: dict[str, Any] = {"Net": Net, "load_data": load_data, "make_client_app": make_client_app}
    exec("\n".join(lines[start:]), names)
    grid = InProcessGrid(names["app"], 10)
    names |= {"grid": grid, "Topology": Topology, "GossipStrategy": GossipStrategy}
    exec("\n".join(lines[:start]).replace("num_rounds=40", "num_rounds=2"), names)
    assert len(names["strategy"].monitor.rows) == 10
    assert list((tmp_path / "runs").iterdir())


def test_cifar10s_readme_tells_its_own_keys_and_presets() -> None:
    folder = ROOT / "examples" / "cifar10"
    text = (folder / "README.md").read_text()
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    (own,) = re.findall(
        r"^APP_KEYS = \[(.+?)\]",
        (folder / "mcepl_cifar10" / "server_app.py").read_text(),
        re.M | re.S,
    )
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \| ([^|]+) \|", text, re.MULTILINE)
    shown = {
        key: tomllib.loads(f"x = {value}")["x"]
        for keys, values in rows
        for key, value in zip(
            re.findall(r"`([a-z-]+)`", keys), values.replace("`", "").split(", "), strict=True
        )
    }
    assert shown == {key: config[key] for key in re.findall(r'"([a-z-]+)"', own)}
    presets = {path.name for path in (folder / "presets").iterdir()}
    assert set(re.findall(r"\(presets/([a-z]+\.toml)\)", text)) == presets
    study = read_study(ROOT / "examples" / "paper" / "cifar10-presets.toml")
    for preset in presets:  # what the study runs, and docs/results.md tells, is what ships
        settings = tomllib.loads((folder / "presets" / preset).read_text())
        (run,) = [run for run in study.runs if f"{run.label}.toml" == preset]
        assert run.config.items() >= settings.items()
        changed = {key for key, value in config.items() if run.config.get(key, value) != value}
        assert changed - {"num-rounds", "evaluate-every", "seed"} <= settings.keys()


@pytest.mark.parametrize("app", ["quickstart", "cifar10", "pretrained"])
def test_the_examples_settings_are_all_known(app: str) -> None:
    folder = ROOT / "examples" / app
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    server = (folder / f"mcepl_{app}" / "server_app.py").read_text()
    app_keys = re.findall(r'"([a-z]+(?:-[a-z]+)*)"', server)
    sections = {name: keys for name, keys in config.items() if isinstance(keys, dict)}
    plain = {key: value for key, value in config.items() if key not in sections}
    flat = {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }
    for algorithm in ALGORITHMS:
        settings = RunSettings.from_run_config(
            {**plain, **flat, "algorithm": algorithm}, app_keys=app_keys
        )
        assert settings.algorithm == algorithm
    assert sections.keys() <= ALGORITHMS.keys()
