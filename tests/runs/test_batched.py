"""The engine "batched" against the loop, in float64."""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from flower_mcepl import (
    AgentData,
    ConfigError,
    DivergedError,
    MceplAgent,
    MceplConfig,
    RunRecord,
    Topology,
    UnsupportedLayerError,
    read_run,
    shared_module,
    simulate,
)
from flower_mcepl.agents import load_state
from flower_mcepl.agents import make_agent as make_registered
from flower_mcepl.agents.agent import best_file
from flower_mcepl.agents.tasks.task import Task
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.masks import FUSIONS, Fusion, formulas
from flower_mcepl.models import AlexNetCifar, Staged
from tests.fleet.agents import SEED, make_fleet, noisy_net, same_tensors, small_net, split

CLOSE = {"rtol": 0.0, "atol": 1e-10}
RING, COMPLETE = Topology.ring(4), Topology.complete(4)
UNEQUAL = Topology.from_edges([(0, 1), (1, 2)], num_agents=4)  # agent 3 hears nobody


def normed_net(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm(), nn.ELU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    )


class Tied(nn.Module):
    """A linear layer that is called twice, under two names, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 36)
        self.second = nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()))


class Augmented:
    """Examples that are flipped and shifted at random, by torch's and Python's global
    generators.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[i]
        x = x.flip(2) if torch.rand(()) < 0.5 else x
        return x.roll(random.randrange(-1, 2), 1), self.labels[i]


