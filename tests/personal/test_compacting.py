"""Compact networks give what the whole ones give, and are as small as they can be."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import UnsupportedLayerError
from flower_mcepl.models import AlexNetCifar, local_response_norm
from flower_mcepl.personal import compact, compact_or_whole
from flower_mcepl.personal import compacting as room
from flower_mcepl.personal.exporting import Agreement, agreement
from flower_mcepl.personal.places import PlacedNorm


class Block(nn.Module):
    """A stem and a residual block with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.conv2(self.norm1(self.conv1(x)).relu())
        return self.fc((x + y).relu().mean((2, 3)))


def checked(module: nn.Module, *shape: int) -> Any:
    """The compact network, compared on inputs that it was not made with."""
    torch.manual_seed(3)
    made = compact(module, torch.randn(4, *shape))
    inputs = torch.randn(9, *shape)
    torch.testing.assert_close(made.module(inputs), module(inputs), rtol=1e-5, atol=1e-5)
    return made


def test_empty_filters_and_their_inputs_go() -> None:
    module = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.ELU(), nn.Conv2d(6, 4, 3, padding=1))
    made = checked(emptied(module, {0: [1, 4, 5]}), 1, 8, 8)
    assert made.filters == {"0": (6, 3)}
    assert made.module.get_submodule("2").weight.shape == (4, 3, 3, 3)
    assert made.parameters == (6 * 9 + 6 * 4 * 9 + 4, 3 * 9 + 3 * 4 * 9 + 4)


def emptied(module: nn.Module, filters: dict[int | str, list[int]]) -> nn.Module:
    with torch.no_grad():
        for name, rows in filters.items():
            module.get_submodule(str(name)).weight[rows] = 0
    return module.eval().requires_grad_(False)


def test_inputs_that_nobody_reads_take_their_filters_along_again_and_again() -> None:
    module = nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 8), nn.ReLU()),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        module[6].weight[:, 2:] = 0  # of layer 4 two filters are read,
        module[4].weight[:2, 3:] = 0  # which read three of layer 2,
        module[2].weight[:3, 1:] = 0  # which read one of layer 0
    made = checked(module.eval(), 5)
    assert made.filters == {"0": (6, 1), "2": (7, 3), "4": (8, 2)}


def test_a_constant_goes_into_the_next_bias() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2, bias=False)),
        *(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)),
    )
    made = checked(emptied(module, {0: [0, 2], 3: [1], 5: [3]}), 1, 9, 9)
    assert made.filters == {"0": (4, 2), "3": (3, 2), "5": (4, 3)}
    assert made.module.get_submodule("3").bias is not None


