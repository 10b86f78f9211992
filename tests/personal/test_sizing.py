"""The size of a personal model's file is known before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flower_mcepl import ConfigError, Topology, simulate
from flower_mcepl.agents import make_agent as agent_of
from flower_mcepl.data import AgentData
from flower_mcepl.doctor.personal_file import check_personal_model
from flower_mcepl.masks.model import shared_module
from flower_mcepl.personal import save_agent, sizing
from flower_mcepl.personal.sizing import expected_size
from tests.fleet.agents import make_agent, split


def wide_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 3),
    )


def saved(agent: Any, folder: Path) -> int:
    return save_agent(agent, folder / "a.mask")


GATES = {"filters_layers": "2.weight=0.5"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"retention": 0.5},
        {"weight_init": "signed-constant", "retention": 0.1},
        {**GATES, "retention": 0.5},
        {**GATES, "weight_init": "signed-constant"},
    ],
)
def test_a_trained_mask_takes_no_more_than_expected(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    agent = make_agent(1, model_fn=wide_net, **settings)
    state = {name: z.clone() for name, z in agent.model.all_scores.items()}
    expected = expected_size(agent)
    assert all(torch.equal(z, state[name]) for name, z in agent.model.all_scores.items())
    assert expected.how.startswith("at most: written now")
    sizes = [saved(agent, tmp_path)]
    for round in range(1, 4):
        agent.train(round=round)
        sizes.append(saved(agent, tmp_path))
    assert max(sizes) <= expected.nbytes
    assert expected.nbytes < 2 * max(sizes) + 300  # what is known of first scores saves the rest


@pytest.mark.parametrize("weight_init", ["module", "signed-constant"])
def test_weights_under_a_blend_of_masks_are_counted_as_stored(
    weight_init: str, tmp_path: Path
) -> None:
    settings = {"model_fn": wide_net, "fusion": "mask-averaging", "weight_init": weight_init}
    agents = [make_agent(index, **settings) for index in range(3)]
    expected = expected_size(agents[0])
    assert expected.how.startswith("at most: written now; weights under a blend")
    simulate(agents, Topology.complete(3), num_rounds=2)
    assert expected.nbytes / 4 < saved(agents[0], tmp_path) <= expected.nbytes


def other(algorithm: str) -> Any:
    data = AgentData.of(split(0), split(1000), agent=0)
    module = shared_module(wide_net, seed=1)
    return agent_of(algorithm, 0, module, data, {"num-rounds": 3, "num-agents": 2}, seed=1)


@pytest.mark.parametrize("algorithm", ["local", "dsgd"])
def test_trained_weights_are_counted_as_stored(algorithm: str, tmp_path: Path) -> None:
    agent = other(algorithm)
    expected = expected_size(agent)
    assert "weights that are trained are stored" in expected.how
    agent.train(round=1)
    assert saved(agent, tmp_path) == pytest.approx(expected.nbytes, abs=64)  # probe's digits
    assert expected.nbytes > 4 * sum(p.numel() for p in agent.personal_model().parameters())


def test_a_large_network_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    for agent in (make_agent(1, model_fn=wide_net, retention=0.5), other("local")):
        written = expected_size(agent)
        with monkeypatch.context() as patch:
            patch.setattr(sizing, "MOST_WRITTEN", 10)
            estimated = expected_size(agent)
        assert "estimated" in estimated.how
        assert abs(written.nbytes - estimated.nbytes) < 1800  # header, names, probe


def test_the_doctor_says_retention_filters_and_size() -> None:
    agent = make_agent(1, model_fn=wide_net, retention=0.5, **GATES)
    found = check_personal_model(agent, agent.describe())
    assert found.status == "ok"
    assert found.found.startswith("retention conv 0.5, linear 0.5; filters that stay in the end: ")
    assert found.values["filters"] == {"2.weight": 0.5}
    assert found.values["file_bytes"] == expected_size(agent).nbytes


def test_without_a_file_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(1)

    def none(self: Any) -> nn.Module:
        raise ConfigError("nothing to hand out")

    monkeypatch.setattr(sizing, "_under_random_masks", none)
    found = check_personal_model(agent, agent.describe())
    assert found.status == "ok"
    assert "no .mask file can be made of it: nothing to hand out" in found.found
