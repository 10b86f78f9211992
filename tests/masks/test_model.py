import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from flower_mcepl import MaskedModel, shared_module
from flower_mcepl.errors import ConfigError, UnsupportedLayerError
from flower_mcepl.masks.retention import resolve_retention
from tests.fleet.agents import noisy_net, small_net
from tests.oracles import masks as oracles


def masked(
    module: nn.Module, *, retention: object = 0.5, seed: int = 1, neighbors: bool = True
) -> MaskedModel:
    model = MaskedModel(module, retention=retention, generator=torch.Generator().manual_seed(seed))
    if neighbors:
        generator = torch.Generator().manual_seed(seed)
        model.set_neighbor_means(
            {n: torch.rand(z.shape, generator=generator) for n, z in model.scores.items()}
        )
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.skip, self.norm, self.head = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.second(torch.relu(self.first(x))))
        return self.head((inner + self.skip(x)).mean(dim=(2, 3)))


class Attentive(nn.Module):
    def __init__(self, **other: int) -> None:
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(4, 2, batch_first=True, **other),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Tied(nn.Module):
    """An embedding, two linear layers on one weight, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.back = (
            nn.Embedding(6, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 6, bias=False),
        )
        self.back.weight = self.embed.weight
        self.other = nn.Linear(5, 5)
        self.other.weight = self.mix.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(dim=1)
        return self.back(self.other(torch.tanh(self.mix(self.mix(x)))))


def flat(*layers: nn.Module, out: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(out, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3)), (6,)),
    "conv1d": (lambda: flat(nn.Conv1d(2, 3, 3), out=12), (2, 6)),
    "conv2d": (lambda: flat(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), out=27), (2, 5, 5)),
    "conv3d": (lambda: flat(nn.Conv3d(1, 2, 2), out=16), (1, 3, 3, 3)),
    "grouped": (lambda: flat(nn.Conv2d(4, 6, 2, groups=2), nn.GroupNorm(2, 6), out=54), (4, 4, 4)),
    "depthwise": (
        lambda: flat(nn.Conv2d(4, 4, 2, groups=4), nn.Conv2d(4, 2, 1), out=18),
        (4, 4, 4),
    ),
    "transposed1d": (lambda: flat(nn.ConvTranspose1d(2, 3, 2), out=12), (2, 3)),
    "transposed2d": (lambda: flat(nn.ConvTranspose2d(4, 6, 2, groups=2), out=54), (4, 2, 2)),
    "transposed3d": (lambda: flat(nn.ConvTranspose3d(1, 2, 2), out=54), (1, 2, 2, 2)),
    "residual": (Residual, (2, 5, 5)),
    "attention": (Attentive, (3, 4)),
    "attention-split": (lambda: Attentive(kdim=4, vdim=4), (3, 4)),
    "tied": (Tied, (4,)),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model_fn, shape = NETS[name]
    module = shared_module(model_fn, seed=5).double()
    generator = torch.Generator().manual_seed(9)
    if name == "tied":
        inputs = torch.randint(6, (8, *shape), generator=generator)
    else:
        inputs = torch.randn(8, *shape, dtype=torch.float64, generator=generator)
    return module, inputs, torch.randint(3, (8,), generator=generator)


@pytest.mark.parametrize("name", NETS)
def test_gradient_of_the_scores_is_the_closed_formula(name: str) -> None:
    module, inputs, labels = build(name)
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    model = masked(module).double()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()

    baked = model.bake().train().requires_grad_(True)  # an ordinary network with the weights w * m
    assert_close(nn.functional.cross_entropy(baked(inputs), labels), loss)
    nn.functional.cross_entropy(baked(inputs), labels).backward()
    means = model.neighbor_means
    for layer, z in model.scores.items():
        w = module.get_parameter(layer).detach()
        y = oracles.aggregation(z.detach().numpy(), means[layer].numpy())
        upstream = baked.get_parameter(layer).grad.numpy()
        assert_close(
            z.grad,
            torch.from_numpy(oracles.score_gradient(upstream, w.numpy(), y)),
            rtol=1e-9,
            atol=1e-12,
        )
        assert z.grad.abs().sum() > 0
    for key, value in model.module.named_parameters():
        assert torch.equal(value, before[key])
        assert not value.requires_grad
    assert all(p.requires_grad == key.startswith("scores") for key, p in model.named_parameters())


def test_a_linear_layer_against_numpy_alone() -> None:
    layer = nn.Linear(6, 3).double()
    model = masked(layer, retention=0.4).double()
    inputs, labels = torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 1, 0])
    nn.functional.cross_entropy(model(inputs), labels).backward()

    z, n = model.scores["weight"], model.neighbor_means["weight"]
    w, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    y = oracles.aggregation(z.detach().numpy(), n.numpy())
    m = oracles.topk_mask(y, 0.4)
    assert np.array_equal(model.masks()["weight"].numpy(), m)
    upstream = oracles.linear_cross_entropy_gradient(inputs.numpy(), labels.numpy(), w * m, bias)
    assert_close(
        z.grad, torch.from_numpy(oracles.score_gradient(upstream, w, y)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", NETS)
def test_bake_is_the_same_function_and_independent(name: str) -> None:
    module, inputs, _ = build(name)
    model = masked(module).double().eval()
    baked = model.bake().eval()
    assert type(baked) is type(module)
    with torch.no_grad():
        expected = model(inputs)
        assert torch.equal(baked(inputs), expected)
        for parameter in baked.parameters():
            parameter.fill_(3.0)
        assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("name", NETS)
def test_masks_keep_the_exact_number_of_weights(name: str) -> None:
    module, _, _ = build(name)
    model = masked(module, retention=0.3)
    baked = model.bake()
    for layer, mask in model.masks().items():
        assert mask.sum() == mask.numel() - int(0.7 * mask.numel())
        assert torch.equal(baked.get_parameter(layer), module.get_parameter(layer) * mask)


@pytest.mark.parametrize("name", ["conv2d", "grouped", "transposed2d", "transposed3d"])
def test_group_lasso_sums_the_filters_of_all_layers(name: str) -> None:
    module, _, _ = build(name)
    model = masked(module).double()
    value = model.group_lasso()
    value.backward()
    total = 0.0
    for layer, z in model.scores.items():
        groups = model.layers[layer].transposed_groups
        total += oracles.group_lasso(z.detach().numpy(), groups)
        assert_close(
            z.grad, torch.from_numpy(oracles.group_lasso_gradient(z.detach().numpy(), groups))
        )
    assert value.item() == pytest.approx(total)


def test_tied_weights_share_one_mask() -> None:
    module, tokens, _ = build("tied")
    model = masked(module).double()
    assert list(model.layers) == ["embed.weight", "mix.weight"]
    baked = model.bake()
    assert baked.other.weight is baked.mix.weight
    assert baked.back.weight is baked.embed.weight
    assert (baked.embed.weight == 0).sum() == 15  # half of 30: the embedding sees the mask too
    assert_close(model(tokens), baked(tokens))


def test_the_module_passed_in_is_left_alone() -> None:
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    model = masked(module)
    model(torch.randn(2, 1, 6, 6)).sum().backward()
    with torch.no_grad():
        model.module[0].weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in module.parameters()
    )


def test_batch_norm_statistics_follow_the_data_and_nothing_else_changes() -> None:
    model = masked(noisy_net())
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    model.train()(torch.randn(8, 1, 6, 6) + 5)
    changed = {
        key
        for key, value in model.module.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    model.eval()
    after = {key: value.clone() for key, value in model.module.state_dict().items()}
    model(torch.randn(8, 1, 6, 6))
    assert all(torch.equal(value, after[key]) for key, value in model.module.state_dict().items())


def test_without_neighbors_the_scores_alone_rank() -> None:
    model = masked(small_net(), neighbors=False)
    assert set(model.neighbor_means.values()) == {None}
    y = model.aggregation()
    assert all(y[layer] is z for layer, z in model.scores.items())
    zero = masked(small_net(), neighbors=False)
    zero.set_neighbor_means({layer: torch.zeros_like(z) for layer, z in zero.scores.items()})
    assert all(torch.equal(mask, zero.masks()[layer]) for layer, mask in model.masks().items())


def test_means_are_of_one_mask_unless_it_is_said_of_how_many() -> None:
    model = masked(small_net(), neighbors=False)
    means = {layer: torch.zeros_like(z) for layer, z in model.scores.items()}
    counts = []
    for options in ({}, {"num_neighbors": 3}):
        model.set_neighbor_means(means, **options)
        counts.append(model.num_neighbors)
    model.set_neighbor_means(None)
    assert [*counts, model.num_neighbors] == [1, 3, 0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(copied: Callable[[MaskedModel], MaskedModel]) -> None:
    model = masked(small_net()).eval()
    twin = copied(model)
    inputs = torch.randn(2, 1, 6, 6)
    expected = model(inputs)
    assert torch.equal(twin(inputs), expected)
    assert (twin.fingerprint, twin.layers, twin.retention) == (
        model.fingerprint,
        model.layers,
        model.retention,
    )
    twin.set_scores({layer: torch.randn_like(z) for layer, z in twin.scores.items()})
    twin.set_neighbor_means(None)
    assert torch.equal(model(inputs), expected)
    assert not torch.equal(twin(inputs), expected)


def test_everything_moves_with_to() -> None:
    model = masked(noisy_net()).to("meta")
    tensors = [*model.parameters(), *model.buffers()]
    # scores, neighbor means, frozen parameters, running statistics
    assert len(tensors) == 2 + 2 + 6 + 3
    assert {str(tensor.device) for tensor in tensors} == {"meta"}


def test_scores_come_from_the_generator_alone() -> None:
    first, again, other = (masked(small_net(), seed=seed).scores for seed in (1, 1, 2))
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert not any(torch.equal(first[layer], other[layer]) for layer in first)


def test_nothing_to_mask_is_an_error() -> None:
    with pytest.raises(UnsupportedLayerError, match="nothing to mask"):
        masked(nn.BatchNorm1d(3))


def test_zero_weights_warn_with_the_layers_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(net[1].weight)
    with pytest.warns(UserWarning, match=r"all frozen weights of 1\.weight are zero"):
        masked(net)


def test_retention_by_kind_pattern_and_name() -> None:
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(1, 2, 3))
    net.add_module("body", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    net.add_module("head", nn.Linear(2, 2))
    model = masked(net, retention={"linear": 0.9, "conv": 0.3, "body.*": 0.5, "body.1.weight": 0.7})
    assert model.retention == {
        "conv.weight": 0.3, "body.0.weight": 0.5, "body.1.weight": 0.7, "head.weight": 0.9
    }  # fmt: skip
    assert set(masked(net, retention=1.0).retention.values()) == {1.0}
    assert set(resolve_retention({"*": 0.2}, model.layers).values()) == {0.2}


@pytest.mark.parametrize(
    ("retention", "message"),
    [
        (0.0, "every layer .* got 0"),
        ({"conv": 1.5}, "'conv' .* got 1.5"),
        ({"conv": 0.3, "linear": float("nan")}, "'linear' .* got nan"),
        (
            {"conv": 0.3},
            r"no retention ratio for 3\.weight \(kind linear\).*Add 'linear' or '3\.weight'",
        ),
        (
            {"conv": 0.3, "linear": 0.9, "haed.*": 0.5},
            r"'haed\.\*' fits no layer.*0\.weight, 3\.weight",
        ),
        ({}, r"no retention ratio for 0\.weight"),
    ],
)
def test_retention_errors_name_the_layer(retention: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        masked(small_net(), retention=retention)


# --- the fingerprint of the frozen weights ---


def fingerprint_of(module: nn.Module) -> str:
    return masked(module, neighbors=False).fingerprint


def test_one_bit_changes_the_fingerprint() -> None:
    module = shared_module(noisy_net, seed=3)
    whole = fingerprint_of(module)
    assert len(whole) == 32
    assert int(whole, 16) >= 0
    seen = {whole}
    for _, parameter in module.named_parameters():
        bits = parameter.detach().view(-1).view(torch.int32)
        bits[-1] ^= 1
        seen.add(fingerprint_of(module))
        bits[-1] ^= 1
    assert len(seen) == 1 + len(list(module.parameters()))
    assert fingerprint_of(module) == whole


def test_shape_name_and_role_change_the_fingerprint() -> None:
    weight = torch.arange(1.0, 13.0)

    def holding(name: str, layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
        net = nn.Sequential()
        net.add_module(name, layer)
        return net

    prints = [
        fingerprint_of(holding("a", nn.Linear(3, 4, bias=False))),
        fingerprint_of(holding("a", nn.Linear(4, 3, bias=False))),
        fingerprint_of(holding("b", nn.Linear(3, 4, bias=False))),
        fingerprint_of(holding("a", nn.Linear(3, 4, bias=False)).double()),
    ]
    extra = holding("a", nn.Linear(3, 4, bias=False))
    extra.add_module("scale", nn.LayerNorm(3))
    assert len({*prints, fingerprint_of(extra)}) == 5


def test_the_type_of_a_layer_without_weights_changes_the_fingerprint() -> None:
    linear = nn.Linear(3, 4)
    networks = [nn.Sequential(linear, layer) for layer in (nn.ReLU(), nn.Tanh(), nn.Identity())]
    assert len({fingerprint_of(network) for network in networks}) == 3


class Unmasked(nn.Module):
    """A weight like a linear layer's that no mask is put on."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())