def test_one_constant_that_is_not_zero_stays_before_zeros_around() -> None:
    """With padding its sum is another one at the border; it carries the others'."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 3, padding=1))
    made = checked(emptied(copy.deepcopy(module), {0: [2]}), 1, 6, 6)
    assert made.filters == {}
    assert "zeros lie around" in made.locked["0"]
    assert checked(emptied(module, {0: [0, 2, 3]}), 1, 6, 6).filters == {"0": (4, 2)}
    no_bias = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), module[2])
    assert checked(emptied(no_bias, {0: [0, 2]}), 1, 6, 6).filters == {"0": (4, 2)}


def test_a_residual_channel_goes_where_both_sides_are_empty() -> None:
    module = emptied(Block(), {"stem": [1, 2, 3], "conv2": [2, 3, 4], "conv1": [0, 7]})
    made = checked(module, 3, 6, 6)
    assert made.filters == {"stem": (8, 6), "conv2": (8, 6), "conv1": (8, 6)}
    assert made.module.get_submodule("norm1").running_mean.shape == (6,)


class Weighted(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sigmoid()
        y = self.norm1(self.conv1(x)).sigmoid()
        return self.fc(torch.add(x, y, alpha=2).mean((2, 3)))


def test_an_addition_with_a_factor_stays_as_it_is() -> None:
    made = checked(emptied(Weighted(), {"stem": [1, 2], "conv1": [1, 2]}), 3, 6, 6)
    assert made.filters == {}
    assert "add mixes channels" in made.locked["conv1"]


def test_a_norms_constants_are_counted_in() -> None:
    module = Block()
    with torch.no_grad():
        module.norm1.bias[:4] = torch.tensor([-1.0, -2.0, 1.0, 2.0])
    made = checked(emptied(module, {"conv1": [0, 1, 2, 3]}), 3, 6, 6)
    # two are 0 after the ReLU; of the two others one carries both
    assert made.filters == {"conv1": (8, 5)}


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_the_papers_network_keeps_the_places_of_its_channels(share: float) -> None:
    torch.manual_seed(1)
    module = AlexNetCifar(width=0.25)
    sizes = {"conv1": 16, "conv2": 32, "conv3": 64, "fc1": 48}
    gone = {
        name: torch.randperm(size)[round(share * size) :].tolist() for name, size in sizes.items()
    }
    made = checked(emptied(module, gone), 3, 32, 32)
    assert made.filters == {name: (size, round(share * size)) for name, size in sizes.items()}
    assert made.locked == {}


NORMS: list[Callable[[Tensor], Tensor]] = [
    nn.LocalResponseNorm(4, alpha=3.0),
    nn.LocalResponseNorm(5, alpha=3.0, beta=0.5, k=2.0),
    lambda x: nn.functional.local_response_norm(x, 3, alpha=3.0),
    lambda x: local_response_norm(x, size=4, alpha=3.0),
]


class Normed(nn.Module):
    def __init__(self, norm: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, channels, 3, bias=False), norm
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(self.conv(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize("number", range(len(NORMS)))
@settings(max_examples=25)
@given(live=st.lists(st.booleans(), min_size=4, max_size=14))
def test_a_local_response_norm_sees_the_same_neighbors(number: int, live: list[bool]) -> None:
    torch.manual_seed(2)
    module = Normed(NORMS[number], len(live))
    made = checked(emptied(module, {"conv": [k for k, on in enumerate(live) if not on]}), 1, 6, 6)
    assert made.module.get_submodule("conv").weight.shape[0] == max(1, sum(live))
    for placed in made.module.modules():
        if isinstance(placed, PlacedNorm):
            assert placed.places == ([k for k, on in enumerate(live) if on] or [0])


def test_a_bias_before_a_local_response_norm_keeps_its_channel() -> None:
    module = Normed(nn.LocalResponseNorm(3), 6)
    module.conv = nn.Conv2d(1, 6, 3)
    assert checked(emptied(module, {"conv": [2]}), 1, 6, 6).filters == {}


class Odd(nn.Module):
    """A layer in the middle of which nothing is known."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.middle, self.fc = nn.Conv2d(1, 4, 3), middle, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.middle(self.conv(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize(
    "middle",
    [
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Softmax(1),
        nn.AvgPool2d(2, padding=1),
        lambda x: x.cumsum(1),
        lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
        lambda x: x.view(-1, 4, 4, 4),
        lambda x: x * x.shape[1],
        lambda x: x.flatten(0, 1).unflatten(0, (-1, 4)),
        lambda x: x * torch.ones(4, 1, 1),
        lambda x: x + x.mean((2, 3), keepdim=True),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
)
def test_filters_before_what_mixes_channels_stay_and_are_named(
    middle: Callable[[Tensor], Tensor],
) -> None:
    made = checked(emptied(Odd(middle), {"conv": [1, 3]}), 1, 6, 6)
    assert made.filters == {}
    assert [*made.locked] == ["conv"]


def test_a_layer_that_is_called_twice_or_shares_its_weight_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(self.one(x).relu()).relu()).relu())

    assert checked(emptied(Twice(), {"one": [1], "two": [2]}), 4).filters == {}


def test_the_last_channel_stays() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert checked(emptied(module, {0: [0, 1, 2, 3, 4]}), 4).filters == {"0": (5, 1)}


