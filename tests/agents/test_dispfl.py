"""Dis-PFL: its sparsity functions and whole rounds against slow ones, and what only
sparse agents do.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import AgentData, ConfigError, UnsupportedLayerError, shared_module
from flower_mcepl.agents import AgentState, make_agent
from flower_mcepl.agents.dispfl import DispflConfig
from flower_mcepl.masks.sparsity import (
    drop_share,
    drop_smallest,
    erk_densities,
    from_sparse,
    grow_largest,
    grow_random,
    overlap_mean,
    random_mask,
    to_sparse,
)
from tests.fleet.agents import noisy_net, same_tensors, split
from tests.oracles import weights as slow_weights
from tests.oracles.baselines import (
    PAW,
    RING,
    SEED,
    agent_of,
    arrays,
    assert_same,
    blobs,
    data_of,
    fleet_of,
    play,
    two_layers,
)

MASKED = {"w1": "0.weight", "w2": "2.weight"}
SHAPES = st.lists(
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5
)


def masks_of(agent: Any) -> dict[str, Any]:
    return {short: agent.masks[name].numpy().copy() for short, name in MASKED.items()}


# --- where masks lie ---


@given(shapes=SHAPES, density=st.floats(0.01, 1.0))
def test_erk_divides_the_density(shapes: list[tuple[int, ...]], density: float) -> None:
    layers = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    found = erk_densities(layers, density=density)
    sizes = {name: int(np.prod(shape)) for name, shape in layers.items()}
    assert all(0 < share <= 1 + 1e-9 for share in found.values())
    kept = sum(found[name] * size for name, size in sizes.items())
    assert kept == pytest.approx(density * sum(sizes.values()))
    expected = slow_weights.erk(layers, density)
    for name, share in found.items():
        assert share == pytest.approx(expected[name], abs=1e-9)


@given(numel=st.integers(1, 60), density=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_a_random_mask_keeps_its_share(numel: int, density: float, seed: int) -> None:
    mask = random_mask((numel, 1), density=density, generator=torch.Generator().manual_seed(seed))
    assert mask.shape == (numel, 1)
    assert int(mask.sum()) == max(1, round(density * numel))


def test_the_share_that_moves_falls_to_zero() -> None:
    shares = [drop_share(round, drop_fraction=0.5, anneal_rounds=4) for round in range(1, 8)]
    assert shares[:5] == pytest.approx(
        [0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5), 0.0]
    )
    assert shares[4:] == [0.0, 0.0, 0.0]


# --- how they move ---

LAYERS = st.tuples(st.integers(1, 40), st.floats(0.0, 1.0), st.integers(0, 999))


def layer_of(drawn: tuple[int, float, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and gradients with ties in them, and a mask."""
    numel, density, seed = drawn
    rng = np.random.default_rng(seed)
    weight, gradient = (torch.from_numpy(rng.integers(-4, 5, numel) / 2.0) for _ in range(2))
    return weight, gradient, torch.from_numpy(rng.random(numel) < density)


@given(drawn=LAYERS, share=st.floats(0.0, 1.0))
def test_dropping_and_growing_by_ranking(drawn: tuple[int, float, int], share: float) -> None:
    weight, gradient, mask = layer_of(drawn)
    count = int(share * int(mask.sum()))
    kept = drop_smallest(weight, mask, count=count)
    grown = grow_largest(gradient, kept, count=count)
    assert int(kept.sum()) == int(mask.sum()) - count
    assert not (kept & ~mask).any()
    assert int(grown.sum()) == int(mask.sum())
    assert not (kept & ~grown).any()
    expected = slow_weights.drop_and_grow(weight.numpy(), mask.numpy(), gradient.numpy(), count)
    assert np.array_equal(grown.numpy(), expected)


@given(drawn=LAYERS, share=st.floats(0.0, 1.0))
def test_growing_at_random_takes_free_places_alone(
    drawn: tuple[int, float, int], share: float
) -> None:
    _, _, mask = layer_of(drawn)
    count = int(share * int((~mask).sum()))
    grown, again = (
        grow_random(mask, count=count, generator=torch.Generator().manual_seed(drawn[2]))
        for _ in range(2)
    )
    assert torch.equal(grown, again)
    assert not (mask & ~grown).any()
    assert int(grown.sum()) == int(mask.sum()) + count


