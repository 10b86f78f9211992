"""Masks that keep 2 of every 4 inputs: formula, layers, agents, what follows."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl import ConfigError, DivergedError, MaskedModel, decode_frame, encode_frame
from flower_mcepl.agents import find_algorithm
from flower_mcepl.agents.registry import read_config
from flower_mcepl.masks import LayerSpec, find_maskable
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.blocks import TWO_OF_FOUR, block_layers
from flower_mcepl.masks.fusion import MASK_AVERAGING
from flower_mcepl.masks.gates import MaskRules, gate_name, masks_of
from flower_mcepl.personal import Origin, compact, personal_bytes
from flower_mcepl.personal.reading import opened
from flower_mcepl.personal.sizing import expected_size
from tests.fleet.agents import make_agent, same_tensors
from tests.oracles import gates as gate_oracles
from tests.oracles import masks as oracles

BLOCK = {"retention": {"conv": 0.3, "linear": 0.5}, "block": TWO_OF_FOUR}
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: 4 * n))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the formula ---


@given(shape=shapes, seed=st.integers(0, 999), levels=st.sampled_from([0, 1, 2, 3]))
def test_two_of_four_by_the_oracle(shape: tuple[int, int], seed: int, levels: int) -> None:
    y = normal(shape, seed)
    y = (levels * y).round() if levels else y  # with many ties, or none
    mask = maths.two_of_four(y)
    assert np.array_equal(mask.numpy(), oracles.two_of_four(y.numpy()))
    assert (mask.view(-1, 4).sum(1) == 2).all()
    assert torch.equal(mask, maths.two_of_four(-y))


def test_of_equals_the_earlier_stays() -> None:
    assert maths.two_of_four(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
    one = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert maths.two_of_four(one).tolist() == [[False, True, True, False]]


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(DivergedError, match="holds NaN"):
        maths.two_of_four(torch.tensor([[0.0, torch.nan, 1.0, 1.0]]))


@given(shape=shapes, share=st.floats(0.01, 1.0), seed=st.integers(0, 999))
def test_gates_close_whole_rows_of_it(shape: tuple[int, int], share: float, seed: int) -> None:
    """And in rows that are closed ``u`` is as if they were open."""
    spec = LayerSpec("w", "linear", torch.Size(shape))
    y, a = normal(shape, seed), normal(shape[:1], seed + 1)
    rules = MaskRules(retention={"w": 0.5}, filters={"w": share}, blocks=("w",))
    masks = masks_of({"w": y, gate_name("w"): a}, {"w": spec}, rules)
    open_rows = gate_oracles.gates(a.numpy(), share)
    due = oracles.two_of_four(y.numpy()) & open_rows[:, None]
    assert np.array_equal(masks["w"].numpy(), due)
    assert masks["w"].sum() == rules.num_kept(spec)
    u = rules.as_if_open(spec, y, masks["w"], spec.spread(masks[gate_name("w")]))
    assert np.array_equal(u.numpy(), oracles.two_of_four(y.numpy()))


# --- layers ---


def net(inputs: int = 8, last: int = 6) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, last), nn.ReLU(), nn.Linear(last, 3))
    )


def model(module: nn.Module, **options: Any) -> MaskedModel:
    options = {"retention": 0.5, "generator": torch.Generator().manual_seed(1), **options}
    with warnings.catch_warnings(action="ignore"):
        blocks = block_layers(TWO_OF_FOUR, module, find_maskable(module))
    return MaskedModel(module, **{"blocks": blocks, **options})


def test_linear_layers_whose_inputs_fit_have_blocks_and_others_are_named() -> None:
    with pytest.warns(UserWarning, match=r"inputs of 4\.weight is no multiple of 4"):
        fit = block_layers(TWO_OF_FOUR, net(), find_maskable(net()))
    assert fit == ("0.weight", "2.weight")
    assert block_layers("none", net(), find_maskable(net())) == ()


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Sequential(nn.Linear(6, 3)), r"only 0\.weight with 6"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Embedding(4, 4)), "has none"),
    ],
)
def test_a_network_without_such_layers_is_refused(module: nn.Module, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        block_layers(TWO_OF_FOUR, module, find_maskable(module))


def test_the_networks_weights_and_gradients_are_the_oracles() -> None:
    made = model(net(last=8))
    weights = made.masked_weights()
    for name, z in made.scores.items():
        w = made.module.get_parameter(name)
        mask = torch.from_numpy(oracles.two_of_four(z.detach().numpy()))
        assert torch.equal(made.masks()[name], mask)
        assert_close(weights[name], w * mask)
        upstream = normal(tuple(z.shape), 3)
        (g,) = torch.autograd.grad((weights[name] * upstream).sum(), z)
        assert_close(g, upstream * w * z.sign())  # straight through


def test_another_retention_is_refused_by_the_layers_name() -> None:
    with pytest.raises(ConfigError, match=r"retention of 0\.weight must be 0\.5; got 0\.9.*Leave"):
        model(net(), retention=0.9)
    assert model(net(), retention={"linear": 0.5, "4.weight": 0.9}).retention["4.weight"] == 0.9


def test_a_rule_that_blends_masks_is_refused() -> None:
    with pytest.raises(ConfigError, match="filters, block and retention-budget need a rule"):
        model(net(), fusion=MASK_AVERAGING)


# --- settings ---


def test_the_key_means_its_retention_where_none_is_given() -> None:
    read = read_config("mcepl", {"block": "2:4", "num-rounds": 4}, agent=0)
    assert read.retention == {"conv": 0.3, "linear": 0.5}  # type: ignore[attr-defined]
    assert read.first_retention == {"conv": 0.3, "linear": 0.5}  # type: ignore[attr-defined]
    given = read_config("mcepl", {"block": "2:4", "retention-linear": 0.9}, agent=0)
    assert given.retention["linear"] == 0.9  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"retention of 3\.weight must be 0\.5; got 0\.9"):
        make_agent(0, block=TWO_OF_FOUR)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"block": "4:8"}, "block must be one of none, 2:4; got '4:8'"),
        ({"block": "2:4", "retention_budget": "network"}, "needs retention-budget layer; got 'net"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make_agent(0, **{**BLOCK, **settings})


# --- agents ---


def in_blocks(mask: Tensor) -> bool:
    return bool((mask.reshape(-1, 4).sum(1) == 2).all())


GATED = {"filters_layers": "3.weight=0.5", "filters_warmup": 1}


@pytest.mark.parametrize("more", [{}, GATED, {"first_mask": "scores", "fusion_strength": 3.0}])
def test_agents_learn_send_store_and_restore_blocks(more: dict[str, Any]) -> None:
    agents = [make_agent(index, **BLOCK, **more) for index in range(2)]
    for round in range(1, 4):
        for each in agents:
            each.train(round=round)
        payloads = [each.outgoing() for each in agents]
        for index, each in enumerate(agents):
            each.fuse({1 - index: payloads[1 - index]}, round=round)
    one = agents[0]
    rows = one.model.masks()["3.weight"]
    assert in_blocks(rows[rows.any(1)])
    assert (int((~rows.any(1)).sum()) > 0) == ("filters_layers" in more)
    assert one.describe()["retention"] == "conv 0.3, linear 0.5 as 2:4"
    other = make_agent(0, **BLOCK, **more)
    other.restore(one.state())
    assert same_tensors(other.model.masks(), one.model.masks())
    masks = find_algorithm("mcepl").masks_of(one.state(), one.parameters())
    assert isinstance(masks, dict)
    assert np.array_equal(masks["3.weight"], rows.numpy())


def test_the_first_mask_of_scores_is_in_blocks() -> None:
    agent = make_agent(0, **BLOCK, first_mask="scores")
    first = agent.first_payload()
    assert first is not None
    assert in_blocks(first["3.weight"])
    assert torch.equal(first["3.weight"], agent.model.masks()["3.weight"])


def test_frames_and_files_hold_them_exactly() -> None:
    agent = make_agent(0, **BLOCK)
    agent.train(round=1)
    payload = agent.outgoing()
    frame = encode_frame(payload, sender=0, round=1, fingerprint=agent.fingerprint)
    layers = {name: tuple(mask.shape) for name, mask in payload.items()}
    read = decode_frame(frame, layers=layers, dtype=torch.bool).tensors
    assert same_tensors(dict(read), payload)
    data = personal_bytes(agent.personal_model(), origin=Origin(agent.seed, 0))
    file = opened(data, where="x")
    assert file.stored == 0
    assert in_blocks(file.masks["3.weight"])
    assert len(data) <= expected_size(agent).nbytes
    small = compact(agent.personal_model(), torch.randn(2, 1, 6, 6))
    assert small.filters.keys() <= {"0"}  # no row of a block is ever empty


def test_agents_with_and_without_blocks_exchange() -> None:
    """A block is an agent's own matter, as its retention is."""
    one, other = make_agent(0, **BLOCK), make_agent(1, retention=BLOCK["retention"])
    one.fuse({1: other.outgoing()}, round=1)
    other.fuse({0: one.outgoing()}, round=1)
    assert in_blocks(one.model.masks()["3.weight"])
    assert not in_blocks(other.model.masks()["3.weight"])
