"""Two-level masks: formulas against the oracle, layers with gates, the network."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl import ConfigError, MaskedModel
from flower_mcepl.masks import LayerSpec, find_maskable
from flower_mcepl.masks import formulas as maths
from flower_mcepl.masks.fusion import MASK_AVERAGING
from flower_mcepl.masks.gates import MaskRules, gate_name, masks_of, resolve_filters
from tests.oracles import gates as oracles

shares = st.floats(0, 1, exclude_min=True)
seeds = st.integers(0, 999)
# shape, groups of a transposed convolution
layouts = st.sampled_from([((5, 7), 0), ((6, 2, 3, 3), 0), ((4, 3, 2, 2), 1), ((4, 3, 2), 2)])
Layout = tuple[tuple[int, ...], int]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec_of(layout: Layout) -> LayerSpec:
    shape, groups = layout
    return LayerSpec("w", "conv", torch.Size(shape), groups)


@given(share=st.integers(1, 100), filters=st.integers(1, 300))
def test_as_many_filters_stay_as_the_share_says(share: int, filters: int) -> None:
    exact = -(-share * filters // 100)  # whole numbers: no rounding
    assert maths.kept_filters(filters, share=share / 100) == max(1, exact)


@given(layout=layouts)
def test_spread_undoes_rows(layout: Layout) -> None:
    spec = spec_of(layout)
    rows = spec.rows(spec.spread(torch.arange(spec.num_filters)))
    assert torch.equal(rows, torch.arange(spec.num_filters).view(-1, 1).expand(rows.shape))


@given(layout=layouts, share=shares, retention=shares, seed=seeds)
def test_two_level_masks_by_the_oracle(
    layout: Layout, share: float, retention: float, seed: int
) -> None:
    spec = spec_of(layout)
    y, a = normal(layout[0], seed), normal((spec.num_filters,), seed + 1)
    rules = MaskRules(retention={"w": retention}, filters={"w": share})
    masks = masks_of({"w": y, gate_name("w"): a}, {"w": spec}, rules)
    q = oracles.gates(a.numpy(), share)
    assert np.array_equal(masks[gate_name("w")].numpy(), q)
    due = oracles.two_level_mask(y.numpy(), q, retention, layout[1])
    assert np.array_equal(masks["w"].numpy(), due)
    assert masks["w"].sum() == rules.num_kept(spec)
    assert not spec.rows(masks["w"])[~masks[gate_name("w")]].any()


@given(layout=layouts, share=shares, retention=shares, seed=seeds)
def test_gradients_by_the_oracle(layout: Layout, share: float, retention: float, seed: int) -> None:
    spec = spec_of(layout)
    w, upstream = normal(layout[0], seed + 2), normal(layout[0], seed + 3)
    y = normal(layout[0], seed).requires_grad_()
    a = normal((spec.num_filters,), seed + 1).requires_grad_()
    rules = MaskRules(retention={"w": retention}, filters={"w": share})
    masks = masks_of({"w": y, gate_name("w"): a}, {"w": spec}, rules)
    q = spec.spread(masks[gate_name("w")])
    u = maths.as_if_open(y, masks["w"], q)
    weight = maths.gated_weight(w, y, u, a=spec.spread(a), q=q, scale=rules.scale(spec))
    assert_close(weight, w * masks["w"] * rules.scale(spec))
    on_y, on_a = torch.autograd.grad((weight * upstream).sum(), (y, a))
    arrays = [x.detach().double().numpy() for x in (upstream, w, y, a)]
    gates = masks[gate_name("w")].numpy()
    due_u = oracles.open_mask(arrays[2], masks["w"].numpy(), gates, layout[1])
    assert np.array_equal(u.numpy(), due_u)
    due = oracles.gated_gradients(*arrays, due_u, gates, layout[1])
    assert_close(on_y.double(), torch.from_numpy(due[0]), rtol=1e-5, atol=1e-6)
    assert_close(on_a.double(), torch.from_numpy(due[1]), rtol=1e-5, atol=1e-5)


@given(layout=layouts, step=st.floats(0, 8), seed=seeds)
def test_proximal_step_by_the_oracle(layout: Layout, step: float, seed: int) -> None:
    spec, z = spec_of(layout), normal(layout[0], seed)
    norms = torch.linalg.vector_norm(spec.rows(z), dim=1)
    factors = spec.spread(maths.proximal_factors(norms, step=step))
    shrunk = maths.shrunk(z, factors)
    due = torch.from_numpy(oracles.proximal(z.double().numpy(), step, layout[1]))
    assert_close(shrunk.double(), due, rtol=1e-4, atol=1e-6)
    assert torch.equal(shrunk.sign(), z.sign())  # what is zero would never come back


def test_a_filter_of_zeros_stays_one() -> None:
    assert maths.proximal_factors(torch.zeros(1), step=0.0).tolist() == [0.0]


@given(retention=shares, seed=seeds)
def test_budget_of_a_network_by_the_oracle(retention: float, seed: int) -> None:
    layers = {name: LayerSpec(name, "linear", torch.Size(shape)) for name, shape in TWO.items()}
    y = {name: normal(shape, seed + place) for place, (name, shape) in enumerate(TWO.items())}
    y["one"][2] = 0.0  # as a lasso leaves a filter
    rules = MaskRules(retention=dict.fromkeys(TWO, retention), budget="network")
    masks = masks_of(y, layers, rules)
    keep = sum(rules.num_kept(spec) for spec in layers.values())
    due = oracles.network_masks([values.double().numpy() for values in y.values()], keep)
    assert all(np.array_equal(m.numpy(), d) for m, d in zip(masks.values(), due, strict=True))


TWO = {"one": (6, 9), "two": (3, 4)}


# --- which layers have gates ---


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ELU(),
        nn.Conv2d(4, 6, 3),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ELU(),
        nn.Linear(10, 3),
    )


def shares_of(module: nn.Module, share: float = 0.5, **by_layer: float) -> dict[str, float]:
    keys = {name.replace("_", "."): value for name, value in by_layer.items()}
    return resolve_filters(share, keys, module, find_maskable(module))


def test_first_and_last_layer_have_no_gates() -> None:
    assert shares_of(net()) == {"2.weight": 0.5, "5.weight": 0.5}


def test_keys_by_layer_win() -> None:
    own = resolve_filters(0.5, {"0.*": 0.75, "5.weight": 1.0}, net(), find_maskable(net()))
    assert own == {"0.weight": 0.75, "2.weight": 0.5}


def test_rows_of_embeddings_and_recurrent_layers_are_no_filters() -> None:
    parts = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(4, 3), nn.LSTM(3, 3), nn.Linear(3, 2)])
    with pytest.raises(
        ConfigError, match=r"this network has none there, only 0\.weight, 1\.weight"
    ):
        resolve_filters(0.5, {}, parts, find_maskable(parts))


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0, math.nan])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"share of filters that stays on, .*\(0, 1\]; got"):
        shares_of(net(), share)
    with pytest.raises(ConfigError, match=r"stays on, filters-layers, 2\.weight"):
        resolve_filters(0.5, {"2.weight": share}, net(), find_maskable(net()))


def test_a_key_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'head\*' of filters-layers fits no layer; .*2.weight"):
        resolve_filters(0.5, {"head*": 0.5}, net(), find_maskable(net()))


# --- the network ---


def masked(share: float = 0.5, **options: Any) -> MaskedModel:
    torch.manual_seed(0)
    module = net()
    generator = torch.Generator().manual_seed(1)
    return MaskedModel(
        module, retention=0.5, filters=shares_of(module, share), generator=generator, **options
    )


def with_random_gates(model: MaskedModel) -> MaskedModel:
    for place, name in enumerate(model.rules.filters):
        with torch.no_grad():
            model.all_scores[gate_name(name)].copy_(
                normal((model.layers[name].num_filters,), place).abs()
            )
    return model


def test_the_baked_network_is_the_masked_one_and_has_rows_of_zeros() -> None:
    model = with_random_gates(masked()).eval()
    images, baked = normal((8, 1, 6, 6), 5), model.bake()
    assert_close(baked(images), model(images))
    for name, live in (("2.weight", 3), ("5.weight", 5)):
        weight = baked.get_parameter(name)
        rows = model.layers[name].rows(weight).any(dim=1)
        assert torch.equal(rows, model.masks()[gate_name(name)])
        assert int(rows.sum()) == live
        frozen = model.module.get_parameter(name)
        on = weight != 0
        assert_close(weight[on], frozen[on] * 2**0.5)
    assert not any(isinstance(part, MaskedModel) for part in baked.modules())


def test_open_gates_change_nothing() -> None:
    """With all filters on, masks, outputs and gradients are those without gates."""
    gated, plain = (
        masked(1.0),
        MaskedModel(masked().module, retention=0.5, generator=torch.Generator().manual_seed(1)),
    )
    images = normal((8, 1, 6, 6), 5)
    assert torch.equal(gated(images), plain(images))
    assert all(torch.equal(gated.masks()[name], mask) for name, mask in plain.masks().items())
    for model in (gated, plain):
        model(images).square().sum().backward()
    for name, z in plain.scores.items():
        assert torch.equal(gated.scores[name].grad, z.grad)


def test_filters_go_as_the_schedule_closes() -> None:
    model = with_random_gates(masked(0.25))
    counts = []
    for opening in (1.0, 0.5, 0.0):
        model.set_opening(opening)
        counts.append([int(m.sum()) for n, m in model.masks().items() if n.endswith(":filters")])
    assert counts == [[6, 10], [4, 7], [2, 3]]


def test_a_closed_gate_still_learns() -> None:
    model = with_random_gates(masked())
    model(normal((8, 1, 6, 6), 5)).square().sum().backward()
    for name in model.rules.filters:
        off = ~model.masks()[gate_name(name)]
        assert bool(model.all_scores[gate_name(name)].grad[off].any())
        assert not model.layers[name].rows(model.scores[name].grad)[off].any()


def test_neighbors_gates_lift_gates() -> None:
    model = masked()
    gates = gate_name("2.weight")
    before = model.masks()
    assert before[gates].tolist() == [True] * 3 + [False] * 3  # equal scores: the first ones
    heard = {**before, gates: ~before[gates]}
    model.hear([heard, heard])
    assert model.masks()[gates].tolist() == [False] * 3 + [True] * 3


def test_a_blend_is_refused() -> None:
    with pytest.raises(ConfigError, match="need a rule of fusion under whose own mask"):
        masked(fusion=MASK_AVERAGING)
    with pytest.raises(ConfigError, match="need a rule of fusion under whose own mask"):
        MaskedModel(net(), fusion=MASK_AVERAGING, budget="network", generator=torch.Generator())
