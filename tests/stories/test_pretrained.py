"""The example pretrained: its file is made, and what it says of masks comes out."""

import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from flower_mcepl import read_run
from flower_mcepl.studies import read_study, run_study

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

APP = Path(__file__).parents[2] / "examples" / "pretrained"
STUDY = """
app = '{app}'
out = '{out}'
engine = 'in-process'
[config]
weights = 'file:{weights}'
num-agents = 4
num-rounds = 4
evaluate-every = 4
"""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(APP))
    for name in [name for name in sys.modules if name.startswith("mcepl_pretrained")]:
        monkeypatch.delitem(sys.modules, name)
    threads = torch.get_num_threads()
    pretrain = runpy.run_path(str(APP / "pretrain.py"))["pretrain"]
    paths = [tmp_path / "once.safetensors", tmp_path / "again.safetensors"]
    for path in paths:
        assert pretrain(path, steps=5) >= 0
    torch.set_num_threads(threads)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    return paths[0]


@pytest.mark.slow
def test_agents_begin_from_the_file_and_say_so(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    text = STUDY.format(app=APP.as_posix(), out=(tmp_path / "runs").as_posix(), weights=weights)
    file.write_text(text, encoding="utf-8")
    outcomes = run_study(read_study(file))
    assert [outcome.error for outcome in outcomes] == [None]
    run = read_run(outcomes[0].task.record)
    origins = {handshake["weights_from"] for handshake in run.handshakes.values()}
    assert len(origins) == 1
    assert origins.pop().startswith("file ")
    assert run.totals["links_total"] > 0


def test_its_comparison_is_sound() -> None:
    study = read_study(APP / "compare.toml")
    keys = tomllib.loads((APP / "compare.toml").read_text(encoding="utf-8"))
    assert len(study.runs) == sum(len(run["seed"]) for run in keys["runs"])