@given(data=st.data(), numel=st.integers(1, 12), count=st.integers(1, 5))
def test_overlap_mean_by_loops(data: st.DataObject, numel: int, count: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    masks = [rng.random(numel) < rng.random() for _ in range(count)]
    values = [rng.standard_normal(numel) * mask for mask in masks]
    mean = overlap_mean([torch.from_numpy(v) for v in values], [torch.from_numpy(m) for m in masks])
    np.testing.assert_allclose(mean.numpy(), slow_weights.overlap_mean(values, masks), atol=1e-12)


@given(drawn=LAYERS)
def test_sparse_tensors_keep_places_and_zeros(drawn: tuple[int, float, int]) -> None:
    weight, _, mask = layer_of(drawn)
    sparse = to_sparse(weight, mask)
    assert (sparse.layout, sparse.is_coalesced(), sparse._nnz()) == (
        torch.sparse_coo,
        True,
        int(mask.sum()),
    )
    values, places = from_sparse(sparse)
    assert torch.equal(places, mask)
    assert torch.equal(values, weight * mask)


# --- whole rounds ---

EQUATIONS = {
    "lr": 0.4,
    "lr_decay": 0.9,
    "weight_decay": 0.02,
    "clip_norm": 0.3,
    "drop_fraction": 0.6,
}


@pytest.mark.parametrize("neighbors", [RING, PAW], ids=["ring", "paw"])
@pytest.mark.parametrize("density", [0.5, "0.3, 0.5, 0.9"], ids=["equal", "mixed"])
def test_rounds_by_the_published_equations(neighbors: Any, density: object) -> None:
    agents = fleet_of("dispfl", density=density, local_epochs=2, anneal_rounds=5, **EQUATIONS)
    x, masks, data = (
        [arrays(agent) for agent in agents],
        [masks_of(agent) for agent in agents],
        data_of(agents),
    )
    moved = 0
    for round in range(1, 7):  # in the last one nothing moves any more
        before = masks
        x, masks = slow_weights.dispfl(
            x,
            masks,
            data,
            neighbors,
            round=round,
            steps=2,
            lr=0.4,
            lr_decay=0.9,
            decay=0.02,
            clip=0.3,
            alpha=0.6,
            rounds=5,
        )
        play(agents, neighbors, round)
        for i, agent in enumerate(agents):
            for short, mask in masks_of(agent).items():
                assert np.array_equal(mask, masks[i][short])
                moved += int((mask != before[i][short]).sum())
        assert_same(agents, x)
    assert moved > 20


def test_unequal_densities_are_kept() -> None:
    agents = fleet_of("dispfl", density="0.2, 0.5, 1.0", num_rounds=4)
    kept = [agent.describe()["kept-weights"] for agent in agents]
    assert [agent.parameters()["density"] for agent in agents] == [0.2, 0.5, 1.0, 0.2]
    assert kept[0] == kept[3] == 9 + round(0.2 * 42)
    assert kept[1:3] == [9 + 21, 9 + 42]
    for round_ in (1, 2, 3):
        play(agents, PAW, round_)
        assert [agent.describe()["kept-weights"] for agent in agents] == kept
        for agent in agents:
            assert agent.evaluate()["density"] == (agent.describe()["kept-weights"] - 9) / 42
            for name, mask in agent.masks.items():
                assert not agent.weights[name][~mask].any()


def test_all_start_from_the_common_weights_under_masks_of_their_own() -> None:
    module = shared_module(two_layers, seed=SEED)
    first, second = fleet_of("dispfl", 2)
    assert first.first_payload() is None
    assert not torch.equal(first.masks["0.weight"], second.masks["0.weight"])
    for agent in (first, second):
        assert torch.equal(agent.weights["0.weight"], module[0].weight * agent.masks["0.weight"])
        assert torch.equal(agent.weights["0.bias"], module[0].bias)
    assert same_tensors(first.masks, agent_of("dispfl", 0).masks)
    assert not same_tensors(first.masks, agent_of("dispfl", 0, seed=SEED + 1).masks)


def test_what_is_sent_is_the_model_as_trained() -> None:
    agent = agent_of("dispfl")
    old = {name: mask.clone() for name, mask in agent.masks.items()}
    agent.train(round=1)
    sent = agent.outgoing()
    for name, mask in old.items():
        values, places = from_sparse(sent[name])
        assert (sent[name].layout, sent[name].dtype) == (torch.sparse_coo, torch.float32)
        assert sent[name].is_coalesced()
        assert torch.equal(places, mask)
        assert torch.equal(values, agent.weights[name])
    assert not torch.equal(agent.masks["0.weight"], old["0.weight"])
    for name in ("0.bias", "2.bias"):
        assert sent[name].layout == torch.strided
        assert torch.equal(sent[name], agent.weights[name])


def test_an_explicit_zero_is_held_and_counts() -> None:
    agent = agent_of("dispfl", density=1.0, drop_fraction=0.0)
    neighbor = dict(agent.outgoing())
    zero = torch.zeros(6, 4)
    held, free = (
        to_sparse(zero, torch.ones(6, 4, dtype=torch.bool)),
        to_sparse(zero, torch.zeros(6, 4).bool()),
    )
    start = agent.weights["0.weight"].clone()
    agent.fuse({1: {**neighbor, "0.weight": free}}, round=1)
    assert torch.equal(agent.weights["0.weight"], start)
    agent.fuse({1: {**neighbor, "0.weight": held}}, round=1)
    torch.testing.assert_close(agent.weights["0.weight"], start / 2)


def test_a_dense_tensor_in_a_sparse_ones_place_holds_what_is_not_zero() -> None:
    agent, told = agent_of("dispfl"), agent_of("dispfl")
    neighbor = agent_of("dispfl", 1).outgoing()
    agent.fuse({1: neighbor}, round=1)
    told.fuse({1: {name: tensor.to_dense() for name, tensor in neighbor.items()}}, round=1)
    assert same_tensors(agent.state().tensors, told.state().tensors)


def test_a_network_without_weights_under_a_mask_is_refused() -> None:
    def only_norms_train() -> nn.Module:
        model = noisy_net()
        model[0].weight.requires_grad_(False)
        model[5].weight.requires_grad_(False)
        return model

    with pytest.raises(
        UnsupportedLayerError,
        match="algorithm dispfl needs maskable weights that train; all those of Sequential",
    ):
        agent_of("dispfl", model_fn=only_norms_train)


def test_without_neighbors_the_mask_moves_all_the_same() -> None:
    agent = agent_of("dispfl")
    agent.train(round=1)
    trained = {name: w.clone() for name, w in agent.weights.items()}
    new = {name: mask.clone() for name, mask in agent.masks.items()}
    lost = agent_of("dispfl")
    lost.restore(agent.state())
    agent.fuse({}, round=1)
    for name, w in agent.weights.items():
        torch.testing.assert_close(w, trained[name] * new.get(name, 1), rtol=1e-6, atol=0)
    agent.train(round=2)
    lost.train(round=2)  # its parcel never came: no fuse at all
    assert same_tensors(agent.state().tensors, lost.state().tensors)


@pytest.mark.parametrize("regrow", ["gradient", "random"])
def test_masks_stand_still_when_they_may(regrow: str) -> None:
    still, late = (
        agent_of("dispfl", drop_fraction=0.0, regrow=regrow),
        agent_of("dispfl", regrow=regrow, num_rounds=3),
    )
    for agent, round in ((still, 1), (late, 4), (late, 9)):
        before = {name: mask.clone() for name, mask in agent.masks.items()}
        play([agent], ((),), round)
        assert same_tensors(before, agent.masks)


def test_random_regrowth_moves_as_many_to_other_places() -> None:
    random, again, gradient = (
        agent_of("dispfl", regrow=how) for how in ("random", "random", "gradient")
    )
    for agent in (random, again, gradient):
        agent.train(round=1)
    assert same_tensors(random.masks, again.masks)
    assert not same_tensors(random.masks, gradient.masks)
    for name, mask in random.masks.items():
        assert int(mask.sum()) == int(gradient.masks[name].sum())


def many_layers() -> nn.Module:
    """Layers whose names do not ascend, too many for chance to put them in order."""
    names = "dcfabeg"
    return nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))


