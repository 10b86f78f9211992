"""Settings as keys of the run config, with the algorithm's own keys."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_type_hints

import pytest
import torch

from flower_mcepl import ConfigError, MceplConfig, Topology, TopologyError
from flower_mcepl.agents.registry import ALGORITHMS, read_config
from flower_mcepl.config.checks import refuse_unknown_keys
from flower_mcepl.config.fields import field_keys, free_keys, read_fields, with_section
from flower_mcepl.config.ratios import per_agent
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.models import AlexNetCifar
from flower_mcepl.runs.options import RoundKeywords, RoundOptions
from flower_mcepl.runs.settings import DeviceSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class Example:
    whole_number: int = 1
    share: float = 0.5
    label: str = "x"
    flag: bool = False


def test_absent_keys_keep_their_defaults() -> None:
    assert read_fields(Example, {}) == Example()
    assert RunSettings.from_run_config({}) == RunSettings()
    assert (RunSettings().key_interval, RunSettings().keep_frames) == (0, False)


def test_keys_are_field_names_in_kebab_case() -> None:
    assert field_keys(Example) == {"whole-number", "share", "label", "flag"}
    config = {"whole-number": 3, "share": 2, "label": "y", "flag": True, "of-others": 1}
    example = read_fields(Example, config)
    assert example == Example(whole_number=3, share=2.0, label="y", flag=True)
    assert type(example.share) is float  # a TOML file may say 2 for 2.0
    assert read_fields(Example, config, label="z").label == "z"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("whole-number", 1.5, "int"),
        ("whole-number", "3", "int"),
        ("whole-number", True, "int"),
        ("share", "0.5", "float"),
        ("share", True, "float"),
        ("label", 3, "str"),
        ("flag", 1, "bool"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(key: str, value: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"run-config key {key} must be {kind}; got {value!r}"):
        read_fields(Example, {key: value})


def test_unknown_keys_get_a_hint() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown run-config key 'topologie'\. Did you mean 'topology'\?"
    ):
        RunSettings.from_run_config({"topologie": "ring"})
    with pytest.raises(ConfigError, match=r"unknown run-config key 'zzz'\. Known keys: a, b"):
        refuse_unknown_keys({"a": 1, "zzz": 2}, ["b", "a"])
    assert (
        RunSettings.from_run_config({"data-path": "/data"}, app_keys=["data-path"]) == RunSettings()
    )


def test_retention_itself_is_no_key() -> None:
    with pytest.raises(ConfigError, match=r"'retention'. Did you mean 'retention-"):
        RunSettings.from_run_config({"retention": 0.3})


def test_a_whole_run_config() -> None:
    config = {
        "num-agents": 6,
        "num-rounds": 4,
        "seed": 3,
        "topology": "random-regular:degree=3",
        "evaluate-every": 2,
        "max-staleness": 0,
        "min-agents": 5,
        "round-timeout": 9,
        "device": "cpu",
        "threads": 2,
        "retention-conv": "0.1, 0.3, 0.5",
        "retention-linear": 0.9,
        "local-steps": 3,
        "momentum": 0.9,
        "key-interval": 20,
        "keep-frames": True,
    }
    settings = RunSettings.from_run_config(config)
    assert (settings.num_agents, settings.evaluate_every, settings.round_timeout) == (6, 2, 9.0)
    assert (settings.key_interval, settings.keep_frames) == (20, True)
    assert settings.graph() == Topology.random_regular(6, degree=3, seed=3)
    assert read_fields(DeviceSettings, config) == DeviceSettings(device="cpu", threads=2)
    agent = MceplConfig.from_run_config(config, agent=4)
    assert agent.retention == {"conv": 0.3, "linear": 0.9}
    assert (agent.local_steps, agent.momentum) == (3, 0.9)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num-agents", 0, "num-agents must be >= 1; got 0"),
        ("num-rounds", 0, "num-rounds must be >= 1"),
        ("evaluate-every", 0, "evaluate-every is a number of rounds and must be >= 1; got 0"),
        ("max-staleness", -1, "max-staleness is a number of rounds and must be >= 0"),
        ("age-decay", 0.0, r"age-decay is what .* must be in \(0, 1\]; got 0.0"),
        ("schedule", "sometimes", "schedule must be one of rounds, async; got 'sometimes'"),
        ("time-budget", 9.0, "time-budget ends a run of schedule async; .* got 9.0"),
        ("key-interval", -1, "key-interval is .* must be >= 0; got -1"),
        ("key-interval", 2.5, "run-config key key-interval must be int; got 2.5"),
        ("keep-frames", 1, "run-config key keep-frames must be bool; got 1"),
        ("min-agents", 11, r"min-agents must be in 0\.\.10 \(num-agents\); got 11"),
        ("round-timeout", 0, "round-timeout must be > 0 seconds"),
        ("wait-timeout", float("nan"), "wait-timeout must be > 0 seconds; got nan"),
        ("threads", -1, "threads must be >= 0"),
        ("retention-conv", 0, r"key retention-conv .* \(0, 1\]; got 0"),
        ("retention-linear", 1.5, "key retention-linear .* got 1.5"),
        ("retention-conv", "0.1, 2", "key retention-conv .* got 2"),
        ("retention-conv", "nan", "key retention-conv .* got nan"),
        (
            "retention-conv",
            "0.1;0.3",
            "retention-conv must be a number or numbers separated by commas",
        ),
        ("retention-conv", "", "retention-conv must be a number"),
        (
            "retention-layers",
            "conv1.weight",
            "retention-layers must be NAME=RATIO, each layer once, .*; got 'conv1.weight'",
        ),
        ("retention-layers", "=0.3", "retention-layers must be NAME=RATIO"),
        (
            "retention-layers",
            "a=0.3, a=0.5",
            "retention-layers must be NAME=RATIO, each layer once",
        ),
        ("retention-layers", 0.3, "retention-layers must be NAME=RATIO"),
        ("retention-layers", "a=1.2", r"key retention-layers, a .* \(0, 1\]; got 1.2"),
        (
            "retention-layers",
            "conv=0.3",
            "names layers, not kinds; got 'conv'. Use retention-conv.",
        ),
        ("score-lr", 0, "score-lr must be > 0; got 0"),
        ("score-lr", float("inf"), "score-lr must be a finite number"),
        ("finetune-lr", -1, "finetune-lr must be a finite number >= 0"),
        ("weight-decay", float("nan"), "weight-decay must be a finite number"),
        ("group-lasso", -0.1, "group-lasso must be a finite number >= 0"),
        ("momentum", 1, r"momentum must be in \[0, 1\)"),
        ("batch-size", 0, "batch-size must be >= 1"),
        ("local-steps", 0, "local-steps must be >= 1"),
        ("local-epochs", -1, "local-epochs must be >= 0"),
        ("eval-batch-size", 0, "eval-batch-size must be >= 1"),
        (
            "score-init",
            "zeros",
            "independent, magnitude; got 'zeros'",
        ),
        ("lr-schedule", "step", "lr-schedule must be one of constant, cosine"),
    ],
)
def test_bad_values_are_found_before_anything_runs(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_run_config({key: value})


@pytest.mark.parametrize(
    "topology", ["rign", "random-regular:degree=10", "ring:degree=2", "torus:rows=3"]
)
def test_an_impossible_graph_is_found_before_anything_runs(topology: str) -> None:
    with pytest.raises(TopologyError):
        RunSettings.from_run_config({"topology": topology, "num-agents": 10})


def test_agents_take_their_ratios_in_turn() -> None:
    config = {"retention-conv": "0.1,0.3,0.5", "retention-linear": "0.8, 1"}
    agents = [MceplConfig.from_run_config(config, agent=i) for i in range(6)]
    assert [agent.retention["conv"] for agent in agents] == [0.1, 0.3, 0.5, 0.1, 0.3, 0.5]
    assert [agent.retention["linear"] for agent in agents] == [0.8, 1.0] * 3
    for agent in agents:  # the common first mask must be equal on all of them
        assert agent.first_retention == {"conv": pytest.approx(0.3), "linear": pytest.approx(0.9)}
    assert per_agent("retention-conv", 1) == [1.0]


def test_single_layers_have_their_own_ratio_on_all_agents() -> None:
    config = {
        "retention-conv": "0.1, 0.3",
        "retention-linear": 0.9,
        "retention-layers": "conv1.weight=0.6, fc* = 1",
    }
    agents = [MceplConfig.from_run_config(config, agent=i) for i in range(2)]
    assert [agent.retention["conv"] for agent in agents] == [0.1, 0.3]
    for agent in agents:
        assert agent.first_retention == {
            "conv": 0.2,
            "linear": 0.9,
            "conv1.weight": 0.6,
            "fc*": 1.0,
        }
        model = MaskedModel(
            AlexNetCifar(width=0.1), retention=agent.retention, generator=torch.Generator()
        )
        assert model.retention == {
            "conv1.weight": 0.6,
            "conv2.weight": agent.retention["conv"],
            "conv3.weight": agent.retention["conv"],
            "fc1.weight": 1.0,
            "fc2.weight": 1.0,
        }
    wrong = MceplConfig.from_run_config({"retention-layers": "conv9*=0.6"}, agent=0)
    with pytest.raises(ConfigError, match=r"'conv9\*' fits no layer; use a kind .*conv1.weight"):
        MaskedModel(AlexNetCifar(width=0.1), retention=wrong.retention, generator=torch.Generator())


def test_a_cosine_lasts_the_run_unless_it_has_a_length_of_its_own() -> None:
    cosine = {"lr-schedule": "cosine", "num-rounds": 40, "lr-rounds": 0}
    for algorithm in ALGORITHMS:
        assert read_config(algorithm, cosine, agent=0).lr_rounds == 40
        assert (
            read_config(algorithm, {**cosine, f"{algorithm}.lr-rounds": 25}, agent=0).lr_rounds
            == 25
        )
        assert read_config(algorithm, {"num-rounds": 40}, agent=0).lr_rounds == 0
    with pytest.raises(ConfigError, match="lr-schedule cosine needs lr-rounds >= 1"):
        read_config("local", {"lr-schedule": "cosine"}, agent=0)
    RunSettings.from_run_config(cosine)


def test_the_defaults_are_the_papers() -> None:
    config = MceplConfig.from_run_config({}, agent=3)
    assert (
        config.retention
        == config.first_retention
        == MceplConfig().retention
        == {"conv": 0.3, "linear": 0.9}
    )
    assert (config.score_lr, config.finetune_lr, config.weight_decay) == (10.0, 10.0, 5e-4)
    assert (config.batch_size, config.local_steps, config.momentum, config.group_lasso) == (
        128,
        1,
        0.0,
        0.0,
    )


def test_a_device_may_set_its_own_ratio() -> None:
    run_config = {"retention-conv": "0.1,0.5"}
    config = MceplConfig.from_run_config(
        run_config, agent=1, node_config={"retention-conv": 0.2, "gpu": "yes"}
    )
    assert config.retention == {"conv": 0.2, "linear": 0.9}
    assert config.first_retention == {"conv": 0.3, "linear": 0.9}
    with pytest.raises(ConfigError, match=r"key retention-conv .* got 7"):
        MceplConfig.from_run_config(run_config, agent=1, node_config={"retention-conv": "7"})


def test_cosine_schedule() -> None:
    config = MceplConfig(lr_schedule="cosine", lr_rounds=10)
    assert config.lr_factor(1) == 1.0
    assert config.lr_factor(6) == pytest.approx(0.5)
    assert config.lr_factor(11) == config.lr_factor(50) == pytest.approx(0.0)
    assert all(config.lr_factor(t) > config.lr_factor(t + 1) for t in range(1, 11))


def test_step_sizes_rise_over_a_warmup() -> None:
    config = MceplConfig(lr_warmup=4)
    assert [config.lr_factor(t) for t in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    plain = MceplConfig(lr_schedule="cosine", lr_rounds=10)
    both = MceplConfig(lr_schedule="cosine", lr_rounds=10, lr_warmup=4)
    assert both.lr_factor(2) == plain.lr_factor(2) * 0.5
    assert both.lr_factor(9) == plain.lr_factor(9)
    with pytest.raises(ConfigError, match="lr-warmup must be >= 0; got -1"):
        MceplConfig(lr_warmup=-1)
    assert MceplConfig().lr_factor(10**6) == 1.0


@pytest.mark.parametrize("algorithm", ["dsgd", "dfedavgm"])
def test_metropolis_weights_need_links_that_go_both_ways(algorithm: str) -> None:
    config = {"algorithm": algorithm, "num-agents": 6, "topology": "random-neighbors:degree=2"}
    with pytest.raises(ConfigError, match=r"undirected graph.*random-neighbors"):
        RunSettings.from_run_config(config)
    RunSettings.from_run_config({**config, "algorithm": "dispfl"})
    RunSettings.from_run_config({**config, "topology": "ring"})


def test_a_section_sets_one_algorithm_alone() -> None:
    config = {"lr": 0.5, "dsgd.lr": 0.25, "dispfl.lr": 0.125}
    assert with_section(config, "dsgd") == {"lr": 0.25}
    assert with_section(config, "local") == {"lr": 0.5}
    RunSettings.from_run_config({**config, "algorithm": "dsgd"})
    with pytest.raises(ConfigError, match=r"dsgd\.rl.*dsgd\.lr"):
        RunSettings.from_run_config({"dsgd.rl": 0.25})


def test_an_unknown_algorithm_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'dispfl'"):
        RunSettings.from_run_config({"algorithm": "dis-pfl"})


def test_options_of_rounds_have_one_list_of_names_and_types() -> None:
    hints = {entry.name: entry.type for entry in dataclasses.fields(RoundOptions)}
    assert get_type_hints(RoundKeywords) == hints


def test_what_may_differ_when_a_run_is_resumed_decides_nothing_about_its_bits() -> None:
    assert free_keys(RunSettings, DeviceSettings) == {
        *("resume", "record-dir", "num-rounds", "min-agents", "checkpoint-every", "keep-frames"),
        *("round-timeout", "wait-timeout", "timeout-factor", "agents", "takeover"),
        *("state-runs", "tell-classes", "agent-cache", "export", "worker", "worker-idle"),
        "agents-per-node",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"patience": 2, "evaluate-on": "validation"}, "no rounds of all agents to stop after"),
        ({"agents-per-node": 2}, "one agent a node, .*agents-per-node must be 1; got 2"),
        ({"algorithm": "fedavg"}, "a server-based algorithm waits for all of them"),
    ],
)
def test_what_a_run_without_a_barrier_cannot_do(more: dict[str, Any], message: str) -> None:
    config = {"schedule": "async", "num-agents": 4}
    settings = RunSettings.from_run_config({**config, "time-budget": 60.0, "age-decay": 0.5})
    assert (settings.time_budget, settings.age_decay) == (60.0, 0.5)
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_run_config({**config, **more})


@pytest.mark.parametrize(
    ("settings", "weighs"),
    [
        ({}, True),
        ({"algorithm": "local"}, True),
        ({"algorithm": "local-masks"}, True),
        ({"algorithm": "choco"}, True),
        ({"algorithm": "dispfl"}, False),
        ({"algorithm": "mask-averaging"}, False),
        ({"fusion": "mask-averaging"}, False),
    ],
)
def test_votes_fade_only_where_they_are_weighed(settings: dict[str, Any], weighs: bool) -> None:
    config = {**settings, "age-decay": 0.5}
    if weighs:
        assert RunSettings.from_run_config(config).age_decay == 0.5
        return
    with pytest.raises(ConfigError, match=r"lets all neighbors count alike, and age-decay must"):
        RunSettings.from_run_config(config)


def test_no_vote_of_a_servers_model_fades() -> None:
    with pytest.raises(ConfigError, match="hear its model, which has no vote; age-decay must"):
        RunSettings.from_run_config({"algorithm": "fedavg", "age-decay": 0.5})