def test_the_network_that_comes_in_stays_as_it_is() -> None:
    module = emptied(Block(), {"stem": [1], "conv2": [1]})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    checked(module, 3, 6, 6)
    assert all(torch.equal(module.state_dict()[name], t) for name, t in before.items())


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Chains of layers with masks that empty whole filters and single weights."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    width = 2
    for _ in range(draw(st.integers(1, 3))):
        wider = draw(st.integers(1, 6))
        bias, padding = draw(st.booleans()), draw(st.sampled_from([0, 1]))
        layers.append(nn.Conv2d(width, wider, 2, padding=padding, bias=bias))
        norm = nn.BatchNorm2d(wider)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        rest = [norm, nn.LocalResponseNorm(3, alpha=2.0), nn.MaxPool2d(2, 1), nn.Dropout()]
        layers += draw(st.lists(st.sampled_from(rest), max_size=2, unique=True))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.ELU(), nn.Sigmoid(), nn.Identity()])))
        width = wider
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    head = nn.Sequential(nn.Linear(4 * width, 5), nn.ReLU(), nn.Linear(5, 3))
    module = nn.Sequential(body, head)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                layer.weight[torch.rand(len(layer.weight)) < draw(st.sampled_from([0.0, 0.5]))] = 0
                layer.weight[torch.rand_like(layer.weight) < draw(st.sampled_from([0, 0.9]))] = 0
    return module.eval().requires_grad_(False)


@settings(max_examples=25)
@given(networks())
def test_any_network_gives_the_same(module: nn.Module) -> None:
    made = checked(module, 2, 9, 9)
    assert made.parameters[1] <= made.parameters[0] + sum(  # a constant may need a bias
        len(layer.weight) for layer in module.modules() if isinstance(layer, nn.Conv2d)
    )


# --- when it is refused ---


def test_code_that_cannot_be_traced_is_said() -> None:
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    Branch.__module__ = "here"
    module = Branch(4, 4).eval()
    inputs = torch.ones(2, 4)
    with pytest.raises(UnsupportedLayerError, match=r"cannot trace Branch"):
        compact(module, inputs)
    kept, line = compact_or_whole(module, [inputs])
    assert kept is module
    assert line.startswith("not compact: torch.fx cannot trace")


def test_a_network_that_would_give_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = emptied(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), {0: [1]})
    wrong = room.keep_columns

    def careless(layer: nn.Module, value: Any, keep: list[int], carrier: int | None) -> None:
        value.constant = torch.zeros_like(value.constant)
        wrong(layer, value, keep, carrier)

    monkeypatch.setattr(room, "keep_columns", careless)
    inputs = torch.randn(3, 4)
    with pytest.raises(UnsupportedLayerError, match=r"must give what the whole one gives"):
        compact(module, inputs)
    kept, line = compact_or_whole(module, [inputs])
    assert kept is module
    assert "report this" in line


def test_a_split_on_which_they_differ_keeps_the_whole_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = emptied(Block(), {"conv1": [0]})
    batches = [torch.randn(3, 3, 6, 6), torch.randn(2, 3, 6, 6)]
    small, line = compact_or_whole(module, batches)
    assert small is not module
    assert "the same prediction for 5 of 5" in line
    other = Agreement(5, 0.0, 1.0, 1)
    seen: list[int] = []

    def differs(one: Any, two: Any, given: Any) -> Agreement:
        seen.append(len(given))
        return other if len(given) == 2 else agreement(one, two, given)

    monkeypatch.setattr(room, "agreement", differs)
    kept, line = compact_or_whole(module, batches)
    assert kept is module
    assert seen == [1, 2]
    assert "the same prediction for 4 of 5" in line


def test_agreement_sees_shapes_and_what_is_no_number() -> None:
    inputs = [torch.zeros(2, 3)]
    assert not agreement(lambda x: x, lambda x: x[:, :2], inputs).holds(1.0)
    assert not agreement(lambda x: x, lambda x: x * torch.nan, inputs).holds(1.0)
    assert agreement(lambda x: x, lambda x: x + 1e-6, inputs).holds(1e-5)
