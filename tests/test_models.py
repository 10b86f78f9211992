import pytest
import torch
from torch import nn
from torch.testing import assert_close

from flower_mcepl import ConfigError, MaskedModel, Staged, shared_module
from flower_mcepl.models import LRN_ALPHAS, AlexNetCifar, local_response_norm


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_papers_network_has_the_papers_size() -> None:
    model = MaskedModel(
        shared_module(AlexNetCifar, seed=0),
        retention={"conv": 0.3, "linear": 0.9},
        generator=torch.Generator(),
    )
    assert model.num_weights == 1_227_328
    assert [spec.kind for spec in model.layers.values()] == ["conv"] * 3 + ["linear"] * 2
    assert {
        name.rpartition(".")[0]
        for name, _ in model.module.named_parameters()
        if name.endswith("bias")
    } == {
        "fc1",
        "fc2",
    }


def plain_alexnet(net: AlexNetCifar) -> nn.Module:
    """The network as DESIGN.md words it, in torch's own layers."""
    layers: list[nn.Module] = []
    for conv, alpha, pad in zip(
        (net.conv1, net.conv2, net.conv3), (2e-5, 1e-4, 1e-4), (0, 0, 1), strict=True
    ):
        layers += [
            conv,
            nn.ELU(),
            nn.LocalResponseNorm(4, alpha=alpha, beta=0.75),
            nn.MaxPool2d(3, 2, padding=pad),
        ]
    return nn.Sequential(*layers, nn.Flatten(), net.fc1, nn.ELU(), net.fc2, nn.ELU())


def test_forward_and_gradient_equal_the_network_in_torchs_own_layers() -> None:
    net = shared_module(lambda: AlexNetCifar(width=0.25), seed=0).double()
    inputs, labels = images(4).double(), torch.tensor([0, 1, 2, 3])
    logits, expected = net(inputs), plain_alexnet(net)(inputs)
    assert_close(logits, expected)
    weights = list(net.parameters())
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), weights)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(expected, labels), weights)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_close(gradient, want)


def test_width_and_classes() -> None:
    net = AlexNetCifar(num_classes=7, width=0.125)
    assert net(images(2)).shape == (2, 7)
    assert [
        net.conv1.out_channels,
        net.conv2.out_channels,
        net.conv3.out_channels,
        net.fc1.out_features,
    ] == [
        8,
        16,
        32,
        24,
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("alpha", [*LRN_ALPHAS[:2], 2.0])
def test_local_response_norm_equals_torchs(size: int, alpha: float) -> None:
    x = torch.randn(2, 7, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.local_response_norm(x, size, alpha=alpha, beta=0.75, k=1.0)
    result = local_response_norm(x, size=size, alpha=alpha)
    assert_close(result, expected)
    upstream = torch.randn_like(x)
    assert_close(
        torch.autograd.grad(result, x, upstream), torch.autograd.grad(expected, x, upstream)
    )


def test_local_response_norm_of_float32_to_rounding() -> None:
    x = images(2).repeat(1, 3, 1, 1)
    assert_close(
        local_response_norm(x, size=4, alpha=1e-4),
        nn.functional.local_response_norm(x, 4, alpha=1e-4),
    )


# --- stages ---


def staged() -> Staged:
    return Staged(
        [nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4)],
        exits=[nn.Linear(5, 2), nn.Linear(4, 2), nn.Linear(4, 2)],
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_part_is_the_first_stages_and_their_exit(depth: int) -> None:
    net, inputs = staged().eval(), torch.randn(3, 6)
    part = net.at_depth(depth)
    x = inputs
    for stage in [*net.stages][:depth]:
        x = stage(x)
    assert torch.equal(part(inputs), net.exits[str(depth - 1)](x))
    assert torch.equal(part.at_depth(depth)(inputs), part(inputs))
    whole = dict(net.named_parameters())
    assert all(whole[name] is weight for name, weight in part.named_parameters())
    assert (net.num_stages, net.is_part, len(net.exits)) == (3, False, 3)
    assert (part.num_stages, part.is_part) == (depth, depth > 1)


def test_the_whole_network_is_its_deepest_part() -> None:
    net, inputs = staged().eval(), torch.randn(3, 6)
    assert torch.equal(net(inputs), net.at_depth(3)(inputs))


def test_a_part_leaves_its_network_in_its_mode() -> None:
    net = staged()
    net.stages[1].eval()
    part = net.at_depth(2)
    assert part.training
    assert [stage.training for stage in part.stages] == [True, False]


@pytest.mark.parametrize("depth", [0, -1, 4])
def test_a_depth_beyond_the_stages_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"this network has 3, .* got {depth}\. Use one of"):
        staged().at_depth(depth)


def test_a_part_has_no_other_depth() -> None:
    with pytest.raises(ConfigError, match="has 2, with exits of 2; got 1"):
        staged().at_depth(2).at_depth(1)


@pytest.mark.parametrize(("stages", "exits"), [(0, 0), (2, 1), (1, 2)])
def test_each_stage_has_an_exit(stages: int, exits: int) -> None:
    with pytest.raises(ConfigError, match=f"got {stages} stages and {exits} exits"):
        Staged([nn.Identity()] * stages, [nn.Identity()] * exits)
