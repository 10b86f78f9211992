"""Compact training against the whole network: outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import UnsupportedLayerError
from flower_mcepl.masks import compact as compact_module
from flower_mcepl.masks.compact import CompactNetwork, check_compact
from flower_mcepl.masks.gates import GATES, gate_name, resolve_filters
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.models import AlexNetCifar

F = nn.functional


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Conv2d(8, 7, 3, padding=1),
        nn.Sigmoid(),  # what is off comes out as .5
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Conv2d(7, 6, 2),
        nn.Flatten(),
        nn.Linear(6, 9),
        nn.GELU(),
        nn.Linear(9, 5),
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 8, norm), Block(8, 8, norm))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Mixed(nn.Module):
    """Grouped and transposed convolutions, a weight of two layers, one read by code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.twin = nn.Conv2d(6, 6, 3, padding=1)
        self.twin.weight = self.again.weight
        self.read = nn.Linear(12, 6)
        self.tokens = nn.Linear(6, 10)
        self.back = nn.Linear(10, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = F.elu(self.plain(F.relu(self.first(x))))
        x = self.up(F.relu(self.grouped(x)))
        x = F.relu(self.again(x)) * F.relu(self.twin(x))
        x = torch.cat([x, x], 1).flatten(2).transpose(1, 2)  # [batch, places, channels]
        x = torch.tanh(F.linear(x, self.read.weight))
        return self.back(F.gelu(self.tokens(x)) * scale).mean(1)


class Widths(nn.Module):
    """Views by hard-coded and by read sizes, additions of unequal gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3)
        self.b = nn.Conv2d(4, 6, 3)
        self.c = nn.Conv2d(4, 6, 3)
        self.d = nn.Linear(6 * 4, 8)
        self.e = nn.Linear(8, 8)
        self.f = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.max_pool2d(F.relu(self.b(x)) + self.c(x), 2)
        y = F.relu(self.d(y.view(y.size(0), -1)))
        y = torch.sigmoid(self.e(y.view(-1, 8))) * 2 + 1
        return self.f(y.reshape(y.shape[0], -1))


class Moody(nn.Module):
    """Code that asks whether it trains, and an addition with a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8)
        self.d = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.add(F.relu(self.b(x)), F.relu(self.c(x)), alpha=3)
        if self.training:
            x = x + 1
        return self.d(F.dropout(x, 0.5, self.training))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits": (digits, (3, 1, 8, 8)),
    "alexnet": (lambda: AlexNetCifar(width=0.1), (2, 3, 32, 32)),
    "group norm": (lambda: Residual(lambda n: nn.GroupNorm(2, n)), (3, 3, 6, 6)),
    "batch norm": (lambda: Residual(nn.BatchNorm2d), (3, 3, 6, 6)),
    "mixed": (Mixed, (3, 2, 5, 5)),
    "widths": (Widths, (3, 1, 8, 8)),
    "moody": (Moody, (5, 4)),
}


def masked(
    build: Callable[[], nn.Module], *, seed: int, share: float, dtype: torch.dtype, **rules: Any
) -> MaskedModel:
    """A model with random scores and gates, some of which neighbors were heard of."""
    torch.manual_seed(seed)
    module = build().to(dtype)
    filters = resolve_filters(share, {}, module, find_maskable(module))
    model = MaskedModel(
        module, retention=0.6, filters=filters, generator=generator(seed), **rules
    ).to(dtype)
    source = generator(seed + 1)
    with torch.no_grad():
        for name, z in model.all_scores.items():
            if name.endswith(GATES):
                z.copy_(torch.randn(z.shape, generator=source, dtype=dtype))
    heard = {n: torch.rand(z.shape, generator=source) for n, z in model.all_scores.items()}
    model.set_neighbor_means(heard)
    return model


