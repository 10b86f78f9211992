from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl import (
    AgentData,
    ConfigError,
    DataError,
    DivergedError,
    MceplAgent,
    MceplConfig,
    StateError,
)
from flower_mcepl import shared_module as build
from flower_mcepl.agents import AgentState, load_state, save_state
from tests.fleet.agents import SEED, make_agent, noisy_net, same_tensors, small_net, split
from tests.oracles import masks as oracles

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def neighbors_masks(
    agent: MceplAgent, count: int, *, seed: int = 0
) -> dict[int, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        agent.index + 1 + j: {
            name: torch.rand(shape, generator=generator) < 0.5
            for name, shape in agent.layers.items()
        }
        for j in range(count)
    }


def scores_of(agent: MceplAgent) -> dict[str, Tensor]:
    return {name: z.detach().clone() for name, z in agent.model.scores.items()}


def play(agent: MceplAgent, *rounds: int) -> list[dict[str, float]]:
    """Some whole rounds, each with other neighbors."""
    metrics = []
    for round in rounds:
        metrics.append(agent.train(round=round))
        agent.fuse(neighbors_masks(agent, round % 3, seed=round), round=round)
        metrics.append(agent.evaluate())
    return metrics


# --- one round against the formulas ---


def closed_gradient(agent: MceplAgent, inputs: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """The straight-through gradient at the agent's present scores, from an ordinary
    network with weights w * m.
    """
    baked = agent.model.bake().train().requires_grad_(True)
    nn.functional.cross_entropy(baked(inputs), labels).backward()
    gradients = {}
    for name, z in scores_of(agent).items():
        n = agent.model.neighbor_means[name]
        y = z.numpy() if n is None else oracles.aggregation(z.numpy(), n.numpy())
        w = agent.model.module.get_parameter(name).detach().numpy()
        gradients[name] = oracles.score_gradient(baked.get_parameter(name).grad.numpy(), w, y)
    return gradients


@pytest.mark.parametrize("lasso", [0.0, 0.05])
def test_one_round_by_the_formulas(lasso: float) -> None:
    config = {
        "score_lr": 0.7,
        "finetune_lr": 0.4,
        "weight_decay": 0.01,
        "group_lasso": lasso,
        "batch_size": 24,
    }
    agent = make_agent(2, **config)
    z = scores_of(agent)
    inputs, labels = split(2)  # one batch of everything: its order does not matter
    g = closed_gradient(agent, inputs, labels)
    loss = nn.functional.cross_entropy(agent.model.bake()(inputs), labels)

    assert agent.train(round=1)["train-loss"] == pytest.approx(loss.item(), rel=1e-5)
    after_step = scores_of(agent)
    for name in z:
        g[name] = g[name] + lasso * oracles.group_lasso_gradient(z[name].numpy())
        expected = z[name].numpy() - 0.7 * (g[name] + 0.01 * z[name].numpy())
        assert_close(after_step[name].double(), torch.from_numpy(expected).double(), **CLOSE)

    first = agent.first_payload()
    for name, mask in agent.outgoing().items():  # new scores, old neighbors
        y = oracles.aggregation(after_step[name].numpy(), first[name].float().numpy())
        ratio = agent.model.retention[name]
        assert torch.equal(mask, torch.from_numpy(oracles.topk_mask(y.astype(np.float32), ratio)))

    inbox = neighbors_masks(agent, 3)
    agent.fuse(inbox, round=1)
    for name, fused in scores_of(agent).items():
        n = oracles.neighbor_mean([masks[name].numpy() for masks in inbox.values()])
        expected = oracles.neighbor_step(after_step[name].numpy(), g[name], n, 0.4)
        assert_close(fused.double(), torch.from_numpy(expected), **CLOSE)
        assert_close(
            agent.model.neighbor_means[name].double(), torch.from_numpy(n), rtol=1e-6, atol=0
        )
    assert not same_tensors(after_step, scores_of(agent))


def test_momentum_over_several_local_steps() -> None:
    agent = make_agent(
        0, momentum=0.8, local_steps=3, score_lr=0.3, weight_decay=0.0, batch_size=24
    )
    twin = make_agent(0, score_lr=0.3, weight_decay=0.0, batch_size=24)
    inputs, labels = split(0)
    velocity: dict[str, Tensor] = {}
    for _ in range(3):
        for name, g in closed_gradient(twin, inputs, labels).items():
            velocity[name] = 0.8 * velocity.get(name, 0.0) + torch.from_numpy(g)
        twin.model.set_scores(
            {name: z - 0.3 * velocity[name] for name, z in scores_of(twin).items()}
        )
    agent.train(round=1)
    for name, z in scores_of(agent).items():
        assert_close(z, scores_of(twin)[name], rtol=1e-3, atol=1e-5)


def test_score_averaging_changes_the_evaluation_alone() -> None:
    agent, plain = make_agent(0, score_averaging=0.75), make_agent(0)
    average: dict[str, Tensor] = {}
    for round in range(1, 6):
        for each in (agent, plain):
            each.train(round=round)
            each.fuse(neighbors_masks(each, 2, seed=round), round=round)
        assert same_tensors(scores_of(agent), scores_of(plain))
        assert same_tensors(agent.outgoing(), plain.outgoing())
        average = {
            name: z if round == 1 else 0.75 * average[name] + 0.25 * z
            for name, z in scores_of(plain).items()
        }
        evaluated, before = agent.evaluate(), scores_of(agent)
        assert same_tensors(scores_of(agent), before)
        twin = make_agent(0)
        twin.fuse(neighbors_masks(twin, 2, seed=round), round=round)
        twin.model.set_scores(average)
        assert evaluated == pytest.approx(twin.evaluate(), rel=1e-5)
    assert evaluated["loss"] != plain.evaluate()["loss"]


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5])
def test_a_share_of_the_running_mean_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"score-averaging must be in \[0, 1\); got {value}"):
        MceplConfig(score_averaging=value)


