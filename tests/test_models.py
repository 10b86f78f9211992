import pytest
import torch
from torch import nn
from torch.testing import assert_close

from flower_mcepl import MaskedModel, shared_module
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
