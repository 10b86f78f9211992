import numpy as np
import pytest
import torch
from torch import nn

from flower_mcepl.errors import UnsupportedLayerError
from flower_mcepl.masks import layers
from flower_mcepl.masks.layers import CONV, LINEAR, Frozen, find_maskable, maskable
from tests.oracles import masks as oracles

LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), (6,)),
    "conv1d": (nn.Conv1d(2, 4, 3, bias=False), (2, 7)),
    "conv2d": (nn.Conv2d(2, 4, 3, bias=False), (2, 6, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2, bias=False), (2, 4, 4, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 6, 5)),
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3, bias=False), (2, 5)),
    "transposed2d": (nn.ConvTranspose2d(3, 5, (2, 3), bias=False), (3, 4, 4)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 2, groups=2, bias=False), (2, 3, 3, 3)),
    "transposed-grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), (6, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_what_feeds_one_output(name: str) -> None:
    layer, shape = LAYERS[name]
    spec = find_maskable(layer)["weight"]
    places = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
    rows = spec.rows(places)

    by_loop = [
        [int(np.ravel_multi_index(place, spec.shape)) for place in places_of_one]
        for places_of_one in oracles.filter_places(spec.shape, spec.transposed_groups)
    ]
    assert [sorted(row) for row in rows.tolist()] == [sorted(row) for row in by_loop]

    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for output, row in enumerate(rows):
        without = layer.weight.detach().clone()
        without.view(-1)[row] = 0.0
        changed = torch.func.functional_call(layer, {"weight": without}, inputs) != layer(inputs)
        outputs_changed = (
            changed.flatten(2).any(dim=2).any(dim=0) if changed.ndim > 2 else changed.any(dim=0)
        )
        assert outputs_changed.nonzero().flatten().tolist() == [output]


def test_weights_are_found_in_order_with_name_kind_and_shape() -> None:
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 8, 3))
    net.add_module("norm", nn.BatchNorm2d(8))
    net.add_module("up", nn.ConvTranspose2d(8, 4, 2, groups=2))
    net.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    found = find_maskable(net)
    assert list(found) == ["stem.weight", "up.weight", "head.1.weight"]
    assert [spec.kind for spec in found.values()] == [CONV, CONV, LINEAR]
    assert [spec.shape for spec in found.values()] == [(8, 3, 3, 3), (8, 2, 2, 2), (2, 4)]
    assert [spec.transposed_groups for spec in found.values()] == [0, 2, 0]


def test_a_bare_layer_and_a_subclass_count() -> None:
    class Scaled(nn.Linear):
        pass

    assert list(find_maskable(Scaled(3, 2))) == ["weight"]


def test_a_shared_weight_is_found_once_under_its_first_name() -> None:
    layer = nn.Linear(3, 3)
    twin = nn.Linear(3, 3)
    twin.weight = layer.weight
    assert list(find_maskable(nn.Sequential(layer, nn.ReLU(), layer, twin))) == ["0.weight"]


@pytest.mark.parametrize("other", [{}, {"kdim": 3, "vdim": 5}])
def test_attention_projections_are_linear_weights(other: dict[str, int]) -> None:
    found = find_maskable(nn.MultiheadAttention(4, 2, **other))
    projections = (
        ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if other else ["in_proj_weight"]
    )
    assert list(found) == [*projections, "out_proj.weight"]
    assert {spec.kind for spec in found.values()} == {LINEAR}


def test_own_layer_types_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rank1(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.ones(3, 1))

    with pytest.raises(UnsupportedLayerError, match="nothing to mask"):
        find_maskable(Rank1())
    monkeypatch.setattr(layers, "_FINDERS", dict(layers._FINDERS))
    maskable(Rank1)(lambda layer: iter([("left", LINEAR, 0)]))
    assert list(find_maskable(nn.Sequential(Rank1()))) == ["0.left"]


def test_nothing_to_mask_names_what_could_be() -> None:
    with pytest.raises(
        UnsupportedLayerError,
        match=r"Sequential has nothing to mask.*Conv2d.*Linear.*MultiheadAttention",
    ):
        find_maskable(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_a_parametrized_weight_is_refused_by_name() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(
        UnsupportedLayerError, match=r"0\.weight.*not a plain parameter.*remove_parametrizations"
    ):
        find_maskable(net)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_weight_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight.*has no shape yet"):
        find_maskable(nn.Sequential(nn.LazyLinear(3)))


def test_a_weight_without_values_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight has no values.*meta device"):
        find_maskable(nn.Sequential(nn.Linear(3, 2, device="meta")))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # it is no longer developed
def test_a_scripted_network_is_to_be_passed_as_it_was() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"as it was before torch\.jit\.script"):
        find_maskable(torch.jit.script(nn.Sequential(nn.Linear(3, 2))))


def test_a_half_precision_weight_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"weight has dtype torch.float16.*\.float\(\)"):
        find_maskable(nn.Linear(3, 2).half())


@pytest.mark.parametrize(("count", "named"), [(1, "a"), (4, "a, b, c, d"), (5, "a, b, c, d, ...")])
def test_the_handshake_names_the_first_four_of_what_is_frozen(count: int, named: str) -> None:
    assert Frozen(0.5, tuple("abcdefgh"[:count])).facts() == {
        "frozen-share": 0.5,
        "frozen-weights": named,
    }
    assert Frozen(0.5).facts() == {"frozen-share": 0.5}