def test_a_schedule_scales_both_step_sizes() -> None:
    late, plain = (
        make_agent(0, weight_decay=0.0, **options)
        for options in ({"lr_schedule": "cosine", "lr_rounds": 4}, {})
    )
    start = scores_of(plain)
    for agent in (late, plain):
        agent.train(round=3)  # the factor is 1/2 there
    half, whole = scores_of(late), scores_of(plain)
    for name, z in start.items():
        assert_close(half[name] - z, 0.5 * (whole[name] - z), **CLOSE)
    inbox = neighbors_masks(plain, 2)
    for agent in (late, plain):
        agent.fuse(inbox, round=3)
    for name in start:
        assert_close(
            scores_of(late)[name] - half[name],
            0.5 * (scores_of(plain)[name] - whole[name]),
            **CLOSE,
        )


def test_the_fine_tuning_gradient_is_used_once() -> None:
    agent = make_agent(0)
    agent.train(round=1)
    inbox = neighbors_masks(agent, 2)
    before = scores_of(agent)
    agent.fuse(inbox, round=1)
    once = scores_of(agent)
    agent.fuse(inbox, round=2)
    assert not same_tensors(before, once)
    assert same_tensors(once, scores_of(agent))


def test_without_neighbors_it_is_plain_local_masks() -> None:
    agent = make_agent(0)
    agent.train(round=1)
    before = scores_of(agent)
    agent.fuse({}, round=1)
    assert same_tensors(before, scores_of(agent))
    for name, mask in agent.outgoing().items():
        expected = oracles.topk_mask(before[name].numpy(), agent.model.retention[name])
        assert torch.equal(mask, torch.from_numpy(expected))
    # the gradient of round 1 is gone with its exchange
    agent.fuse(neighbors_masks(agent, 2), round=2)
    assert same_tensors(before, scores_of(agent))


