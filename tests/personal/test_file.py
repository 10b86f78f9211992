"""A personal model's file gives every bit again, or one clear error."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flower_mcepl import (
    ConfigError,
    FingerprintError,
    FlowerMceplError,
    StateError,
    UnsupportedLayerError,
    load_personal,
    shared_module,
)
from flower_mcepl.masks.model import MaskedModel
from flower_mcepl.masks.weight_init import with_weights
from flower_mcepl.models import AlexNetCifar
from flower_mcepl.personal import (
    Origin,
    personal_bytes,
    read_personal,
    reference_to,
    reference_to_app,
    save_personal,
)
from flower_mcepl.personal.layout import (
    HEADER,
    MAX_WORDS,
    RAW,
    Entry,
    Parts,
    checksum,
    join,
    split,
)
from flower_mcepl.personal.network import named_tensors
from flower_mcepl.personal.probe import probe_input
from flower_mcepl.personal.reading import opened
from flower_mcepl.streams import torch_stream
from tests.fleet.agents import make_agent, noisy_net, small_net
from tests.oracles import mask_file

SEED = 7
SMALL, SHAPE = Origin(SEED, 0), (1, 1, 6, 6)


class Everything(nn.Module):
    """Tensors of many types, tied weights, an empty one, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 3).double()
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.body.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))
        self.halves = nn.Parameter(torch.randn(3).half())
        for kind in (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
            self.register_buffer(f"b{kind}".replace(".", "_"), torch.arange(3).to(kind))
        self.register_buffer("hidden", torch.tensor([torch.nan, -0.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tied(self.body(x)).double()
        return self.wide(y)


def baked(
    model_fn: Any = small_net,
    *,
    retention: Any = 0.3,
    init: str = "module",
    seed: int = SEED,
    filters: dict[str, float] | None = None,
) -> nn.Module:
    module = with_weights(shared_module(model_fn, seed=SEED), init, seed=SEED)
    scores = torch_stream(seed, "scores")
    model = MaskedModel(module, retention=retention, filters=filters, generator=scores)
    return model.bake().eval()


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and np.array_equal(
        left.double().numpy(), right.double().numpy(), equal_nan=True
    )


@pytest.mark.parametrize("init", ["module", "signed-constant"])
@pytest.mark.parametrize("retention", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("model_fn", [small_net, noisy_net, Everything])
@pytest.mark.parametrize("origin", [None, SMALL, Origin(8, 3)])
def test_a_file_gives_every_bit_again(
    model_fn: Any, retention: float, init: str, origin: Origin | None
) -> None:
    module = baked(model_fn, retention=retention, init=init)
    data = personal_bytes(module, origin=origin)
    file = opened(data, where="x")
    network = file.network(model_fn)
    for name, tensor in named_tensors(module).items():
        assert same(named_tensors(network)[name], tensor), name
    assert not network.training
    inputs = torch.randn(5, 6) if model_fn is Everything else torch.randn(5, *SHAPE[1:])
    with torch.no_grad():
        assert torch.equal(network(inputs), module(inputs))


@pytest.mark.parametrize("init", ["module", "signed-constant"])
@pytest.mark.parametrize("model_fn", [small_net, Everything])
@pytest.mark.parametrize("origin", [None, SMALL])
@pytest.mark.parametrize("rows", [False, True, "gates"])
def test_a_second_reader_reads_the_same(
    model_fn: Any, init: str, origin: Origin | None, rows: bool | str
) -> None:
    first = "0.weight" if model_fn is small_net else "body.weight"
    module = baked(model_fn, init=init, filters={first: 0.7} if rows == "gates" else None)
    if rows is True:
        with torch.no_grad():
            for weight in filter(torch.Tensor.dim, module.parameters()):
                weight[:1] = 0
    data = personal_bytes(module, origin=origin, facts={"agent": 3, "task": "é"})
    facts, elements = mask_file.read(data)
    file = opened(data, where="x")
    assert facts == file.facts
    assert facts.items() >= {"agent": 3, "task": "é"}.items()
    for name, tensor in file.tensors.items():
        flat = tensor.reshape(-1)
        assert elements[name] == (flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"")


def test_drawn_weights_take_no_bytes() -> None:
    for init in ("module", "signed-constant"):
        module = baked(init=init)
        assert opened(personal_bytes(module, origin=SMALL), where="x").stored == 0
        assert opened(personal_bytes(module), where="x").stored > 0
        assert opened(personal_bytes(module, origin=Origin(8, 0)), where="x").stored > 0


@settings(max_examples=20)
@given(
    share=st.floats(0.05, 1.0),
    retention=st.sampled_from([0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_gates_cost_no_weights(share: float, retention: float, seed: int) -> None:
    """Filters that are off scale the others, by a factor that the file says."""
    filters = {"conv2.weight": share, "fc1.weight": share}
    module = baked(AlexNetCifarNarrow, retention=retention, filters=filters, seed=seed)
    file = opened(personal_bytes(module, origin=SMALL), where="x")
    assert file.stored == 0
    for name, tensor in named_tensors(module).items():
        assert torch.equal(file.tensors[name], tensor), name


def test_a_version_is_the_first_that_knows_a_files_recipes() -> None:
    plain = personal_bytes(baked(), origin=SMALL)
    gated = personal_bytes(baked(filters={"0.weight": 0.5}), origin=SMALL)
    assert (plain[8], gated[8]) == (1, 2)
    older = bytearray(gated)
    older[8] = 1
    with pytest.raises(StateError, match="its table cannot be read"):
        opened(forged(bytes(older)), where="x")


def test_a_file_of_version_1_opens() -> None:
    data = (Path(__file__).parents[1] / "vectors" / "personal-1.mask").read_bytes()
    file = opened(data, where="x")
    assert (data[8], file.stored, file.facts["agent"]) == (1, 0, 1)
    for name, tensor in named_tensors(baked()).items():
        assert torch.equal(file.tensors[name], tensor), name
    assert isinstance(file.network(small_net), nn.Module)


def test_a_weight_that_is_not_drawn_is_stored_and_never_rounded() -> None:
    module = baked()
    weight = module.get_parameter("3.weight")
    with torch.no_grad():
        live = weight.nonzero()[0]
        weight[tuple(live)] = torch.nextafter(weight[tuple(live)], torch.tensor(2.0))
    file = opened(personal_bytes(module, origin=SMALL), where="x")
    assert file.stored == 4 * int((weight != 0).sum())
    assert torch.equal(file.tensors["3.weight"], weight)


@pytest.mark.parametrize(
    ("retention", "most"), [({"conv": 0.3, "linear": 0.9}, 130_000), (0.5, 160_000)]
)
@pytest.mark.parametrize("init", ["module", "signed-constant"])
def test_alexnet_takes_a_bit_a_weight(init: str, retention: Any, most: int) -> None:
    """Of a mask of which nothing is known; 75 kB are under its entropy."""
    module = baked(AlexNetCifar, retention=retention, init=init, seed=99)
    data = personal_bytes(module, origin=Origin(SEED, 3))
    assert opened(data, where="x").stored == 0
    assert len(data) < most


def test_first_scores_make_masks_cheaper() -> None:
    """A mask of scores that moved by a fifth of their range, as they do in a run."""
    module = with_weights(shared_module(AlexNetCifar, seed=SEED), "signed-constant", seed=SEED)
    model = MaskedModel(
        module, retention={"conv": 0.3, "linear": 0.9}, generator=torch_stream(SEED, "scores")
    )
    with torch.no_grad():
        for z in model.scores.values():
            z.add_(torch.randn(z.shape) * z.abs().max() / 5)
    data = personal_bytes(model.bake(), origin=Origin(SEED, 3))
    assert len(data) < 0.85 * len(personal_bytes(model.bake(), origin=Origin(8, 3)))


def test_a_filter_that_is_off_costs_a_bit() -> None:
    module = baked(AlexNetCifar, retention=0.5, init="signed-constant", seed=99)
    whole = len(personal_bytes(module, origin=Origin(SEED, 3)))
    with torch.no_grad():
        for name in ("conv2", "conv3", "fc1"):
            weight = module.get_submodule(name).weight
            weight[torch.randperm(len(weight))[: len(weight) // 2]] = 0
    half = personal_bytes(module, origin=Origin(SEED, 3))
    assert len(half) < 0.53 * whole
    assert opened(half, where="x").stored == 0


def test_the_run_of_an_agent_is_the_origin_of_its_file() -> None:
    for owner in ("shared", "independent"):
        agent = make_agent(2, score_init=owner, retention=0.3)
        agent.train(round=1)
        data = personal_bytes(
            agent.personal_model(), origin=Origin(agent.seed, 2), fingerprint=agent.fingerprint
        )
        file = opened(data, where="x")
        assert (file.stored, file.fingerprint) == (0, agent.fingerprint)
        assert {n: m.bool() for n, m in agent.model.masks().items()}.keys() == file.masks.keys()
        for name, mask in agent.model.masks().items():
            assert torch.equal(file.masks[name], mask)


# --- the network ---


def test_a_file_that_names_its_network_needs_no_model_function(tmp_path: Path) -> None:
    module = baked(AlexNetCifarNarrow)
    named = {"network": reference_to(AlexNetCifar, {"width": 0.1})}
    save_personal(module, tmp_path / "a.mask", facts=named, origin=SMALL)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_personal(tmp_path / "a.mask")(inputs), module(inputs))


def AlexNetCifarNarrow() -> nn.Module:
    return AlexNetCifar(width=0.1)


def model_fn(context: Any) -> nn.Module:
    return AlexNetCifar(width=context.run_config["width"])


def test_a_flower_apps_model_function_gets_its_context() -> None:
    context = {"run_config": {"width": 0.1}, "node_config": {}}
    named = {"network": reference_to(model_fn, context=context)}
    file = opened(personal_bytes(baked(AlexNetCifarNarrow), facts=named), where="x")
    assert isinstance(file.network(), AlexNetCifar)


@pytest.mark.parametrize(
    ("reads", "kept"),
    [
        (lambda settings: settings["width"], {"width"}),
        (lambda settings: settings.get("depth", 3), set()),
        (lambda settings: "seed" in settings, {"seed"}),
        (lambda settings: dict(settings), {"width", "seed"}),
        (lambda settings: {**settings}, {"width", "seed"}),
        (lambda settings: list(settings), {"width", "seed"}),
        (lambda settings: settings | {}, {"width", "seed"}),
        (lambda settings: settings.copy(), {"width", "seed"}),
        (lambda settings: settings.items(), {"width", "seed"}),
        (lambda settings: [*settings.values()], {"width", "seed"}),
    ],
)
def test_settings_that_a_model_function_does_not_read_stay_out(
    reads: Any, kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(context: Any) -> nn.Module:
        reads(context.run_config)
        return small_net()

    monkeypatch.setattr(reading, "__qualname__", "reading")
    fact = reference_to_app(reading, {"width": 1, "seed": 2}, {"partition-id": 3})
    assert fact["context"]["node_config"] == {}
    assert fact["context"]["run_config"].keys() == kept


def test_a_model_function_that_needs_flower_itself_is_not_named() -> None:
    assert reference_to_app(lambda context: context.run_id, {}, {}) == {}


@pytest.mark.parametrize(
    ("fact", "what"),
    [
        ({}, "does not say who builds"),
        ({"reference": "os:system", "config": {"command": "false"}}, "is neither"),
        ({"reference": "subprocess:run", "config": {"args": ["false"]}}, "is neither"),
        ({"reference": "no_such_package:Net"}, "cannot be imported"),
        ({"reference": ""}, "does not say"),
        ({"reference": "torch.nn:Linear", "config": {"in_features": -1}}, "cannot build"),
        ({"reference": "torch.nn:Linear", "config": [1]}, "no table"),
    ],
)
def test_a_file_cannot_call_anything_else(fact: dict[str, Any], what: str) -> None:
    file = opened(personal_bytes(baked(), facts={"network": fact}), where="x")
    with pytest.raises(ConfigError, match=what):
        file.network()


def test_what_has_no_name_is_not_referred_to() -> None:
    assert reference_to(lambda: small_net()) == {}


def test_another_network_is_refused() -> None:
    file = opened(personal_bytes(baked(), input_shape=SHAPE), where="x")

    def wider() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))

    def other_types() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))

    class Odd(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1)

    Odd.__qualname__ = "Conv2d"

    def other_sums() -> nn.Module:
        return nn.Sequential(Odd(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    def other_inputs() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    for build, what in (
        (wider, "differ in 0.bias, 0.weight, 3.weight"),
        (other_types, "of other types"),
        (other_sums, "outputs differ"),
        (other_inputs, "must take inputs"),
    ):
        with pytest.raises(FingerprintError, match=what):
            file.network(build)
    assert isinstance(file.network(small_net), nn.Module)


def test_what_no_file_can_hold_is_refused() -> None:
    module = small_net()
    module.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedLayerError, match="phase is complex64"):
        personal_bytes(module)
    with pytest.raises(UnsupportedLayerError, match="nothing to mask"):
        personal_bytes(nn.ReLU())


@pytest.mark.slow
def test_another_process_reads_the_same_bits(tmp_path: Path) -> None:
    module = baked(AlexNetCifarNarrow, init="signed-constant")
    save_personal(module, tmp_path / "a.mask", origin=SMALL, input_shape=(2, 3, 32, 32))
    code = (
        "import sys, torch\ntorch.set_num_threads(1)\n"
        "from flower_mcepl import load_personal\n"
        "from flower_mcepl.models import AlexNetCifar\n"
        "from flower_mcepl.personal.probe import probe_input\n"
        "n = load_personal(sys.argv[1], lambda: AlexNetCifar(width=0.1))\n"
        "print(n(probe_input((2, 3, 32, 32))).numpy().tobytes().hex())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.mask")],
        capture_output=True,
        text=True,
        check=True,
    )
    with torch.no_grad():
        outputs = module(probe_input((2, 3, 32, 32)))
    known = np.frombuffer(bytes.fromhex(result.stdout.strip()), np.float32)
    assert torch.equal(torch.from_numpy(known.copy()).view(2, 10), outputs)


# --- damage ---

GOOD = {
    init: personal_bytes(
        baked(noisy_net, init=init), origin=SMALL, input_shape=(3, *SHAPE[1:]), facts={"agent": 1}
    )
    for init in ("module", "signed-constant")
}
GOOD["gates"] = personal_bytes(baked(noisy_net, filters={"0.weight": 0.5}), origin=SMALL)


@pytest.mark.parametrize("init", [*GOOD])
def test_any_flipped_byte_shows(init: str) -> None:
    data = GOOD[init]
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        with pytest.raises(StateError, match=r"damaged.*Use another copy"):
            opened(bytes(broken), where="x")


@pytest.mark.parametrize("init", [*GOOD])
def test_any_cut_shows(init: str, tmp_path: Path) -> None:
    data = GOOD[init]
    for length in range(len(data)):
        with pytest.raises(StateError, match="damaged"):
            opened(data[:length], where="x")
    for longer in (data + b"\0", b"\0" + data, data + data):
        with pytest.raises(StateError, match="damaged"):
            opened(longer, where="x")
    with pytest.raises(StateError, match="cannot be read"):
        read_personal(tmp_path / "none.mask")


def forged(data: bytes) -> bytes:
    """The bytes with a checksum that is right again."""
    return data[:-16] + checksum(data[:-16])


@st.composite
def edits(draw: st.DrawFn) -> bytes:
    """A file with a right checksum and one to four edits."""
    data = bytearray(GOOD[draw(st.sampled_from([*GOOD]))])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(8, len(data) - 17))
        how = draw(st.sampled_from(["byte", "ones", "insert", "delete"]))
        if how == "byte":
            data[place] = draw(st.integers(0, 255))
        elif how == "ones":
            data[place : place + 4] = b"\xff" * 4
        elif how == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        else:
            del data[place : place + draw(st.integers(1, 9))]
    return forged(bytes(data))


@given(edits())
def test_a_forged_file_is_refused_or_has_the_same_weights(data: bytes) -> None:
    """Whatever stands in it; its facts alone may be others."""
    known = [opened(good, where="x").tensors for good in GOOD.values()]
    try:
        file = opened(data, where="x")
        network = file.network(noisy_net)
    except FlowerMceplError:
        return
    tensors = named_tensors(network)
    assert any(all(same(tensors[name], t) for name, t in good.items()) for good in known)


def with_line(**changes: int) -> bytes:
    """A file of one conv layer whose one line was edited, right checksum."""
    data = bytearray(personal_bytes(baked(one_layer, init="signed-constant"), origin=SMALL))
    facts = HEADER.unpack_from(data)[4]
    line = HEADER.size + facts
    at = {"shape": line + 2 + 6 + 3, "skip": line + 2 + 6 + 3 + 4 * 2 + 8 + 4}
    for field, value in changes.items():
        form = "<I" if field == "shape" else "<Q"
        struct.pack_into(form, data, at[field], value)
    return forged(bytes(data))


def one_layer() -> nn.Module:
    return nn.Linear(20, 10, bias=False)


@pytest.mark.parametrize(
    "changes", [{"shape": 2**32 - 1}, {"skip": 2**63}, {"skip": MAX_WORDS}, {"shape": 2**28}]
)
def test_sizes_are_bounded_before_anything_is_allocated(changes: dict[str, int]) -> None:
    assert opened(with_line(), where="x").masks["weight"].shape == (10, 20)
    with pytest.raises(StateError, match="declares more than fits"):
        opened(with_line(**changes), where="x")


def test_a_vast_tensor_without_elements_is_refused() -> None:
    entry = Entry("w", "float32", (0, 2**31, 2**31, 2**31), RAW)
    with pytest.raises(StateError, match="declares more than fits"):
        split(join(Parts({}, [entry], b"", b"", bytes(16))), where="x")


def test_a_newer_version_says_so() -> None:
    data = bytearray(GOOD["module"])
    data[8] = 3
    with pytest.raises(StateError, match=r"format version 3; .* reads versions 1 to 2"):
        opened(forged(bytes(data)), where="x")
