"""Compact networks of the known families, under random gates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl.models import AlexNetCifar
from flower_mcepl.personal import compact, compact_or_whole
from flower_mcepl.personal import compacting as room
from flower_mcepl.personal.exporting import Agreement, agreement
from flower_mcepl.personal.places import Refilled

SHAPE = (3, 8, 8)
Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 4, channels)


class Basic(nn.Module):
    """A residual block of two convolutions, with a shortcut's own where it widens."""

    def __init__(self, inputs: int, planes: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, planes // inputs, 1, bias=False)
        self.norm1, self.norm2 = norm(planes), norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential()
        if inputs != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, planes, 1, 2, bias=False), norm(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet(norm: Norm) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()),
        *(Basic(8, 8, norm), Basic(8, 16, norm), Basic(16, 16, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


class Inverted(nn.Module):
    """MobileNetV2's block: wider, depthwise, narrower; a sum where shapes are equal."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int = 1) -> None:
        super().__init__()
        wide = 3 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, widen * wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(widen * wide), nn.ReLU6()),
            *(nn.Conv2d(widen * wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(Inverted(6, 6, 1), Inverted(6, 8, 2, widen=2), Inverted(8, 8, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet, batch norm": lambda: resnet(nn.BatchNorm2d),
    "resnet, group norm": lambda: resnet(group_norm),
    "mobilenetv2": mobilenet,
    "alexnet": lambda: AlexNetCifar(width=0.125, num_classes=5),
}


def gated(module: nn.Module, share: float, *, settled: bool) -> nn.Module:
    """A network most of whose filters are off, but those of the last layer.

    Where norms have settled, they know that a channel is empty; else its constants are
    not zero.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                if not settled:
                    nn.init.normal_(norm.bias)
            if isinstance(norm, nn.BatchNorm2d) and not settled:
                assert norm.running_mean is not None
                nn.init.normal_(norm.running_mean)
        for layer in layers[:-1]:
            layer.weight[torch.rand(len(layer.weight)) > share] = 0
            layer.weight[torch.rand_like(layer.weight) > 0.7] = 0
    return module.eval().requires_grad_(False)


def compared(module: nn.Module, *shape: int) -> tuple[Any, Agreement]:
    """The compact network, and how it agrees on inputs that it was not made with."""
    made = compact(module, torch.randn(2, *shape))
    found = agreement(module, made.module, [torch.randn(5, *shape), torch.randn(1, *shape)])
    assert found.holds(room.EXACT), f"{found}: {made}"
    return made, found


@pytest.mark.parametrize("refills", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(seed=st.integers(0, 9999), share=st.sampled_from([0.1, 0.5, 0.8]), settled=st.booleans())
def test_any_gates_give_the_same(
    family: str, refills: bool, seed: int, share: float, settled: bool
) -> None:
    torch.manual_seed(seed)
    module = gated(FAMILIES[family](), share, settled=settled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "REFILL_WORTH", 1 if refills else 10**9)
        shape = (3, 32, 32) if family == "alexnet" else SHAPE
        made, _ = compared(module, *shape)
    assert made.parameters[1] <= made.parameters[0]
    assert refills or not made.refilled


def emptied(module: nn.Module, filters: dict[str, list[int]]) -> nn.Module:
    with torch.no_grad():
        for name, rows in filters.items():
            module.get_submodule(name).weight[rows] = 0
    return module.eval().requires_grad_(False)


def test_a_depthwise_filter_goes_with_its_producer() -> None:
    """Either's gate is enough; the constants of norms count."""
    block = nn.Sequential(Inverted(6, 6, 1), nn.Conv2d(6, 3, 1))
    made, _ = compared(emptied(block, {"0.body.0": [0, 1, 2], "0.body.3": [2, 3]}), 6, 8, 8)
    assert made.filters == {"0.body.0": (18, 14), "0.body.3": (18, 14)}
    assert made.module.get_submodule("0.body.3").groups == 14
    assert made.locked == {}


def test_a_depthwise_multiplier_goes_where_all_of_a_channel_is_off() -> None:
    block = nn.Sequential(Inverted(6, 5, 1, widen=2), nn.Conv2d(5, 3, 1))
    off = {"0.body.3": [0, 1, 4, 8, 9]}  # channels 0 and 4 whole, channel 2 by half
    made, _ = compared(emptied(block, off), 6, 8, 8)
    assert made.filters == {"0.body.0": (18, 16), "0.body.3": (36, 32)}


def test_a_group_of_a_convolution_goes_as_a_whole() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False)),
        *(nn.ReLU(), nn.Conv2d(8, 3, 3)),
    )
    made, _ = compared(emptied(net, {"0": [0, 1, 2], "2": [7]}), *SHAPE)
    assert made.filters == {"0": (8, 6), "2": (8, 6)}
    assert made.module.get_submodule("2").groups == 3
    assert "a group of 2 goes as a whole, 2 channels" in made.locked["0"]
    assert made.locked["2"].startswith("1 of 6 filters")