def test_zero_fine_tuning_only_takes_the_mean() -> None:
    agent = make_agent(0, finetune_lr=0.0)
    agent.train(round=1)
    before, masks = scores_of(agent), agent.outgoing()
    agent.fuse(neighbors_masks(agent, 2), round=1)
    assert same_tensors(before, scores_of(agent))
    assert not same_tensors(masks, agent.outgoing())


@pytest.mark.parametrize("count", [255, 256, 300])
def test_many_neighbors_are_counted_right(count: int) -> None:
    agent = make_agent(0)
    everything = {name: torch.ones(shape, dtype=torch.bool) for name, shape in agent.layers.items()}
    agent.fuse(dict.fromkeys(range(1, count + 1), everything), round=1)
    assert all((n == 1).all() for n in agent.model.neighbor_means.values())
    twin = make_agent(0)
    twin.restore(agent.state())
    assert same_tensors(agent.model.neighbor_means, twin.model.neighbor_means)


# --- data and metrics ---


class Counting:
    """A split that remembers what it was asked for."""

    num_examples = 24

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def training_batches(self, **asked: Any) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append(asked)
        inputs, labels = split(0)
        for _ in range(asked["steps"]):
            yield inputs[:4], labels[:4]

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = split(1)
        yield from zip(inputs.split(batch_size), labels.split(batch_size), strict=True)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"local_steps": 3}, 3),
        ({"local_epochs": 2, "batch_size": 24}, 2),
        ({"local_epochs": 2, "batch_size": 7, "local_steps": 9}, 8),
        ({"local_epochs": 1, "batch_size": 100}, 1),
    ],
)
def test_epochs_are_counted_in_batches(config: dict[str, int], steps: int) -> None:
    source = Counting()
    settings = MceplConfig(score_lr=1.0, **config)
    agent = MceplAgent(
        0, build(small_net, seed=1), AgentData.of(source, source, agent=0), settings, seed=1
    )
    agent.train(round=5)
    (asked,) = source.asked
    assert (asked["round"], asked["steps"], asked["batch_size"]) == (5, steps, settings.batch_size)


def test_train_loss_is_the_mean_over_the_steps() -> None:
    together = make_agent(0, local_steps=3).train(round=1)["train-loss"]
    assert isinstance(together, float)
    first = make_agent(0, local_steps=1).train(round=1)["train-loss"]
    second = make_agent(0, local_steps=2).train(round=1)["train-loss"]
    assert together != pytest.approx(first, rel=1e-3)
    assert second != pytest.approx(first, rel=1e-3)


def test_evaluation_on_the_own_test_split() -> None:
    agent = make_agent(3, model_fn=noisy_net, eval_batch_size=7)
    play(agent, 1, 2)
    before = agent.state().tensors
    metrics = agent.evaluate()
    inputs, labels = split(1003)
    with torch.no_grad():
        logits = agent.model.bake().eval()(inputs)
    assert metrics["accuracy"] == int((logits.argmax(1) == labels).sum()) / 24
    assert metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    assert metrics["num-examples"] == 24
    kept = sum(int(mask.sum()) for mask in agent.outgoing().values())
    assert metrics["density"] == kept / agent.model.num_weights
    assert same_tensors(before, agent.state().tensors)
    assert agent.evaluate() == metrics


def counts(draw: int) -> str:
    labels = split(draw)[1].tolist()
    return " ".join(f"{label}:{labels.count(label)}" for label in sorted(set(labels)))


