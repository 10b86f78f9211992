"""The small examples: with half of their agents, what they promise comes out, too."""

from pathlib import Path

import pytest

from flower_mcepl import read_run
from flower_mcepl.studies import read_study, run_study

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDY = """
app = '{app}'
out = '{out}'
engine = 'in-process'
[config]
num-agents = 5
topology = 'erdos-renyi:degree=2'
num-rounds = 12
evaluate-every = 12
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "reached"), [("regression", "rmse", 0.9), ("sequences", "accuracy", 0.8)]
)
def test_masks_learn_what_the_example_says(
    name: str, metric: str, reached: float, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    file = tmp_path / "study.toml"
    app = (EXAMPLES / name).as_posix()
    file.write_text(STUDY.format(app=app, out=(tmp_path / "runs").as_posix()), encoding="utf-8")
    outcomes = run_study(read_study(file))
    assert [outcome.error for outcome in outcomes] == [None]
    masks = read_run(outcomes[0].task.record)
    assert masks.metric.name == metric
    mean = masks.result()["mean"]
    assert masks.metric.reaches(mean, reached), mean
    assert masks.handshakes[0]["frozen_share"] < 0.1  # recurrent weights have masks, too
    assert masks.totals["links_total"] > 0