def test_a_group_of_a_norm_goes_as_a_whole() -> None:
    """Of a norm's group all channels are seen; empty ones, too, make others larger."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, bias=False), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 4, 3))
    )
    nn.init.normal_(net[1].bias)
    made, _ = compared(emptied(net, {"0": [0, 1, 2, 3, 5, 8]}), *SHAPE)
    assert made.filters == {"0": (12, 8)}
    assert made.module.get_submodule("1").num_groups == 2
    assert "a group of 1 goes as a whole, 4 channels" in made.locked["0"]
    assert made.refilled == ()  # two filters of 27 weights are too few to pay


def test_places_that_must_stay_are_refilled_where_that_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a group norm, and in a sum where others are on: the filters go at least."""
    monkeypatch.setattr(room, "REFILL_WORTH", 32)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(2, 16)),
        *(Basic(16, 16, nn.BatchNorm2d), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
    )
    half = list(range(0, 16, 2))
    module = emptied(net, {"2.conv2": half, "0": half})
    made, _ = compared(module, *SHAPE)
    assert made.filters == {"2.conv2": (16, 8)}
    assert made.refilled == ("2.conv2",)
    assert "added to those of 0" in made.locked["2.conv2"]
    assert any(isinstance(part, Refilled) for part in made.module.modules())
    _, line = compact_or_whole(module, [torch.randn(3, *SHAPE)])
    assert "2.conv2 keeps its places: 8 of 16 filters are off, but" in line
    assert "0 stays: 8 of 16 filters are off, but" in line


def test_tied_layers_stay_and_are_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(self.first(x)).relu()).relu())

    made, _ = compared(emptied(Tied(), {"first": [1], "twice": [2]}), *SHAPE)
    assert made.filters == {}
    assert "twice is called more than once, or shares its weights" in made.locked["first"]


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.view(x.size(0), -1),
    lambda x: x.view(x.shape[0], -1),
    lambda x: x.reshape(x.size()[0], -1),
    lambda x: x.view(-1, 36),
    lambda x: torch.reshape(x, (-1, 36)),
    lambda x: torch.flatten(x, 1),
    lambda x: nn.functional.avg_pool2d(x, 1).flatten(1),
]


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_every_way_to_flatten_is_followed(number: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 6), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(VIEWS[number](self.conv(x)))
            return y

    made, _ = compared(emptied(Net(), {"conv": [1, 3]}), *SHAPE)
    assert made.filters == {"conv": (4, 2)}
    assert made.locked == {}


def test_before_what_is_not_known_the_filters_go_and_their_places_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "REFILL_WORTH", 32)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 6), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.conv(x).flatten(1).cumsum(1))
            return y

    made, _ = compared(emptied(Net(), {"conv": [1, 3]}), *SHAPE)
    assert made.refilled == ("conv",)
    assert "cumsum mixes channels" in made.locked["conv"]