def test_the_handshake_tells_who_this_is() -> None:
    agent = make_agent(3, retention={"conv": 0.5, "linear": 0.25})
    kept = sum(int(mask.sum()) for mask in agent.outgoing().values())
    assert agent.describe() == {
        "agent": 3,
        "algorithm": "mcepl",
        "fingerprint": agent.model.fingerprint,
        "seed": SEED,
        "prior": agent.prior.digest.hex(),
        "first-mask": agent._first_mask_digest,
        "num-weights": 36 + 192,
        "kept-weights": kept,
        "kept-by-layer": [int(mask.sum()) for _, mask in sorted(agent.outgoing().items())],
        "retention": "conv 0.5, linear 0.25",
        "num-examples": 24,
        "num-test-examples": 24,
        "classes": "0 1 2",
        "train-counts": counts(3),
        "test-counts": counts(1003),
        "task": "classification",
        "main-metric": "accuracy",
        "higher-is-better": True,
        "metric-unit": "fraction",
        "frozen-share": 7 / (7 + 36 + 192),  # biases
    }


def test_what_agents_share_and_what_they_do_not() -> None:
    mixed = {"first_retention": 0.4}
    first, second = (make_agent(i, retention=r, **mixed) for i, r in ((0, 0.1), (1, 0.5)))
    assert first.fingerprint == second.fingerprint
    assert same_tensors(scores_of(first), scores_of(second))
    assert same_tensors(first.first_payload(), second.first_payload())
    assert first.describe()["first-mask"] == second.describe()["first-mask"]
    assert make_agent(0, retention=0.1).describe()["first-mask"] != first.describe()["first-mask"]
    assert same_tensors(first.state().tensors, second.state().tensors)
    own = [make_agent(i, score_init="independent") for i in (0, 1)]
    assert not same_tensors(scores_of(own[0]), scores_of(own[1]))
    assert own[0].fingerprint == own[1].fingerprint
    other = make_agent(0, seed=SEED + 1)
    assert other.fingerprint != first.fingerprint
    assert not same_tensors(scores_of(other), scores_of(first))


def test_agents_with_own_ratios_need_no_equal_first_mask_to_run() -> None:
    agent = make_agent(0, retention=0.2)
    density = sum(int(m.sum()) for m in agent.first_payload().values()) / agent.model.num_weights
    assert density == pytest.approx(0.2, abs=0.1)


# --- randomness ---


def test_dropout_and_batches_come_from_the_agents_streams() -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        agent = make_agent(0, model_fn=noisy_net, local_steps=2)
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        metrics = play(agent, 1, 2)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((metrics, agent.state().tensors))
    assert results[0][0] == results[1][0]
    assert same_tensors(results[0][1], results[1][1])


def test_every_round_and_agent_draws_anew() -> None:
    def loss(agent: int, round: int) -> float:
        data = AgentData.of(split(0), split(0), agent=agent)
        config = MceplConfig(batch_size=8)
        return MceplAgent(agent, build(small_net, seed=1), data, config, seed=1).train(round=round)[
            "train-loss"
        ]

    assert len({loss(0, 1), loss(0, 2), loss(1, 1), loss(1, 2)}) == 4


class Jittered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A data set whose transform draws from the global generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, labels = split(0)
        return inputs[index] + torch.randn(1), int(labels[index])


def test_transforms_draw_from_the_agents_streams() -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        data = AgentData.of(Jittered(), Jittered(), agent=0)
        agent = MceplAgent(0, build(small_net, seed=1), data, MceplConfig(batch_size=8), seed=1)
        results.append(play(agent, 1, 2))
    assert results[0] == results[1]


# --- save and restore ---

FULL: dict[str, Any] = {
    "model_fn": noisy_net,
    "momentum": 0.7,
    "local_steps": 2,
    "lr_schedule": "cosine",
    "lr_rounds": 9,
    "group_lasso": 0.01,
    "score_init": "independent",
    "score_averaging": 0.8,
}


def in_memory(state: AgentState, tmp_path: Path) -> AgentState:
    return state