def test_which_weights_are_masked_is_in_the_fingerprint() -> None:
    first, second = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    both, one = nn.Sequential(first, second), nn.Sequential(first, Unmasked(second.weight))
    assert [name for name, _ in both.named_parameters()] == [
        name for name, _ in one.named_parameters()
    ]
    with pytest.warns(UserWarning, match=r"50% of the weights .* get no mask .*: 1\.weight\. Reg"):
        assert fingerprint_of(both) != fingerprint_of(one)


def test_scores_and_running_statistics_are_not_in_the_fingerprint() -> None:
    model = masked(shared_module(noisy_net, seed=3), seed=1)
    model.train()(torch.randn(8, 1, 6, 6))
    assert (
        fingerprint_of(model.module)
        == model.fingerprint
        == masked(shared_module(noisy_net, seed=3), seed=2).fingerprint
    )


@pytest.mark.slow
def test_another_process_computes_the_same_fingerprint() -> None:
    code = (
        "import torch; from torch import nn; from flower_mcepl import MaskedModel, shared_module; "
        "torch.rand(9)\nnet = shared_module(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, "
        "2)), seed=11)\nprint(MaskedModel(net, generator=torch.Generator()).fingerprint)"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    assert elsewhere == fingerprint_of(shared_module(net, seed=11))
    assert elsewhere != fingerprint_of(shared_module(net, seed=12))


# --- networks as people have them ---


def trains_and_bakes(module: nn.Module, inputs: Tensor) -> MaskedModel:
    model = masked(module, retention={"conv": 0.3, "linear": 0.9}, neighbors=False)
    nn.functional.cross_entropy(model.train()(inputs), torch.arange(len(inputs)) % 3).backward()
    model.eval()
    with torch.no_grad():
        assert_close(model.bake().eval()(inputs), model(inputs))
    return model


@pytest.mark.parametrize(("name", "num_layers"), [("resnet18", 21), ("mobilenet_v2", 53)])
def test_torchvision_networks(name: str, num_layers: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = shared_module(lambda: getattr(models, name)(weights=None, num_classes=10), seed=0)
        model = trains_and_bakes(
            module, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        )
    assert len(model.layers) == num_layers
    assert all(z.grad.abs().sum() > 0 for z in model.scores.values())


@pytest.mark.slow
def test_torchvision_vit_needs_a_random_head() -> None:
    models = pytest.importorskip("torchvision.models")
    module = shared_module(lambda: models.vit_b_16(weights=None, num_classes=10), seed=0)
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"heads\.head\.weight are zero"):
        masked(module)
    nn.init.normal_(module.heads.head.weight, std=0.02)
    model = trains_and_bakes(module, inputs)
    assert len(model.layers) == 1 + 12 * 4 + 1
    assert all(z.grad.abs().sum() > 0 for z in model.scores.values())


class WithTable(nn.Module):
    """A layer, an activation and a frozen table."""

    def __init__(self, activation: nn.Module, value: float) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.activation = activation
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("table", torch.full((2,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.layer(x))) + self.table


def test_the_fingerprint_covers_buffers_and_layer_types_but_no_running_statistics() -> None:
    def made(activation: type[nn.Module], value: float) -> MaskedModel:
        module = shared_module(lambda: WithTable(activation(), value), seed=1)
        if value == 3.0:
            module.norm.running_mean.fill_(5.0)
            module.table.fill_(1.0)
        return MaskedModel(module, generator=torch.Generator())

    first = made(nn.ReLU, 1.0).fingerprint
    assert made(nn.ReLU, 1.0).fingerprint == first
    assert made(nn.Tanh, 1.0).fingerprint != first
    assert made(nn.ReLU, 2.0).fingerprint != first
    assert made(nn.ReLU, 3.0).fingerprint == first