def images(agent: int, *, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(agent)
    return torch.rand(size, 3, 32, 32, generator=generator), torch.randint(
        10, (size,), generator=generator
    )


def doubled(agent: MceplAgent) -> MceplAgent:
    """The agent, with network, scores and arithmetic in float64."""
    agent.model.double()
    agent.learner = dataclasses.replace(agent.learner, dtype=torch.float64)
    return agent


def fleet_of(
    data: Callable[[int], AgentData], model_fn: Callable[[], nn.Module], **config: Any
) -> list[MceplAgent]:
    module = shared_module(model_fn, seed=SEED)
    retentions = config.pop("retentions", (0.3,))
    return [
        doubled(
            MceplAgent(
                i,
                module,
                data(i),
                MceplConfig(
                    **{
                        "batch_size": 8,
                        "score_lr": 0.5,
                        "finetune_lr": 0.5,
                        "retention": retentions[i % len(retentions)],
                        **config,
                    }
                ),
                seed=SEED,
            )
        )
        for i in range(4)
    ]


def plain(i: int) -> AgentData:
    return AgentData.of(split(i), split(1000 + i), agent=i)


def unequal(i: int) -> AgentData:
    """Splits of unequal sizes: last batches differ, and numbers of batches."""
    return AgentData.of(split(i, size=17 + 5 * i), split(1000 + i, size=20 + i), agent=i)


def augmented(i: int) -> AgentData:
    return AgentData.of(Augmented(*split(i)), split(1000 + i), agent=i)


def pictures(i: int) -> AgentData:
    return AgentData.of(images(i, size=12), images(1000 + i, size=10), agent=i)


def played(
    agents: list[MceplAgent], engine: str, **options: Any
) -> tuple[list[dict[str, Any]], dict[tuple[int, int], list[bytes]]]:
    frames: dict[tuple[int, int], list[bytes]] = {}

    def keep(round: int, agent: int, reply: Reply) -> None:
        frames[round, agent] = [frame.data for frame in reply.frames]

    result = simulate(
        agents,
        engine=engine,
        on_reply=keep,
        **{"topology": RING, "num_rounds": 4, "evaluate_every": 2, **options},
    )
    rows = [{**row, **row["metrics"], "metrics": 0, "seconds": 0} for row in result.rows]
    return rows, frames


def check_equal(make: Callable[[], list[MceplAgent]], **options: Any) -> None:
    """The same masks, frames and bytes; scores, losses and statistics to 1e-10."""
    alone, together = make(), make()
    rows, frames = played(alone, "loop", **options)
    rows_together, frames_together = played(together, "batched", **options)
    assert frames_together == frames
    assert any(frames.values()) or alone[0].layers == {}
    assert len(rows) == len(rows_together) > 0
    for row, other in zip(rows, rows_together, strict=True):
        assert other == pytest.approx(row, rel=0, abs=1e-10)
    for one, other in zip(alone, together, strict=True):
        left, right = one.state(), other.state()
        assert left.facts == right.facts
        assert left.arrays.keys() == right.arrays.keys()
        for name, array in left.arrays.items():
            assert_close(right.arrays[name], array, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (plain, small_net, {}),
    "momentum": (plain, small_net, {"momentum": 0.9, "local_steps": 3, "score_lr": 0.1}),
    "unequal": (unequal, small_net, {"local_epochs": 2, "momentum": 0.5}),
    "augmented": (augmented, small_net, {"local_steps": 4}),
    "mixed ratios": (plain, small_net, {"retentions": (0.1, 0.3, 0.5), "first_retention": 0.3}),
    "group norm": (unequal, lambda: normed_net(lambda: nn.GroupNorm(2, 4)), {"local_epochs": 1}),
    "batch norm": (unequal, lambda: normed_net(lambda: nn.BatchNorm2d(4)), {"local_epochs": 2}),
    "alexnet": (pictures, lambda: AlexNetCifar(width=0.0625), {"score_lr": 10.0}),
    "tied weights": (plain, Tied, {"local_steps": 2}),
    "recipe": (
        plain,
        small_net,
        {
            "score_gradient": "normalized",
            "score_form": "magnitude",
            "score_lr": 0.005,
            "momentum": 0.9,
            "weight_init": "signed-constant",
            "fusion_strength": 3.0,
            "share": "0*",
            "finetune_lr": 0.0,
            "score_averaging": 0.5,
        },
    ),
    "filter-normalized": (
        plain,
        small_net,
        {"score_gradient": "filter-normalized", "score_lr": 0.005, "momentum": 0.9},
    ),
    "no fine-tuning": (plain, small_net, {"finetune_lr": 0.0, "local_steps": 2}),
    "shared in part": (plain, small_net, {"share": "3*", "local_steps": 2}),
    "lasso in the loss": (plain, small_net, {"group_lasso": 0.05}),
    "proximal lasso": (plain, small_net, {"group_lasso": 0.2, "lasso_step": "proximal"}),
    "mask averaging": (plain, small_net, {"fusion": "mask-averaging"}),
    "no exchange": (plain, small_net, {"fusion": "none"}),
    "first scores": (plain, small_net, {"first_mask": "scores"}),
    "network budget": (plain, small_net, {"retention_budget": "network"}),
    "blocks": (plain, small_net, {"block": "2:4", "retention": {"conv": 0.3, "linear": 0.5}}),
    "schedules": (
        plain,
        small_net,
        {
            "lr_schedule": "cosine",
            "lr_rounds": 4,
            "fusion_schedule": "linear",
            "fusion_rounds": 3,
            "fusion_strength": 0.5,
            "last_fusion_strength": 2.0,
            "score_lr_layers": "3*=0.01",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_loop_and_masks_are_equal(case: str) -> None:
    data, model_fn, config = CASES[case]
    check_equal(lambda: fleet_of(data, model_fn, **config))


@pytest.mark.parametrize(
    "options",
    [
        {"speeds": "1, 1, 3", "timeout_factor": 1.5, "num_rounds": 9, "evaluate_every": 1},
        {"speeds": "1, 1, 3", "schedule": "async"},
        {"speeds": "1, 2, 3", "schedule": "async", "age_decay": 0.5},
        {"speeds": "1, 2, 3", "schedule": "async", "age_decay": 0.7, "topology": COMPLETE},
        {"speeds": "1, 1, 3", "timeout_factor": 1.5, "num_rounds": 9, "topology": UNEQUAL},
    ],
    ids=["deadlines", "no barrier", "votes that fade", "three faded votes", "unequal degrees"],
)
def test_agents_that_play_in_parts_are_those_of_the_loop(options: dict[str, Any]) -> None:
    check_equal(lambda: fleet_of(plain, small_net), **options)


@pytest.mark.parametrize("first_mask", ["random", "scores"])
def test_agents_of_unequal_degrees_one_of_whom_hears_nobody(first_mask: str) -> None:
    check_equal(lambda: fleet_of(plain, small_net, first_mask=first_mask), topology=UNEQUAL)


def test_agents_that_hear_others_in_every_round() -> None:
    topology = Topology.random_neighbors(4, degree=2, seed=SEED)
    check_equal(lambda: fleet_of(plain, small_net, momentum=0.5), topology=topology)


def test_agents_hear_by_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself: the rule looks at numbers, as no stack of agents can."""

    def overlap(masks: Sequence[Tensor], own: Tensor) -> Tensor:
        shares = [float((mask & own).sum() / (mask | own).sum()) for mask in masks]
        total = sum(w * mask.float() for w, mask in zip(shares, masks, strict=True))
        return total / sum(shares)

    monkeypatch.setitem(FUSIONS._loaded, "overlap", Fusion(hear=overlap))
    check_equal(lambda: fleet_of(plain, small_net, fusion="overlap"), topology=UNEQUAL)


def test_agents_of_two_step_sizes_are_two_stacks() -> None:
    def make() -> list[MceplAgent]:
        agents = [*fleet_of(plain, small_net), *fleet_of(plain, small_net, score_lr=0.1)]
        return [agents[i] for i in (0, 5, 2, 7)]

    check_equal(make)


def test_agents_of_two_depths_are_two_stacks_that_hear_each_other() -> None:
    """The shallow ones send part of the layers that the others hold."""

    def net() -> nn.Module:
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU(), nn.Flatten())
        heads = [nn.Linear(64, 3), nn.Linear(8, 3)]
        return Staged([body, nn.Sequential(nn.Linear(64, 8), nn.ELU())], exits=heads)

    def make() -> list[MceplAgent]:
        fleets = [fleet_of(plain, net, depth=depth, momentum=0.5) for depth in (1, 2)]
        return [fleets[i % 2][i] for i in range(4)]

    assert "stages.1.0.weight" in make()[1].layers.keys() - make()[0].layers.keys()
    check_equal(make)


def test_an_agent_that_hears_nobody_stands_beside_one_that_does() -> None:
    topology = Topology.from_edges([(0, 1), (1, 2)], num_agents=4)
    make = lambda: fleet_of(plain, small_net, first_mask="scores")  # noqa: E731
    alone, together = make(), make()
    simulate(alone, topology, num_rounds=3)
    simulate(together, topology, num_rounds=3, engine="batched")
    for one, other in zip(alone, together, strict=True):
        for name, z in one.model.scores.items():
            assert_close(other.model.scores[name], z, **CLOSE)
    assert together[3].model.num_neighbors == 0


# --- record, checkpoints, errors of one agent ---


def test_the_record_names_the_engine_and_is_the_same_else(tmp_path: Path) -> None:
    for engine in ("loop", "batched"):
        record = RunRecord.create(name="run", config={}, path=tmp_path / engine, with_frames=True)
        played(fleet_of(plain, small_net), engine, record=record, keep_best=False)
    loop, batched = (tmp_path / engine for engine in ("loop", "batched"))
    assert read_run(loop).config["engine"] == "loop"
    assert read_run(batched).config["engine"] == "batched"
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (loop, batched)]
    assert files[0] == files[1]
    lines = [
        [*map(json.loads, (f / "relay.jsonl").read_text().splitlines())] for f in (loop, batched)
    ]
    assert len(lines[0]) == len(lines[1]) == 5
    for one, other in zip(*lines, strict=True):
        assert one["frames"] == other["frames"]  # digests of all masks
        timed = ("seconds", "agent_seconds", "train_loss")
        assert [one[k] for k in one if k not in timed] == [
            other[k] for k in other if k not in timed
        ]
        losses = [line["train_loss"] or 0.0 for line in (one, other)]  # none in the last
        assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-10)


class Stop(Exception):
    pass


def test_a_run_that_broke_off_goes_on_with_its_engine_to_the_same_bits(tmp_path: Path) -> None:
    options = {"num_rounds": 5, "evaluate_every": 2, "engine": "batched"}
    fleet = lambda: make_fleet(4, momentum=0.5, score_lr=0.1)  # noqa: E731
    whole = fleet()
    expected = simulate(whole, RING, **options)
    record = RunRecord.create(name="run", config={}, path=tmp_path / "run")

    def stop(line: str) -> None:
        if "round 3/5" in line:
            raise Stop

    with pytest.raises(Stop):
        simulate(fleet(), RING, **options, record=record, checkpoint_every=1, log=stop)
    with pytest.raises(ConfigError, match=r"engine was 'batched' and is now 'loop'"):
        simulate(fleet(), RING, **{**options, "engine": "loop"}, resume=record.path)
    again = fleet()
    result = simulate(again, RING, **options, resume=record.path)
    untimed = [[{**row, "seconds": 0} for row in r.rows] for r in (expected, result)]
    assert untimed[0] == untimed[1]
    for one, other in zip(whole, again, strict=True):
        assert same_tensors(dict(one.model.scores), dict(other.model.scores))


def test_the_best_state_is_kept_as_in_the_loop(tmp_path: Path) -> None:
    best = []
    for engine in ("loop", "batched"):
        agents = [
            doubled(
                MceplAgent(
                    i,
                    shared_module(small_net, seed=SEED),
                    AgentData.of(
                        split(i), split(1000 + i), validation=split(2000 + i), agent=i,
                        evaluate_on="validation",
                    ),
                    MceplConfig(batch_size=8, score_lr=0.5),
                    seed=SEED,
                )
            )
            for i in range(4)
        ]  # fmt: skip
        record = RunRecord.create(name="run", config={}, path=tmp_path / engine)
        simulate(
            agents,
            RING,
            num_rounds=4,
            evaluate_every=1,
            engine=engine,
            keep_best=True,
            record=record,
        )
        best.append([load_state(record.agents_dir / best_file(i)) for i in range(4)])
    for one, other in zip(*best, strict=True):
        assert one.facts == other.facts
        for name, array in one.arrays.items():
            assert_close(other.arrays[name], array, **CLOSE)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_an_agent_that_diverges_is_named(engine: str) -> None:
    agents = make_fleet(4)

    def spoil(round: int, agent: int, reply: Reply) -> None:
        with torch.no_grad():
            next(iter(agents[2].model.scores.values())).fill_(float("nan"))

    with pytest.raises(DivergedError, match=r"agent 2, round \d: a mask cannot be ranked"):
        simulate(agents, RING, num_rounds=2, engine=engine, on_reply=spoil)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_scores_that_are_not_finite_are_named(engine: str) -> None:
    agents = make_fleet(3, fusion="none", score_lr=3e38, weight_decay=1e3)
    with pytest.raises(DivergedError, match=r"^agent 0: round 1 left scores that are not finite"):
        simulate(agents, Topology.ring(3), num_rounds=1, engine=engine)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_loss_that_is_not_finite_is_named(engine: str) -> None:
    agents = make_fleet(4)

    def spoil(round: int, agent: int, reply: Reply) -> None:
        agents[2].data.train.inputs.fill_(float("inf"))

    with pytest.raises(
        DivergedError, match=r"^agent 2: the training loss of round [12] .*score-lr"
    ):
        simulate(agents, RING, num_rounds=2, engine=engine, on_reply=spoil)


def test_an_evaluation_that_fails_is_that_agents_alone() -> None:
    """Its labels are of no class; the others' rows are those of the loop."""

    def data(i: int) -> AgentData:
        inputs, labels = split(1000 + i)
        return AgentData.of(split(i), (inputs, labels + 7 * (i == 1)), agent=i)

    rows, errors = {}, {}
    for engine in ("loop", "batched"):
        agents = fleet_of(data, small_net)
        agents[1].check = lambda: None  # type: ignore[method-assign]
        replies: list[tuple[int, str]] = []
        result = simulate(
            agents,
            RING,
            num_rounds=2,
            evaluate_every=1,
            engine=engine,
            on_reply=lambda _, i, reply, kept=replies: kept.append((i, reply.evaluation_error)),
        )
        rows[engine] = [(row["round"], row["agent"], row["accuracy"]) for row in result.rows]
        errors[engine] = replies
    assert rows["batched"] == rows["loop"]
    assert errors["batched"] == errors["loop"]
    assert any("agent 1's test split" in text for _, text in errors["batched"])


# --- what is refused ---


class Curious(nn.Module):
    """Its forward looks at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x if x.mean().item() < 9 else -x)


class Moody(Curious):
    """It draws from Python's generator, once for all that it is called for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * (0 if self.training and random.random() < 1e-9 else 1)


class Replacing(Curious):
    """It puts a new tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.head(x.flatten(1))


class Checkpointed(nn.Module):
    """Its layers are called again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda y: self.body(y.flatten(1)).relu(), x, use_reentrant=False)
        return self.head(x)


class Lopsided(Curious):
    """What it gives depends on whether it is called for several agents."""

    def forward(self, x: Tensor) -> Tensor:
        stack = torch._C._functorch.is_batchedtensor(x)
        return self.head(x.flatten(1)) * (2 if stack else 1)


@pytest.mark.parametrize(
    ("model_fn", "message"),
    [
        (noisy_net, r"cannot be called so; the last layer entered was Dropout 4: RuntimeError"),
        (Curious, r"the last layer entered was Curious: RuntimeError: .*item\(\)"),
        (Moody, r"its forward draws from Python's, NumPy's or torch's global generator"),
        (Replacing, r"change its buffers in place; Replacing puts another tensor .* of seen\."),
        (Checkpointed, r"last layer entered was Linear head: RuntimeError: .*vmap"),
        (Lopsided, r"agent 0's loss, outputs, head\.weight on one batch are others"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.LSTM(36, 5), Last(), nn.Linear(5, 3)),
            r"entered was LSTM 1: RuntimeError",
        ),
    ],
)
def test_a_network_that_no_stack_can_run_is_refused(
    model_fn: Callable[[], nn.Module], message: str
) -> None:
    agents = make_fleet(4, model_fn=model_fn, score_lr=0.1)
    with pytest.raises(UnsupportedLayerError, match=message + r".*(Use engine|Let it)"):
        simulate(agents, RING, num_rounds=1, engine="batched")


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_a_loss_that_draws_is_refused(draw: Callable[[], float]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + 1e-9 * draw()

    agents = make_fleet(4, task=Task(loss=loss), score_lr=0.1)
    with pytest.raises(UnsupportedLayerError, match=r"a loss that draws nothing; agent 0's .*Use"):
        simulate(agents, RING, num_rounds=1, engine="batched")


def test_draws_outside_the_network_are_no_ones_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by beartype in the package itself: it draws which elements it looks at."""
    drawn = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        drawn.append(random.random())
        return largest_masks(*args, **kwargs)

    largest_masks = formulas.largest_masks
    monkeypatch.setattr(formulas, "largest_masks", checked)
    simulate(make_fleet(4, score_lr=0.1), RING, num_rounds=1, engine="batched")
    assert drawn


class Last(nn.Module):
    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        return outputs[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"arithmetic": "fast"}, r"needs arithmetic exact; that of agent 0 .* got 'fast'"),
        (
            {"filters": 0.5, "gated": True},
            r"needs filters 1 everywhere; .*agent 0 .* got 0\.5",
        ),
    ],
)
def test_a_setting_that_no_stack_can_follow_is_refused(
    config: dict[str, Any], message: str
) -> None:
    net = lambda: normed_net(nn.Identity)  # noqa: E731
    with pytest.raises(ConfigError, match=message + r'.*Use engine "loop"'):
        simulate(make_fleet(4, model_fn=net, **config), RING, num_rounds=1, engine="batched")


def test_other_algorithms_and_other_engines_are_refused() -> None:
    agents = [
        make_registered("dsgd", i, shared_module(small_net, seed=SEED), plain(i), {}, seed=SEED)
        for i in range(4)
    ]
    with pytest.raises(ConfigError, match=r"got agent 0, of class DsgdAgent\. Use eng"):
        simulate(agents, RING, num_rounds=1, engine="batched")
    with pytest.raises(ConfigError, match=r"engine must be one of loop, batched; got 'gpu'"):
        simulate(agents, RING, num_rounds=1, engine="gpu")