def through_a_file(state: AgentState, tmp_path: Path) -> AgentState:
    path = tmp_path / "deep" / "agent.safetensors"
    path.parent.mkdir(exist_ok=True)
    (path.parent / ".agent.safetensors.123.tmp").write_bytes(b"of a writer that was killed")
    save_state(state, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["agent.safetensors"]
    return load_state(path)


@pytest.mark.parametrize("way", [in_memory, through_a_file])
@pytest.mark.parametrize("options", [FULL, {}], ids=["full", "plain"])
@pytest.mark.parametrize("trained", [False, True], ids=["between rounds", "before the exchange"])
def test_a_restored_agent_continues_bit_for_bit(
    way: Callable[[AgentState, Path], AgentState],
    options: dict[str, Any],
    trained: bool,
    tmp_path: Path,
) -> None:
    agent, later = make_agent(1, **options), make_agent(1, **options)
    play(agent, 1, 2)
    play(later, 5)  # whatever it did before is overwritten
    if trained:
        agent.train(round=3)
    state = agent.state()
    later.restore(way(state, tmp_path))
    assert same_tensors(agent.state().tensors, later.state().tensors)
    assert agent.state().facts == later.state().facts
    for each in (agent, later):
        each.fuse(neighbors_masks(each, 2, seed=50), round=3)
    assert same_tensors(agent.outgoing(), later.outgoing())
    assert play(agent, 4, 5) == play(later, 4, 5)
    assert same_tensors(agent.state().tensors, later.state().tensors)
    again = make_agent(1, **options)
    again.restore(state)  # the state itself stood still
    assert same_tensors(again.state().tensors, through_a_file(state, tmp_path).tensors)


def test_an_agent_without_neighbors_is_restored_without() -> None:
    agent, later = make_agent(0), make_agent(0)
    agent.fuse({}, round=1)
    later.restore(agent.state())
    assert set(later.model.neighbor_means.values()) == {None}
    assert same_tensors(agent.outgoing(), later.outgoing())


def test_a_state_names_everything_by_group() -> None:
    agent = make_agent(0, model_fn=noisy_net, momentum=0.5)
    agent.train(round=1)
    names = set(agent.state().tensors)
    assert names == {
        *(
            f"{group}/{name}"
            for group in ("scores", "gradient", "velocity", "neighbor-count")
            for name in agent.layers
        ),
        "buffer/1.running_mean",
        "buffer/1.running_var",
        "buffer/1.num_batches_tracked",
    }
    agent.fuse({}, round=1)
    assert {name.partition("/")[0] for name in agent.state().tensors} == {
        "scores",
        "velocity",
        "buffer",
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make_agent(1), r"of agent 1, but agent 0 has 0"),
        (lambda: make_agent(0, seed=8), r"of (seed 8|fingerprint)"),
        (
            lambda: make_agent(0, model_fn=noisy_net),
            r"of fingerprint '[0-9a-f]{32}', but agent 0 has '[0-9a-f]{32}'",
        ),
    ],
)
def test_the_state_of_something_else_is_refused(
    other: Callable[[], MceplAgent], message: str
) -> None:
    agent = make_agent(0)
    before = agent.state().tensors
    with pytest.raises(StateError, match=message):
        agent.restore(other().state())
    assert same_tensors(before, agent.state().tensors)


@pytest.mark.parametrize(
    ("key", "value"), [("algorithm", "fedavg"), ("state-version", 99), ("seed", 8)]
)
def test_foreign_facts_are_refused_by_name(key: str, value: object) -> None:
    agent = make_agent(0)
    state = agent.state()
    with pytest.raises(StateError, match=f"of {key} {value!r}"):
        agent.restore(AgentState({**state.facts, key: value}, state.arrays))
    with pytest.raises(StateError, match=f"of {key} None"):
        agent.restore(AgentState({k: v for k, v in state.facts.items() if k != key}, state.arrays))