@pytest.mark.parametrize("algorithm", ["dispfl", "fedspa"])
def test_random_regrowth_goes_on_from_a_file_bit_for_bit(algorithm: str) -> None:
    whole, broken = (agent_of(algorithm, model_fn=many_layers, regrow="random") for _ in range(2))
    for round in (1, 2, 3):
        for agent in (whole, broken):
            agent.train(round=round)
            agent.fuse({}, round=round)
        broken.restore(AgentState.decode(broken.state().encode()))
    assert same_tensors(whole.state().tensors, broken.state().tensors)


def test_growing_leaves_running_statistics_and_the_batches_alone() -> None:
    options = {"model_fn": noisy_net, "split": split, "batch_size": 8, "local_epochs": 1}
    gradient, random = (agent_of("dispfl", regrow=how, **options) for how in ("gradient", "random"))
    assert gradient.train(round=1) == random.train(round=1)
    buffers = [dict(agent.model.named_buffers()) for agent in (gradient, random)]
    assert same_tensors(*buffers)


class OneBatchARound:
    """A split of the user's own that gives fewer batches than it is asked for."""

    num_examples = 18

    def training_batches(self, **asked: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield blobs(0)

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield blobs(1)


def test_a_split_of_ones_own_will_do() -> None:
    data = AgentData.of(OneBatchARound(), OneBatchARound(), agent=0)
    keys = {"num-rounds": 9}
    agent = make_agent("dispfl", 0, shared_module(two_layers, seed=1), data, keys, seed=1)
    play([agent], ((),), 1, 2)
    assert agent.describe()["num-weights"] == 51


# --- settings ---


def test_settings_of_the_paper() -> None:
    config = DispflConfig()
    assert (config.lr, config.lr_decay, config.weight_decay, config.clip_norm) == (
        0.1,
        0.998,
        5e-4,
        10.0,
    )
    assert (config.density, config.drop_fraction, config.anneal_rounds, config.local_epochs) == (
        0.5,
        0.5,
        0,
        5,
    )
    assert (config.momentum, config.batch_size, config.regrow) == (0.0, 128, "gradient")
    assert config.lr_factor(1) == 1.0
    assert config.lr_factor(3) == pytest.approx(0.998**2)


def test_masks_anneal_over_the_rounds_of_the_run() -> None:
    assert DispflConfig.from_run_config({"num-rounds": 40}, agent=0).anneal_rounds == 40
    assert (
        DispflConfig.from_run_config({"num-rounds": 40, "anneal-rounds": 9}, agent=0).anneal_rounds
        == 9
    )
    zero = {"num-rounds": 40, "anneal-rounds": 0}
    assert DispflConfig.from_run_config(zero, agent=0).anneal_rounds == 40


@pytest.mark.parametrize("algorithm", ["dispfl", "fedspa"])
def test_masks_that_move_need_a_number_of_rounds(algorithm: str) -> None:
    message = r"anneal-rounds must be >= 1 where masks move, .*; got 0\. Set it, or num-rounds"
    for settings in ({"num_rounds": 0}, {"num_rounds": 0, "anneal_rounds": 0}):
        with pytest.raises(ConfigError, match=message):
            agent_of(algorithm, **settings)
    assert agent_of(algorithm, num_rounds=0, drop_fraction=0.0).config.anneal_rounds == 0
    assert agent_of(algorithm, num_rounds=0, anneal_rounds=3).config.anneal_rounds == 3


def test_densities_in_turn_and_of_the_node() -> None:
    run_config = {"density": "0.1, 0.3"}
    found = [DispflConfig.from_run_config(run_config, agent=i).density for i in range(3)]
    assert found == [0.1, 0.3, 0.1]
    assert (
        DispflConfig.from_run_config(
            run_config, agent=0, node_config={"density": 0.7, "x": 1}
        ).density
        == 0.7
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\]; got 0\.0\. Use for example 0\.5"),
        ({"density": "0.5, 1.5"}, r"density must be in \(0, 1\]; got 1\.5"),
        ({"density": "half"}, r"run-config key density must be a number or numbers"),
        ({"drop_fraction": 1.2}, r"drop-fraction must be in \[0, 1\]; got 1\.2"),
        ({"anneal_rounds": -1}, r"anneal-rounds must be >= 0; got -1"),
        ({"regrow": "magic"}, r"regrow must be one of gradient, random; got 'magic'"),
        ({"clip_norm": float("inf")}, r"clip-norm must be a finite number >= 0; got inf"),
    ],
)
def test_bad_settings_are_refused_by_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent_of("dispfl", **settings)


def test_a_config_made_by_hand_is_checked_too() -> None:
    for density in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=rf"density must be in \(0, 1\]; got {density}"):
            DispflConfig(density=density)


def test_a_node_config_with_several_densities_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"density is one ratio, of this agent alone; got '0\.1, 0\.3'"
    ):
        DispflConfig.from_run_config({}, agent=0, node_config={"density": "0.1, 0.3"})


def test_convolutions_are_sparse_and_norms_are_dense() -> None:
    agent = agent_of("dispfl", model_fn=noisy_net, split=split, density=0.4)
    layouts = {name: tensor.layout for name, tensor in agent.outgoing().items()}
    sparse = {name for name, layout in layouts.items() if layout == torch.sparse_coo}
    assert sparse == {"0.weight", "5.weight"}
    assert {
        type(agent.model.get_submodule(name.split(".")[0])) for name in layouts.keys() - sparse
    } == {
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Linear,
    }
