"""Masked weights in the place of frozen ones, whatever the layers and their names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from flower_mcepl import MaskedModel, UnsupportedLayerError, shared_module
from flower_mcepl.masks.layers import find_frozen, find_maskable
from flower_mcepl.masks.placement import call_with, kept_in_eval, slots_of


def masked(module: nn.Module, **options: Any) -> MaskedModel:
    return MaskedModel(module, generator=torch.Generator().manual_seed(0), **options)


def gradients(model: MaskedModel, *inputs: Tensor) -> dict[str, Tensor]:
    output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    scores = model.scores
    found = torch.autograd.grad(output.square().sum(), scores.values())
    return dict(zip(scores, found, strict=True))


class TwoNames(nn.Module):
    """A backbone and a head, which are also the parts of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.net = nn.Sequential(self.backbone, nn.ReLU(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OneName(TwoNames):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)))


def test_a_module_with_two_names_has_one_mask_and_trains_as_with_one() -> None:
    x = torch.randn(5, 4)
    two, one = (masked(shared_module(net, seed=1)) for net in (TwoNames, OneName))
    assert list(two.layers) == list(one.layers) == ["backbone.weight", "head.weight"]
    for _ in range(2):  # the first call leaves nothing behind
        assert torch.equal(two(x), one(x))
        assert_close(gradients(two, x), gradients(one, x), rtol=0, atol=0)
    assert isinstance(two.module.net[0].weight, nn.Parameter)
    assert torch.equal(two.bake()(x), two(x))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int]] = {
    "LSTM": (lambda: nn.LSTM(4, 6, 2, bidirectional=True), (torch.randn(5, 2, 4),), 8),
    "LSTM with projection": (lambda: nn.LSTM(4, 6, proj_size=3), (torch.randn(5, 2, 4),), 3),
    "GRU": (lambda: nn.GRU(4, 6, bias=False), (torch.randn(5, 2, 4),), 2),
    "RNN": (lambda: nn.RNN(4, 6), (torch.randn(5, 2, 4),), 2),
    "LSTMCell": (lambda: nn.LSTMCell(4, 6), (torch.randn(2, 4),), 2),
    "GRUCell": (lambda: nn.GRUCell(4, 6), (torch.randn(2, 4),), 2),
    "RNNCell": (lambda: nn.RNNCell(4, 6), (torch.randn(2, 4),), 2),
    "Bilinear": (lambda: nn.Bilinear(4, 3, 5), (torch.randn(2, 4), torch.randn(2, 3)), 1),
    "Embedding": (lambda: nn.Embedding(9, 4), (torch.arange(9).view(3, 3),), 1),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), (torch.arange(9).view(3, 3),), 1),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_calculate_and_learn_with_the_masked_weights(kind: str) -> None:
    build, inputs, number = LAYERS[kind]
    model = masked(shared_module(build, seed=1), retention=0.5)
    assert len(model.layers) == number
    assert model.frozen.names == ()
    baked, ours, plain = model.bake(), model(*inputs), model.module(*inputs)
    first = [value[0] if isinstance(value, tuple) else value for value in (baked(*inputs), ours)]
    assert_close(*first)
    assert not torch.equal(first[1], plain[0] if isinstance(plain, tuple) else plain)
    # straight through: the gradient of y is that of w * m, times w
    weights = {name: baked.get_parameter(name).requires_grad_() for name in model.layers}
    output = baked(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    expected = torch.autograd.grad(output.square().sum(), weights.values())
    found = gradients(model, *inputs)
    for name, g in zip(weights, expected, strict=True):
        assert_close(found[name].abs(), (g * model.module.get_parameter(name)).abs())
    assert sum(bool(g.any()) for g in expected) >= len(expected) - 1  # a cell begins at zero


def test_embeddings_that_change_their_own_weights_are_refused() -> None:
    for options in ({"max_norm": 1.0}, {"sparse": True}):
        with pytest.raises(
            UnsupportedLayerError, match=f"must not be made with {next(iter(options))}"
        ):
            find_maskable(nn.Embedding(5, 3, **options))


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_copies_over_devices_are_refused_by_name(wrap: Any) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"got DataParallel.*\.module"):
        find_maskable(nn.Sequential(wrap(nn.Linear(3, 3))))


class Checkpointed(nn.Module):
    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.how = how

    def part(self, h: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.part(h) if self.how is None else checkpoint(self.part, h, use_reentrant=self.how)
        return self.c(h)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    x = torch.randn(8, 6)
    plain, saving = (
        masked(shared_module(lambda how=how: Checkpointed(how), seed=1)) for how in (None, False)
    )
    expected = gradients(plain, x)
    for _ in range(2):
        assert_close(gradients(saving, x), expected, rtol=0, atol=0)
        assert all(isinstance(p, nn.Parameter) for p in saving.module.parameters())
    saving(x).square().sum().backward()
    assert_close({name: z.grad for name, z in saving.scores.items()}, expected, rtol=0, atol=0)


def test_a_backward_pass_over_several_outputs_leaves_nothing_in_place() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.a(x), "more": (self.b(x), None)}

    model = masked(shared_module(Two, seed=1))
    for _ in range(2):
        outputs = model(torch.randn(4, 3))
        (outputs["logits"].sum() + outputs["more"][0].sum()).backward()
        assert all(isinstance(p, nn.Parameter) for p in model.module.parameters())


def test_the_weights_are_back_where_a_forward_pass_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(9, 9))
    slots = slots_of(net, {"0.weight": None, "1.weight": None})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_with(net, slots, {"0.weight": torch.zeros(2, 3)}, (torch.ones(1, 3),))
    assert bool(net[0].weight.any())


def test_what_the_model_function_left_in_eval_mode_stays_there() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 2))

    model = masked(shared_module(build, seed=1))
    assert kept_in_eval(build()) == ("1",)
    model.train()
    assert model.module[0].training
    assert not model.module[1].training
    model(torch.randn(6, 4) + 9)
    assert not bool(model.module[1].running_mean.any())
    # a whole network in eval mode is how libraries hand it out
    assert kept_in_eval(build().eval()) == ()
    whole = masked(shared_module(lambda: build().eval(), seed=1)).train()
    assert whole.module[1].training


def test_what_is_neither_masked_nor_trained_is_named_and_warned_of() -> None:
    class Positions(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(size, 4))
            self.head = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.positions[0])

    frozen = find_frozen(Positions(15), ["head.weight"])
    assert frozen.names == ("positions",)
    assert frozen.share == pytest.approx(70 / 110)
    assert frozen.facts() == {"frozen-share": frozen.share, "frozen-weights": "positions"}
    with pytest.warns(UserWarning, match=r"55% of the weights of Positions get no mask.*positions"):
        assert masked(shared_module(lambda: Positions(15), seed=1)).frozen == frozen
    masked(shared_module(lambda: Positions(1), seed=1))  # 4 of 54: told, and no warning