@pytest.mark.parametrize("group", ["scores", "gradient", "neighbor-count"])
@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_an_incomplete_state_is_refused_and_changes_nothing(group: str, damage: str) -> None:
    agent, fresh = make_agent(0), make_agent(0)
    agent.train(round=1)
    state, before = agent.state(), fresh.state().tensors
    if damage == "missing":
        del state.arrays[f"{group}/0.weight"]
    else:
        state.arrays[f"{group}/0.weight"] = state.arrays[f"{group}/0.weight"][:1]
    with pytest.raises(StateError, match=rf"agent 0 is incomplete: its {group} must hold"):
        fresh.restore(state)
    assert same_tensors(before, fresh.state().tensors)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "agent-0000.safetensors"
    save_state(make_agent(0).state(), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match=r"agent-0000\.safetensors is no readable agent state"):
            load_state(path)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(StateError, match="no readable agent state"):
        load_state(path)
    for metadata in (None, {"other": "x"}, {"facts": "{not json"}):
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(StateError, match="no readable agent state"):
            load_state(path)
    with pytest.raises(StateError, match="no readable agent state"):
        load_state(tmp_path / "missing.safetensors")


# --- what can go wrong ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_agent(value: float) -> None:
    inputs, labels = split(0)
    data = AgentData.of((inputs, labels), (inputs, labels), agent=6)
    inputs[3] = value  # as a transform might do; before, the split would be refused
    agent = MceplAgent(6, build(small_net, seed=1), data, MceplConfig(), seed=1)
    before = scores_of(agent)
    with pytest.raises(
        DivergedError,
        match=r"agent 6: the training loss of round 2 is nan\. Lower score-lr \(now 10\)",
    ):
        agent.train(round=2)
    assert same_tensors(before, scores_of(agent))


def test_an_empty_split_names_the_agent() -> None:
    with pytest.raises(DataError, match="agent 6's training split is empty"):
        AgentData.of((torch.zeros(0, 1), torch.zeros(0)), split(0), agent=6)


@pytest.mark.parametrize("retention", [0.0, 1.5, {"conv": 0.3, "linear": -0.1}])
def test_a_bad_ratio_is_refused(retention: object) -> None:
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
        MceplConfig(retention=retention)
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
        MceplConfig(first_retention=retention)


def test_training_reduces_the_loss() -> None:
    agent = make_agent(0, retention=0.5, batch_size=24, score_lr=5.0)
    losses = [agent.train(round=round)["train-loss"] for round in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


class WithIdleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("group_lasso", [0.0, 0.01])
def test_a_layer_that_takes_no_part_has_a_gradient_of_zero(group_lasso: float) -> None:
    split = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    config = MceplConfig(retention=0.5, weight_decay=0.0, group_lasso=group_lasso)
    module = build(WithIdleHead, seed=0)
    agent = MceplAgent(0, module, AgentData.of(split, split, agent=0), config, seed=0)
    before = {name: z.detach().clone() for name, z in agent.model.scores.items()}
    agent.train(round=1)
    assert not torch.equal(agent.model.scores["used.weight"], before["used.weight"])
    assert torch.equal(agent.model.scores["idle.weight"], before["idle.weight"]) == (
        group_lasso == 0.0
    )


def test_a_node_config_with_several_ratios_is_refused() -> None:
    with pytest.raises(ConfigError, match="retention-conv is one ratio, of this agent alone"):
        MceplConfig.from_run_config({}, agent=0, node_config={"retention-conv": "0.1, 0.3"})


class NoBatches:
    num_examples = 3

    def training_batches(self, **_: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from ()

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from ()


def test_splits_that_give_no_batch_are_refused() -> None:
    module = build(WithIdleHead, seed=0)
    agent = MceplAgent(
        5, module, AgentData.of(NoBatches(), NoBatches(), agent=5), MceplConfig(), seed=0
    )
    with pytest.raises(DataError, match="agent 5's training split gave no batch in round 1"):
        agent.train(round=1)
    with pytest.raises(DataError, match="agent 5's test split gave no batch"):
        agent.evaluate()
