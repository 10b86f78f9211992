"""Mistakes that authors of an algorithm make: each is refused by name."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from flower_mcepl import ConfigError, Topology, simulate
from flower_mcepl.agents import ALGORITHMS, Agent, Algorithm, DenseAgent, Payload, SgdConfig
from flower_mcepl.config.fields import read_fields
from flower_mcepl.runs.simulation import SimulationResult
from tests.oracles.baselines import agent_of


@dataclass(frozen=True, kw_only=True)
class Config(SgdConfig):
    lr: float = 0.05


class Plain(DenseAgent[Config]):
    """Agent that keeps its own weights."""

    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Hear nothing."""


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test adds go with it."""
    point = metadata.EntryPoint("own", "x:y", "test")
    monkeypatch.setattr(ALGORITHMS, "_built_in", {**ALGORITHMS._built_in, "own": point})
    monkeypatch.setattr(ALGORITHMS, "_loaded", dict(ALGORITHMS._loaded))


def fleet(agent: type[Agent], size: int = 2) -> list[Agent]:
    ALGORITHMS._loaded["own"] = Algorithm(agent, Config)
    return [agent_of("own", index) for index in range(size)]


def play(agent: type[Agent]) -> SimulationResult:
    return simulate(fleet(agent), Topology.ring(2), num_rounds=2, evaluate_every=1)


class Flat(Plain):
    def outgoing(self) -> dict[str, Tensor]:
        return {name: x.flatten() for name, x in super().outgoing().items()}


class Fewer(Plain):
    def outgoing(self) -> dict[str, Tensor]:
        return {name: x for name, x in super().outgoing().items() if name != "0.bias"}


class More(Plain):
    def outgoing(self) -> dict[str, Tensor]:
        return {**super().outgoing(), "extra": torch.zeros(3)}


class Arrays(Plain):
    def outgoing(self) -> Any:
        return {name: x.numpy() for name, x in super().outgoing().items()}


class Silent(Plain):
    def outgoing(self) -> Any:
        return None


class Wordless(Plain):
    def train(self, *, round: int) -> Any:
        super().train(round=round)


class Spelled(Plain):
    def train(self, *, round: int) -> Any:
        return {"train-loss": "low"}


class Boasting(Plain):
    def train(self, *, round: int) -> dict[str, float]:
        return {**super().train(round=round), "accuracy": 0.9}


class Live(Plain):
    """Agent whose first payload is the very weights that train."""

    precision = "int8-differences"

    def first_payload(self) -> dict[str, Tensor]:
        return {name: self.weights[name].detach() for name in self.shared}


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (Flat, r"sender 0 must send the layers that it declares.*'0.weight'.*\(6, 4\); got \(24,"),
        (Fewer, r"layer '0.bias' is declared as \(6,\); got 'NoneType'"),
        (More, r"layer 'extra' is declared as None; got \(3,\)"),
        (Arrays, r"layer '0.bias' is declared as \(6,\); got 'ndarray'"),
        (Silent, "outgoing must return a mapping.*'NoneType'. Return {} to send nothing"),
        (Wordless, "train must return a mapping of metrics"),
        (Spelled, "metric of train must be one number; train-loss; got 'low'"),
        (Boasting, "other names than those of evaluate; got 'accuracy'"),
        (Live, "one of agent 0's tensors was changed in place since. Let first_payload return"),
    ],
)
def test_what_an_agent_returns_is_looked_at(agent: type[Agent], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        play(agent)


def test_what_an_agent_raises_says_whose_it_is() -> None:
    class Broken(Plain):
        def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
            raise KeyError("mean")

    with pytest.raises(KeyError) as raised:
        play(Broken)
    assert "agent 0 of algorithm own" in raised.value.__notes__[0]
    assert "Broken, in round 2" in raised.value.__notes__[0]


def test_an_agent_declares_what_it_sends() -> None:
    class Undeclared(Plain):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            del self.layers

    with pytest.raises(ConfigError, match="Undeclared of algorithm own lacks; got 'layers'"):
        fleet(Undeclared)


class Drawing(Plain):
    """Agent that draws from the global generators, as it is made and in a verb."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made, self.drawn = float(torch.rand(())), list[float]()

    def train(self, *, round: int) -> dict[str, float]:
        self.drawn += [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
        return super().train(round=round)


def test_what_an_agent_draws_as_it_is_made_is_of_the_seed_and_no_verb_is() -> None:
    """Noise of a mod in training hides nothing if it follows from a public seed."""

    def draws(seed: int) -> list[tuple[float, list[float]]]:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        agents = fleet(Drawing)
        simulate(agents, Topology.ring(2), num_rounds=3)
        return [(agent.made, agent.drawn) for agent in agents if isinstance(agent, Drawing)]

    one, two = draws(1), draws(2)
    assert [made for made, _ in one] == [made for made, _ in two]
    assert one[0][0] != one[1][0]
    (first, second), (third, fourth) = ([drawn for _, drawn in each] for each in (one, two))
    assert not {*first, *second} & {*third, *fourth}


class NotDecorated(Config):
    kept: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Bare(Config):
    kept: float


@pytest.mark.parametrize(
    ("agent", "config", "message"),
    [
        (Plain, NotDecorated, "only if it is a dataclass; NotDecorated adds; got 'kept'"),
        (Plain, Bare, "every parameter of Bare needs a default.*got 'kept'"),
        (Config, Plain, "the agent of an Algorithm must be a subclass of Agent"),
        (Plain, dict, "the config of an Algorithm must be a subclass of TrainingConfig"),
    ],
)
def test_the_classes_of_an_algorithm_are_looked_at(agent: Any, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Algorithm(agent, config)


@dataclass(frozen=True)
class Typed:
    text: "float" = 0.5  # as all are under `from __future__ import annotations`
    maybe: float | None = None
    one_of: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text", "0.3", "text must be float; got '0.3'"),
        ("text", True, "text must be float; got True"),
        ("maybe", "no", "maybe must be float; got 'no'"),
        ("one-of", "c", "one-of must be one of 'a', 'b'; got 'c'"),
        ("sizes", "1,2", "sizes cannot be set: a run config holds bool, int, float and str"),
    ],
)
def test_a_setting_has_the_type_of_its_field(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_fields(Typed, {key: value})


def test_a_whole_number_may_be_a_float() -> None:
    assert read_fields(Typed, {"text": 1, "maybe": 2, "one-of": "b"}) == Typed(1.0, 2.0, "b")