def outputs_and_gradients(
    model: MaskedModel, network: Callable[..., Tensor], inputs: Tensor, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # of the dropout
    outputs = network(inputs, **kwargs)
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    scores = model.scores
    loss = (outputs * weights).sum()
    gradients = torch.autograd.grad(loss, list(scores.values()), materialize_grads=True)
    return outputs.detach(), dict(zip(scores, gradients, strict=True))


def differences(
    one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]
) -> dict[str, float]:
    """Largest difference, relative to the largest number."""
    pairs = {"outputs": (one[0], other[0])}
    pairs |= {name: (g, other[1][name]) for name, g in one[1].items()}
    return {
        name: float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for name, (a, b) in pairs.items()
    }


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.2, 0.5, 0.8]), data=st.data())
def test_outputs_and_gradients_are_the_whole_networks(
    name: str, seed: int, share: float, data: st.DataObject
) -> None:
    """Float64 within 1e-10, float32 within 1e-5 of the layer's largest gradient."""
    build, shape = NETWORKS[name]
    dtype, within = data.draw(st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]))
    budget = data.draw(st.sampled_from(["layer", "network"]))
    model = masked(build, seed=seed, share=share, dtype=dtype, budget=budget)
    inputs = torch.randn(shape, generator=generator(seed + 2), dtype=dtype)
    buffers = {n: b.clone() for n, b in model.module.named_buffers()}
    due = outputs_and_gradients(model, model, inputs)
    statistics = {n: b.clone() for n, b in model.module.named_buffers()}
    for n, b in model.module.named_buffers():
        b.copy_(buffers[n])
    came = outputs_and_gradients(model, CompactNetwork(model), inputs)
    assert {n: d for n, d in differences(due, came).items() if d > within} == {}
    for n, b in model.module.named_buffers():
        assert torch.allclose(b, statistics[n], rtol=within, atol=within)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # inputs, outputs of each convolution and linear layer in a pass
        ("alexnet", [(3, 6), (6, 7), (7, 13), (52, 10), (10, 10)]),
        ("group norm", [(3, 4), (4, 4), (8, 4), (4, 4), (8, 4), (8, 4), (8, 3)]),
        ("batch norm", [(3, 4), (4, 4), (4, 4), (4, 4), (8, 4), (4, 4), (8, 3)]),
    ],
)
def test_what_is_off_is_not_calculated(
    name: str, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    apply = compact_module._apply

    def spy(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if len(input) > 1:  # not the one example that stands for what is off
            seen.append((weight.shape[1], weight.shape[0]))
        return apply(layer, input, weight, bias)

    monkeypatch.setattr(compact_module, "_apply", spy)
    build, shape = NETWORKS[name]
    model = masked(build, seed=1, share=0.5, dtype=torch.float32)
    CompactNetwork(model)(torch.randn(shape, generator=generator(0)))
    assert seen == sizes


def test_arguments_by_name_and_defaults() -> None:
    model = masked(Mixed, seed=3, share=0.5, dtype=torch.float64)
    inputs = torch.randn(2, 2, 5, 5, generator=generator(0), dtype=torch.float64)
    due = outputs_and_gradients(model, model, inputs, scale=3.0)
    came = outputs_and_gradients(model, CompactNetwork(model), inputs, scale=3.0)
    assert max(differences(due, came).values()) < 1e-10


def test_it_is_smaller_where_a_filter_is_off() -> None:
    model = masked(digits, seed=0, share=0.5, dtype=torch.float32)
    assert CompactNetwork(model).is_smaller
    model.set_opening(1.0)
    assert not CompactNetwork(model).is_smaller


def test_no_gate_gets_a_gradient() -> None:
    model = masked(digits, seed=0, share=0.5, dtype=torch.float32)
    loss = CompactNetwork(model)(torch.ones(2, 1, 8, 8)).sum()
    loss.backward()
    for name in model.rules.filters:
        assert model.all_scores[gate_name(name)].grad is None
        assert model.scores[name].grad is not None


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    model = masked(Branching, seed=0, share=0.5, dtype=torch.float32)
    with pytest.raises(UnsupportedLayerError, match=r"torch\.fx cannot trace Branching"):
        CompactNetwork(model)


def test_filters_of_other_layers_alone_are_refused() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 2)
        )

    model = masked(build, seed=0, share=0.5, dtype=torch.float32)
    with pytest.raises(UnsupportedLayerError, match="has none with gates"):
        CompactNetwork(model)


class Counting(nn.Module):
    """Its code reads a Python number that a trace takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def test_a_trace_that_is_not_the_network_is_refused() -> None:
    model = masked(Counting, seed=0, share=0.5, dtype=torch.float32).eval()
    compact = CompactNetwork(model)
    inputs = torch.ones(2, 2)
    check_compact(compact, lambda network: network(inputs))
    model.module.scale = 2.0
    with pytest.raises(UnsupportedLayerError, match=r"got a difference of 0\.5"):
        check_compact(compact, lambda network: network(inputs))


@pytest.mark.parametrize("made_in_eval", [False, True])
def test_code_that_asks_whether_it_trains_is_answered_as_in_the_whole_network(
    made_in_eval: bool,
) -> None:
    model = masked(Moody, seed=2, share=0.5, dtype=torch.float64)
    model.train(not made_in_eval)
    modes = {name: submodule.training for name, submodule in model.named_modules()}
    compact = CompactNetwork(model)
    assert {name: submodule.training for name, submodule in model.named_modules()} == modes
    inputs = torch.randn(5, 4, generator=generator(3), dtype=torch.float64)
    for mode in (True, False, True):
        model.train(mode)
        due = outputs_and_gradients(model, model, inputs)
        came = outputs_and_gradients(model, compact, inputs)
        assert max(differences(due, came).values()) < 1e-10


def test_an_addition_keeps_its_factor_where_both_sides_lack_the_same_filters() -> None:
    model = masked(Moody, seed=2, share=0.5, dtype=torch.float64)
    scores = model.all_scores
    with torch.no_grad():
        scores[gate_name("c.weight")].copy_(scores[gate_name("b.weight")])
    model.set_neighbor_means(None)
    inputs = torch.randn(5, 4, generator=generator(3), dtype=torch.float64)
    due = outputs_and_gradients(model, model, inputs)
    assert (
        max(differences(due, outputs_and_gradients(model, CompactNetwork(model), inputs)).values())
        < 1e-10
    )


def test_blocks_of_four_stay_blocks_in_compact_steps() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)
    ).double()
    layers = find_maskable(module)
    model = MaskedModel(
        module,
        retention=0.5,
        filters=resolve_filters(0.5, {}, module, layers),
        blocks=[*layers],
        generator=generator(3),
    ).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    compact = CompactNetwork(model)
    assert compact.is_smaller
    outputs = compact(x)
    torch.testing.assert_close(outputs, model(x), rtol=0, atol=1e-10)
    scores = [*model.scores.values()]
    one = torch.autograd.grad(outputs.square().sum(), scores)
    other = torch.autograd.grad(model(x).square().sum(), scores)
    for mine, whole in zip(one, other, strict=True):
        live = mine != 0
        torch.testing.assert_close(mine[live], whole[live], rtol=0, atol=1e-10)
