"""The networks of the examples: masks over each of them can learn, in every layer."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import ConfigError, MaskedModel, shared_module
from flower_mcepl.agents.parts.depth import deepest
from flower_mcepl.masks.weight_init import with_weights

pytest.importorskip("torchvision")

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = {"quickstart": (1, 8, 8), "cifar10": (3, 32, 32)}
NAMES = {
    "quickstart": ("resnet8-groupnorm", "resnet8-batchnorm", "mobilenetv2", "vit", "staged"),
    "cifar10": (
        "alexnet",
        "resnet20-groupnorm",
        "resnet20-batchnorm",
        "mobilenetv2",
        "vit",
        "staged",
    ),
}
CASES = [(app, name) for app, names in NAMES.items() for name in names]


def networks(app: str) -> ModuleType:
    file = EXAMPLES / app / f"mcepl_{app}" / "networks.py"
    spec = importlib.util.spec_from_file_location(f"networks_of_{app}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def masked(app: str, name: str, *, init: str = "signed-constant") -> MaskedModel:
    module = deepest(shared_module(lambda: networks(app).make_network(name, 0.5), seed=1))
    module = with_weights(module, init, seed=1)
    return MaskedModel(module, retention=0.5, generator=torch.Generator().manual_seed(1))


def batch(app: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, *SHAPES[app], generator=generator), torch.arange(8)


def test_the_table_has_every_network() -> None:
    assert {app: tuple(networks(app).NETWORKS) for app in NAMES} == NAMES


@pytest.mark.parametrize("init", ["module", "signed-constant"])
@pytest.mark.parametrize(("app", "name"), CASES)
def test_every_layer_has_a_gradient(app: str, name: str, init: str) -> None:
    model = masked(app, name, init=init)
    inputs, labels = batch(app)
    outputs = model(inputs)
    assert outputs.shape == (8, 10)
    nn.functional.cross_entropy(outputs, labels).backward()
    dead = [layer for layer, z in model.scores.items() if z.grad is None or not z.grad.any()]
    assert not dead
    assert model.frozen.named_share < 0.05  # positions and the class token alone


@pytest.mark.slow
@pytest.mark.parametrize(("app", "name"), CASES)
def test_masks_learn_a_batch(app: str, name: str) -> None:
    model, (inputs, labels) = masked(app, name), batch(app)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        gradients = torch.autograd.grad(loss, list(model.scores.values()))
        with torch.no_grad():
            for z, g in zip(model.scores.values(), gradients, strict=True):
                z.sub_(0.02 * z.std() * g / g.square().mean().sqrt())
        losses.append(loss.item())
    assert min(losses) < 0.9 * losses[0], losses


@pytest.mark.parametrize("norm", ["groupnorm", "batchnorm"])
def test_resnet20_is_the_papers(norm: str) -> None:
    net = networks("cifar10").make_network(f"resnet20-{norm}", 1.0)
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 19
    assert sum(p.numel() for p in net.parameters()) == 269_722  # 0.27 million in the paper
    sizes = [net[:net_index](torch.zeros(2, 3, 32, 32)).shape[2] for net_index in (4, 5, 6)]
    assert sizes == [32, 16, 8]


@pytest.mark.parametrize("app", NAMES)
def test_an_unknown_network_is_refused(app: str) -> None:
    with pytest.raises(ConfigError, match=r"must be one of .*staged; got .lenet."):
        networks(app).make_network("lenet", 1.0)


@pytest.mark.parametrize(("app", "name"), [case for case in CASES if case[1] != "alexnet"])
def test_width_scales_the_weights(app: str, name: str) -> None:
    make = networks(app).make_network
    sizes = [sum(p.numel() for p in make(name, width).parameters()) for width in (0.5, 1.0, 2.0)]
    assert all(2 * one < two for one, two in itertools.pairwise(sizes))


@pytest.mark.parametrize("app", NAMES)
def test_the_staged_network_has_four_depths(app: str) -> None:
    net = networks(app).make_network("staged", 0.5)
    sizes = []
    for depth in range(1, net.num_stages + 1):
        part = net.at_depth(depth)
        assert part(batch(app)[0]).shape == (8, 10)
        sizes.append(sum(p.numel() for p in part.parameters()))
    assert len(sizes) == 4
    assert all(shallow < deep for shallow, deep in itertools.pairwise(sizes))
