"""The preset ``best.toml``, the most that masks are known to learn, and its keys."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import (
    Agent,
    AgentData,
    ConfigError,
    FingerprintError,
    MaskedModel,
    MceplAgent,
    MceplConfig,
    StateError,
    Topology,
    shared_module,
    simulate,
)
from flower_mcepl.agents import find_algorithm, make_server
from flower_mcepl.agents import make_agent as registered
from flower_mcepl.agents.handshake import KEPT_BY_LAYER, check_common_ground
from flower_mcepl.agents.parts.score_step import ScoreStep
from flower_mcepl.agents.registry import read_config
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.masks.formulas import init_scores
from flower_mcepl.masks.layers import LayerSpec
from flower_mcepl.masks.weight_init import with_weights
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.streams import torch_stream
from tests.fleet.agents import SEED, Reader, make_agent, same_tensors, split
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid
from tests.oracles.candidate import CONV, HEAD, Candidate
from tests.oracles.masks import filter_normalized

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESETS = sorted(EXAMPLES.glob("*/presets/*.toml"))
PRESET = tomllib.loads((EXAMPLES / "cifar10" / "presets" / "best.toml").read_text())
APPS_OWN = {"augment"}  # the app reads it, and no algorithm
KEYS = {key: value for key, value in PRESET.items() if key not in APPS_OWN}
SIZE = 3  # agents, all of whom hear each other


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


def net() -> nn.Module:
    return shared_module(Net, seed=SEED)


class Listed:
    """Batches that are listed beforehand, two a round."""

    num_examples = 24

    def __init__(self, agent: int) -> None:
        self.agent = agent

    def of(self, round: int) -> list[tuple[Tensor, Tensor]]:
        inputs, labels = split(10 * self.agent + round)
        return [*zip(inputs.split(12), labels.split(12), strict=True)]

    def training_batches(self, *, round: int, **_: object) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.of(round)

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.of(0)


def preset_agent(index: int, algorithm: str = "mcepl", **changes: Any) -> Agent:
    keys = {**KEYS, "num-rounds": 4} | {k.replace("_", "-"): v for k, v in changes.items()}
    listed = Listed(index)
    data = AgentData.of(listed, listed, agent=index)
    return registered(algorithm, index, net(), data, keys, seed=SEED)


def masked(agent: Agent) -> MceplAgent:
    assert isinstance(agent, MceplAgent)
    return agent


def scores_of(agent: Agent) -> dict[str, Tensor]:
    return {name: z.detach().clone() for name, z in masked(agent).model.scores.items()}


def exchange(agents: list[Any], *rounds: int) -> None:
    """Whole rounds in which everyone hears everyone."""
    for round in rounds:
        for agent in agents:
            agent.train(round=round)
        sent = {agent.index: agent.outgoing() for agent in agents}
        for agent in agents:
            inbox = {index: payload for index, payload in sent.items() if index != agent.index}
            agent.fuse(inbox, round=round)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_presets_set_keys_that_their_app_declares(path: Path) -> None:
    """`flwr run` refuses others, and values of another type."""
    app = tomllib.loads((path.parents[1] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    for key, value in tomllib.loads(path.read_text()).items():
        assert type(value) is type(app["config"][key]), key


# --- the candidate, exactly ---


@pytest.mark.parametrize("factor", [1, 300])
def test_the_preset_by_the_oracle(factor: int) -> None:
    """Also with steps so large that a network so small changes its masks."""
    steps = {"score_lr": factor * 0.0005, "score_lr_layers": f"fc*={factor * 0.0001}"}
    assert (KEYS["score-lr"], KEYS["score-lr-layers"]) == (0.0005, "fc*=0.0001")
    agents = [masked(preset_agent(index, **steps)) for index in range(SIZE)]
    first = {
        name: init_scores(torch.Size(shape), generator=generator).abs()
        for generator in [torch_stream(SEED, "scores")]
        for name, shape in ((CONV, (4, 1, 3, 3)), (HEAD, (3, 64)))
    }
    oracles = []
    for agent in agents:
        module = agent.model.module
        weights = {name: module.get_parameter(name).numpy() for name in (CONV, HEAD)}
        for name, fan_in in ((CONV, 9), (HEAD, 64)):
            assert np.allclose(abs(weights[name]), fan_in**-0.5, rtol=1e-6)
        biases = (module.conv.bias.numpy(), module.fc.bias.numpy())
        assert np.array_equal(biases[0], net().conv.bias.detach().numpy())
        assert same_tensors(scores_of(agent), first)
        magnitudes = {name: s.numpy() for name, s in first.items()}
        oracles.append(Candidate(weights, biases, magnitudes, factor=factor))
    flips = 0
    for round in range(1, 7):
        exchange(agents, round)
        for agent, oracle in zip(agents, oracles, strict=True):
            for inputs, labels in Listed(agent.index).of(round):
                oracle.step((inputs.double().numpy(), labels.numpy()), round=round)
        sent = [oracle.sent() for oracle in oracles]
        for index, (agent, oracle) in enumerate(zip(agents, oracles, strict=True)):
            oracle.hear([mask for other, mask in enumerate(sent) if other != index])
            assert np.array_equal(agent.model.neighbor_means[CONV], oracle.n.astype(np.float32))
            assert agent.model.neighbor_means[HEAD] is None
            for name, s in scores_of(agent).items():
                np.testing.assert_allclose(s.numpy(), oracle.s[name], rtol=2e-4, atol=1e-6)
            for name, mask in agent._personal_masks().items():
                assert np.array_equal(mask.numpy(), oracle.personal()[name]), (round, name)
            flips += int((sent[index] != agent.first_payload()[CONV].numpy()).sum())
    assert factor == 1 or flips > 50


def test_what_travels_is_the_convolutions_mask_alone() -> None:
    agents = [preset_agent(index) for index in range(SIZE)]
    readers, names, bits = [Reader(agent) for agent in agents], set(), []

    def read(round: int, agent: int, reply: Any) -> None:
        for frame in reply.frames[:1]:
            names.update(readers[agent].read(frame.data).tensors)
            bits.append(frame.reference)

    result = simulate(agents, Topology.complete(SIZE), num_rounds=3, on_reply=read)
    assert names == {CONV} == set(agents[0].layers)
    assert bits[:SIZE] == [0] * SIZE  # from the first on what is sent is what flipped
    facts = agents[0].describe()
    assert facts["share"] == "conv*"
    assert (facts["num-weights"], facts["kept-weights"], facts[KEPT_BY_LAYER]) == (36, 18, [18])
    assert agents[0].first_payload().keys() == {CONV}
    assert agents[0].prior.classes(HEAD) is None
    assert result.summary["bytes"]["fp32_total"] == 4 * 36 * SIZE * (SIZE - 1) * 3
    assert result.rows[-1]["density"] == 0.5  # of all masks


@pytest.mark.parametrize("algorithm", ["mcepl", "mcepl-no-finetuning", "mask-averaging"])
def test_the_first_mask_is_that_of_the_first_scores_and_counts_for_nothing(algorithm: str) -> None:
    agent = masked(preset_agent(0, algorithm))
    assert agent.model.neighbor_means == {CONV: None, HEAD: None}
    assert torch.equal(agent.first_payload()[CONV], agent.model.masks()[CONV])


# --- scores as magnitudes ---

BOTH = {"finetune_lr": 0.0, "weight_decay": 0.01, "batch_size": 12, "local_steps": 2}


def sides(score_form: str, **config: Any) -> list[MceplAgent]:
    return [make_agent(i, **BOTH, score_form=score_form, **config) for i in range(SIZE)]


@pytest.mark.parametrize(
    "config",
    [
        {"score_gradient": "raw", "score_lr": 2.0, "group_lasso": 0.001},
        {"score_gradient": "normalized", "score_lr": 0.02},
        {"score_gradient": "filter-normalized", "score_lr": 0.02},
    ],
    ids=["raw", "normalized", "filter-normalized"],
)
def test_without_momentum_a_magnitude_is_the_size_of_the_signed_score(
    config: dict[str, Any],
) -> None:
    signed, magnitudes = sides("signed", **config), sides("magnitude", **config)
    start = scores_of(signed[0])
    for round in range(1, 6):
        exchange(signed, round)
        exchange(magnitudes, round)
        for one, other in zip(signed, magnitudes, strict=True):
            assert same_tensors(
                {name: z.abs() for name, z in scores_of(one).items()}, scores_of(other)
            )
            assert same_tensors(one.outgoing(), other.outgoing())
    ends = scores_of(signed[0])
    assert sum(int((ends[name].sign() != start[name].sign()).sum()) for name in start) > 5


def test_with_momentum_a_magnitude_stays_at_the_wall() -> None:
    config = {"score_gradient": "normalized", "score_lr": 0.02, "momentum": 0.9}
    signed, magnitudes = sides("signed", **config), sides("magnitude", **config)
    exchange(signed, 1, 2, 3)
    exchange(magnitudes, 1, 2, 3)
    assert not same_tensors(
        {name: z.abs() for name, z in scores_of(signed[0]).items()}, scores_of(magnitudes[0])
    )
    for z in scores_of(magnitudes[0]).values():
        assert z.min() > 0


def test_fine_tuning_leaves_magnitudes_too() -> None:
    agents = [
        make_agent(i, score_form="magnitude", score_lr=2.0, finetune_lr=50.0) for i in range(SIZE)
    ]
    exchange(agents, 1)
    assert all(z.min() > 0 for agent in agents for z in scores_of(agent).values())


@given(
    shape=st.sampled_from([(3, 2, 2, 2), (4, 5), (1, 1), (4, 3, 2)]),
    groups=st.sampled_from([0, 0, 1, 2]),
    quiet=st.sampled_from([1.0, 1e-3, 0.0]),
    scale=st.sampled_from([1e-25, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
def test_filter_normalized_steps_by_the_oracle(
    shape: tuple[int, ...], groups: int, quiet: float, scale: float, seed: int
) -> None:
    transposed = groups if groups and shape[0] % groups == 0 else 0
    layer = LayerSpec("x", "conv", torch.Size(shape), transposed)
    sizes = torch.full((layer.num_filters,), scale, dtype=torch.float64)
    sizes[0] *= quiet  # a filter that learns little, or nothing
    g = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g *= layer.spread(sizes)
    config = MceplConfig(score_gradient="filter-normalized", weight_decay=0.0)
    moved, _ = ScoreStep(config)(torch.zeros(shape), g, None, layer=layer, lr=1.0)
    expected = filter_normalized(g.numpy(), layer.transposed_groups)
    np.testing.assert_allclose(-moved.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert abs(expected).max() <= 2 * np.sqrt(g.numel())


# --- step sizes of single layers ---


def test_step_sizes_by_layer() -> None:
    config = MceplConfig(score_lr=2.0, score_lr_layers="fc*=0.5, conv1.weight=3, conv*=1")
    assert config.lr_by_layer(["conv1.weight", "conv2.weight", "fc.weight", "x"]) == {
        "conv1.weight": 3.0,
        "conv2.weight": 1.0,
        "fc.weight": 0.5,
        "x": 2.0,
    }


def test_a_layers_step_is_its_own() -> None:
    moves = []
    for layers in ("", "3.*=0.25"):
        agent = make_agent(0, score_lr=0.5, score_lr_layers=layers, weight_decay=0.0)
        before = scores_of(agent)
        agent.train(round=1)
        moves.append({name: z - before[name] for name, z in scores_of(agent).items()})
    assert torch.equal(moves[0]["0.weight"], moves[1]["0.weight"])
    torch.testing.assert_close(moves[0]["3.weight"] / 2, moves[1]["3.weight"], atol=1e-7, rtol=1e-4)


# --- fusion strength ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [3.0] * 6),
        ("linear", [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]),
        ("cosine", [3.0, 3 - (1 - 0.5**0.5), 2.0, 2 - 0.5**0.5, 1.0, 1.0]),
    ],
)
def test_the_strength_goes_from_one_to_the_other(schedule: str, expected: list[float]) -> None:
    config = MceplConfig(fusion_strength=3.0, fusion_schedule=schedule, fusion_rounds=4)
    assert [config.strength(round) for round in range(1, 7)] == pytest.approx(expected)


def test_a_schedule_without_a_length_lasts_the_run() -> None:
    keys = {"fusion-schedule": "linear", "fusion-strength": 2.0, "num-rounds": 8}
    assert read_config("mcepl", keys, agent=0).fusion_rounds == 8


def test_masks_follow_the_strength_of_their_round() -> None:
    """Beyond all scores it is the neighbors' mask that is kept."""
    schedule = {"fusion_schedule": "linear", "fusion_strength": 0.0, "fusion_rounds": 1}
    agent = make_agent(
        0, **schedule, last_fusion_strength=1e6, score_lr=1e-9, finetune_lr=0.0, retention=0.5
    )
    agent.train(round=1)
    own = {name: z.abs() for name, z in scores_of(agent).items()}
    neighbor = {name: own[name] < own[name].median() for name in own}
    alone = agent.outgoing()
    agent.fuse({1: neighbor}, round=1)
    assert same_tensors(agent.outgoing(), alone)
    agent.train(round=2)
    for name, mask in agent.outgoing().items():
        assert not bool((neighbor[name] & ~mask).any())


