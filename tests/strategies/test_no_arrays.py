"""A server app of before: it evaluates a global model, and saves one."""

import logging
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, MetricRecord

from flower_mcepl import ConfigError, Topology
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import make_agent
from tests.fleet.flower import agent_grid

SAVES = {
    "torch": lambda arrays: arrays.to_torch_state_dict(),
    "numpy": lambda arrays: arrays.to_numpy_ndarrays(),
    "one by name": lambda arrays: arrays["fc.weight"],
}


@pytest.mark.parametrize("how", SAVES)
def test_who_saves_the_global_model_is_told_where_the_models_are(how: str, tmp_path: Path) -> None:
    strategy = GossipStrategy(topology=Topology.ring(2), record=tmp_path)
    result = strategy.start(agent_grid(2, make_agent), num_rounds=1)
    assert len(result.arrays) == 0
    (record,) = tmp_path.iterdir()
    with pytest.raises(ConfigError, match="has no global one") as refusal:
        SAVES[how](result.arrays)
    assert f"flower-mcepl show {record}" in str(refusal.value)


def test_an_evaluate_fn_that_wants_a_model_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rounds = []

    def evaluate_fn(round: int, arrays: ArrayRecord) -> MetricRecord:
        rounds.append(round)
        return MetricRecord({"size": len(arrays.to_torch_state_dict())})

    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        strategy = GossipStrategy(topology=Topology.ring(2), record=None)
        result = strategy.start(agent_grid(2, make_agent), num_rounds=3, evaluate_fn=evaluate_fn)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert rounds == [0]
    assert not result.evaluate_metrics_serverapp
    warnings = [r for r in caplog.records if "evaluate_fn is not called again" in r.getMessage()]
    assert len({id(record) for record in warnings}) == 1


def test_an_evaluate_fn_without_a_model_is_called_between_the_rounds() -> None:
    strategy = GossipStrategy(topology=Topology.ring(2), record=None)
    result = strategy.start(
        agent_grid(2, make_agent),
        num_rounds=2,
        evaluate_fn=lambda round, arrays: MetricRecord({"round": round}),
    )
    assert [*result.evaluate_metrics_serverapp] == [0, 1, 2]


def test_a_plain_lr_that_would_change_nothing_is_refused() -> None:
    for algorithm in ("mcepl", "local-masks", "fedpm"):
        with pytest.raises(ConfigError, match=f"algorithm {algorithm} has no lr.* got 0.1"):
            RunSettings.from_run_config({"algorithm": algorithm, "lr": 0.1})
        RunSettings.from_run_config({"algorithm": algorithm, "dsgd.lr": 0.1})
        RunSettings.from_run_config({"algorithm": algorithm, "lr": 0.1}, app_keys=["lr"])
    RunSettings.from_run_config({"algorithm": "dsgd", "lr": 0.1})