# --- frozen weights as signed constants ---


def test_signs_depend_on_the_layers_name_and_the_seed_alone() -> None:
    class Turned(Net):  # the same layers, made in another order
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.fc = nn.Linear(64, 3)
            self.conv = nn.Conv2d(1, 4, 3)

    def weights(model_fn: Any, seed: int) -> dict[str, Tensor]:
        agent = make_agent(0, model_fn=model_fn, seed=seed, weight_init="signed-constant")
        return {name: agent.model.module.get_parameter(name) for name in (CONV, HEAD)}

    one, other = weights(Net, 1), weights(Turned, 1)
    assert same_tensors(one, other)
    assert not torch.equal(one[CONV], weights(Net, 2)[CONV])
    for weight in one.values():
        assert 0.2 < float((weight > 0).float().mean()) < 0.8


def test_a_transposed_convolution_counts_its_own_inputs() -> None:
    def model_fn() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4))

    agent = make_agent(0, model_fn=model_fn, weight_init="signed-constant")
    weight = agent.model.module.get_parameter("0.weight")
    assert torch.allclose(weight.abs(), torch.tensor(27**-0.5))
    assert torch.equal(agent.model.module[1].weight, torch.ones(4))


class Padded(nn.Module):
    """Token 2 is padding; the embedding is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4, padding_idx=2)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.tokens(x).sum(1))
        return y


def test_a_bag_of_embeddings_keeps_its_row_for_padding() -> None:
    made = with_weights(nn.EmbeddingBag(5, 4, padding_idx=2), "signed-constant", seed=1)
    assert [bool(row.any()) for row in made.get_parameter("weight")] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("algorithm", ["mcepl", "fedpm"])
def test_a_row_for_padding_stays_zero_among_signed_constants(algorithm: str) -> None:
    tokens = torch.tensor([[0, 1, 3], [1, 4, 2]])
    data = AgentData.of((tokens, torch.tensor([0, 1])), (tokens, torch.tensor([0, 1])), agent=0)
    keys = {"weight-init": "signed-constant", "num-rounds": 1, "batch-size": 2}
    module = shared_module(Padded, seed=SEED)
    agent = registered(algorithm, 0, module, data, keys, seed=SEED)
    agent.train(round=1)
    model = agent.personal_model()
    weight = model.get_parameter("tokens.weight")
    assert not weight[2].any()
    assert weight[[0, 1, 3, 4]].any(1).all() or algorithm == "fedpm"
    longer = torch.cat([tokens, torch.full((2, 7), 2)], 1)
    assert torch.equal(model(longer), model(tokens))


def test_other_weights_are_another_fingerprint() -> None:
    one, other = make_agent(0), make_agent(1, weight_init="signed-constant")
    with pytest.raises(FingerprintError, match="different frozen weights"):
        check_common_ground("agent 0", one.describe(), "agent 1", other.describe())
    assert make_agent(2, weight_init="signed-constant").fingerprint == other.fingerprint


def test_fedpms_agents_and_server_make_the_same_constants() -> None:
    keys = {"weight-init": "signed-constant"}
    agent = preset_agent(0, "fedpm", weight_init="signed-constant", momentum=0.0)
    server = make_server("fedpm", net(), SIZE, keys, seed=SEED)
    check_common_ground("agent 0", agent.describe(), "the server", server.describe())
    plain = make_server("fedpm", net(), SIZE, {"weight-init": "module"}, seed=SEED)
    with pytest.raises(FingerprintError, match="different frozen weights"):
        check_common_ground("agent 0", agent.describe(), "the server", plain.describe())


def test_constants_serve_a_model_of_ones_own() -> None:
    """Zeros of the model function, over which no mask could learn, go."""

    class Zeros(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.fc.weight)

    with pytest.warns(UserWarning, match="all frozen weights of fc.weight are zero"):
        MaskedModel(Zeros(), generator=torch.Generator())
    agent = make_agent(0, model_fn=Zeros, weight_init="signed-constant")
    assert bool(agent.model.module.get_parameter(HEAD).all())


# --- states, Flower, errors ---


def test_a_restored_fleet_goes_on_bit_for_bit() -> None:
    changes = {"fusion_schedule": "cosine", "last_fusion_strength": 0.5}
    whole, first = ([preset_agent(i, **changes) for i in range(SIZE)] for _ in range(2))
    exchange(whole, 1, 2, 3, 4)
    exchange(first, 1, 2)
    second = [preset_agent(i, **changes) for i in range(SIZE)]
    for old, new in zip(first, second, strict=True):
        new.restore(old.state())
        assert new.evaluate() == old.evaluate()
    exchange(second, 3, 4)
    for one, other in zip(whole, second, strict=True):
        assert one.state().facts == other.state().facts
        assert same_tensors(one.state().tensors, other.state().tensors)
        assert one.evaluate() == other.evaluate()


def test_the_final_masks_are_read_from_the_state() -> None:
    agents = [preset_agent(i) for i in range(SIZE)]
    exchange(agents, 1, 2, 3)
    masks = find_algorithm("mcepl").masks_of(agents[0].state(), agents[0].parameters())
    assert isinstance(masks, dict)
    live = masked(agents[0]).model.masks()
    assert same_tensors({name: torch.from_numpy(mask) for name, mask in masks.items()}, live)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(1, 4, 6), nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1).relu()
        y: Tensor = self.both(x, x)
        return y


def test_a_bilinear_layers_final_mask_keeps_the_share_of_linear_layers() -> None:
    agent = make_agent(0, model_fn=Bilinear, retention={"conv": 0.3, "linear": 0.8})
    masks = find_algorithm("mcepl").masks_of(agent.state(), agent.parameters())
    assert isinstance(masks, dict)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "conv.weight": 44,
        "both.weight": 39,
    }


def test_a_state_of_other_shared_layers_is_refused() -> None:
    agents = [preset_agent(i) for i in range(SIZE)]
    exchange(agents, 1)
    with pytest.raises(StateError, match="neighbor-count must hold"):
        preset_agent(0, share="*").restore(agents[0].state())


def test_flower_gives_the_rows_and_states_of_simulate(tmp_path: Path) -> None:
    app = make_agent_app(lambda context: preset_agent(agent_index(context)))
    grid = InProcessGrid(app, SIZE)
    strategy = GossipStrategy(topology=Topology.complete(SIZE), evaluate_every=2, record=tmp_path)
    strategy.start(grid=grid, num_rounds=3)
    agents = [preset_agent(index) for index in range(SIZE)]
    result = simulate(agents, Topology.complete(SIZE), num_rounds=3, evaluate_every=2)
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in (result.rows, strategy.monitor.rows)
    ]
    assert rows[0] == rows[1]
    for agent in agents:
        kept = state_of(grid.contexts[1000 + agent.index]).state
        assert same_tensors(kept.tensors, agent.state().tensors)


BAD = [
    ({"score_form": "positive"}, "score-form must be one of signed, magnitude; got 'positive'"),
    (
        {"score_gradient": "sign"},
        "score-gradient must be one of raw, normalized, filter-normalized; got 'sign'",
    ),
    ({"score_lr_layers": "fc"}, 'score-lr-layers must be NAME=STEP, .*"fc\\*=0.0001"; got'),
    ({"score_lr_layers": "fc*=0"}, r"key score-lr-layers, fc\*, must be > 0; got 0\.0"),
    ({"score_lr_layers": "fc*=nan"}, r"key score-lr-layers, fc\*, must be > 0; got nan"),
    ({"score_lr_layers": "head*=1"}, r"'head\*' of score-lr-layers fits no layer; .*conv\.weight"),
    ({"weight_init": "ones"}, "weight-init must be one of module, signed-constant; got 'ones'"),
    ({"first_mask": "zeros"}, "first-mask must be one of random, scores; got 'zeros'"),
    ({"score_init": "independent"}, "first-mask scores is the mask of common first scores"),
    ({"fusion_strength": -1.0}, r"fusion-strength must be a finite number >= 0; got -1\.0"),
    ({"last_fusion_strength": float("inf")}, "last-fusion-strength must be a finite number >= 0"),
    ({"fusion_schedule": "step"}, "fusion-schedule must be one of constant, linear, cosine"),
    ({"fusion_rounds": -1}, "fusion-rounds must be >= 0; got -1"),
    ({"share": "head*"}, r"'head\*' of share matches nothing .*: conv\.weight, fc\.weight"),
    ({"share": "conv*, "}, "share must be names or patterns of parameters, .*; got 'conv"),
    ({"share": ""}, "share must be names or patterns of parameters"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_key_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset_agent(0, **changes)


def test_a_schedule_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="fusion-schedule linear needs fusion-rounds >= 1"):
        MceplConfig(fusion_schedule="linear")
