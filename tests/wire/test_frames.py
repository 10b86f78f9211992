import hashlib
import re
import struct
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import errors
from flower_mcepl.wire import (
    PRECISIONS,
    WIRE_VERSION,
    LayerEntry,
    Prior,
    Reference,
    decode_frame,
    encode_frame,
    read_header,
    write_frame,
)
from flower_mcepl.wire.layout import model_digest, varint
from flower_mcepl.wire.support import ALONE, DELTA, PACKED
from flower_mcepl.wire.values import BUILT_IN
from tests.oracles import frames as oracle

quick = settings(deadline=None, max_examples=60)

FINGERPRINT = "000102030405060708090a0b0c0d0e0f"
BITS = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
TENSORS = {"a": BITS, "b": torch.tensor(-1.5)}
# The test vectors of docs/wire-format.md. If one changes, WIRE_VERSION must change,
# too.
GOLDEN = bytes.fromhex(
    "4d43504c 04 01 0200 03000000 07000000 ffffffff 1a0dfd3752b8319b 875c70b67439ddbe 59000000"
    "000102030405060708090a0b0c0d0e0f 0100 61 02 03000000 03000000 0100 62 00"
    "08 01 00 b180 0000c0bf 407833930628c39a"
)
GOLDEN_DELTA = bytes.fromhex(
    "4d43504c 04 00 0100 03000000 07000000 06000000 ed8bf705e822adf8 5d93b99a11ac9b56 37000000"
    "78 03 04 7cf00bfb 3cc563410934c928"
)
GOLDEN_DIFFERENCES = bytes.fromhex(
    "4d43504c 04 00 0100 03000000 07000000 06000000 c52d60466914d5f3 3bc67e4362dabef8 39000000"
    "05 00 0402813b 7fc000 3eb0d24c65940112"
)
GOLDEN_NAMED = bytes.fromhex(
    "4d43504c 04 01 0100 03000000 07000000 ffffffff c52d60466914d5f3 7bb5ce911602cc8e 53000000"
    "000102030405060708090a0b0c0d0e0f 0100 76 01 03000000"
    "07 05 6279746573 00 01fe03 cae8241cd2235255"
)
DESCRIPTION, LINES, PAYLOAD = 40, 72, 75  # where they begin in GOLDEN


def mask_of(numel: int, *on: int) -> Tensor:
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[list(on)] = True
    return mask


RUN = "00112233445566ff"
LAST, NEW = {"w": mask_of(24, 3, 10, 19, 22)}, {"w": mask_of(24, 3, 8, 10, 19, 20)}
SIX = Reference(6, LAST, {"w": np.array([22])})
CLASSES = Prior({"w": torch.tensor([0] * 19 + [1] * 5, dtype=torch.uint8)})
DELTA_KNOWN: dict[str, Any] = {"layers": {"w": (24,)}, "references": [SIX], "prior": CLASSES}
VALUES = Reference(6, {"v": torch.tensor([1.0, -2.0, 0.5])})
VALUES_KNOWN: dict[str, Any] = {"layers": {"v": (3,)}, "references": [VALUES]}


def encode(tensors: Mapping[str, Tensor], *, sender: int = 3, round: int = 7, **how: Any) -> bytes:
    return encode_frame(tensors, sender=sender, round=round, fingerprint=FINGERPRINT, **how)


def sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=8).digest()


def forged(frame: bytes, at: int, new: bytes) -> bytes:
    """Overwrite some bytes and give the frame a good checksum again."""
    return sealed(frame[:at] + new + frame[at + len(new) : -8])


def replaced(frame: bytes, begin: int, end: int, new: bytes) -> bytes:
    """Replace some bytes by any others, with a good length and checksum again."""
    body = frame[:begin] + new + frame[end:-8]
    return sealed(body[:36] + struct.pack("<I", len(body) + 8) + body[40:])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def is_same(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.layout != right.layout:
        return False
    if left.layout is torch.sparse_coo:
        return torch.equal(left.indices(), right.indices()) and torch.equal(
            left.values(), right.values()
        )
    return torch.equal(left, right)


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert is_same(tensor, right[name]), name


def sparse_of(mask: Tensor, values: Tensor) -> Tensor:
    """Values where the mask is on; zeros among them count."""
    return torch.sparse_coo_tensor(
        mask.nonzero().t(), values[mask], mask.shape, check_invariants=True
    ).coalesce()


# ---- what agents send ----------------------------------------------------------------

MASK, FLOATS, SPARSE = range(3)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
shapes = st.one_of(
    st.lists(st.integers(0, 6), max_size=3).map(tuple),
    st.sampled_from([(1,), (8,), (300,), (17, 16)]),
)
densities = st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
rates = st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0])


@dataclass(frozen=True)
class Case:
    """A payload, what sender and receiver know, and the same in the oracle's words."""

    tensors: dict[str, Tensor]
    reference: Reference | None
    labels: dict[str, Tensor] | None
    precision: str

    @property
    def prior(self) -> Prior | None:
        return None if self.labels is None else Prior(self.labels)

    def decode(self, data: bytes) -> dict[str, Tensor]:
        return decode_frame(
            data,
            fingerprint=FINGERPRINT,
            layers=shapes_of(self.tensors),
            sender=3,
            latest_round=7,
            references=[Reference(5, {}), *([self.reference] if self.reference else [])],
            prior=self.prior,
        ).tensors

    def plain(self) -> dict[str, oracle.Layer]:
        return {name: plain(tensor, self.precision) for name, tensor in self.tensors.items()}

    def plain_reference(self) -> oracle.Reference | None:
        if self.reference is None:
            return None
        bits = {
            name: plain(tensor, "float32").bits for name, tensor in self.reference.tensors.items()
        }
        flips = {name: flips.tolist() for name, flips in self.reference.flips.items()}
        values = {
            name: tensor.flatten().tolist()
            for name, tensor in self.reference.tensors.items()
            if bits[name] is None and tensor.shape == self.tensors[name].shape
        }
        return oracle.Reference(
            self.reference.round, {n: b for n, b in bits.items() if b is not None}, flips, values
        )

    def rows_are_off(self, name: str) -> bool:
        """Whether its gates turn off some rows, not all, and it keeps nothing there."""
        mask, gates = self.tensors[name], self.tensors[f"{name}:filters"]
        some = bool(gates.any()) and not gates.all()
        return some and mask.dtype == torch.bool and not mask[~gates].any()

    def plain_classes(self) -> dict[str, list[int]] | None:
        return (
            None
            if self.labels is None
            else {n: label.flatten().tolist() for n, label in self.labels.items()}
        )


def plain(tensor: Tensor, precision: str) -> oracle.Layer:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bool:
        return oracle.Layer(shape, tensor.flatten().int().tolist())
    if tensor.layout is torch.strided:
        return oracle.Layer(shape, None, tensor.flatten().tolist(), precision)
    on = torch.sparse_coo_tensor(
        tensor.indices(), torch.ones(len(tensor.values())), shape, check_invariants=True
    )
    return oracle.Layer(
        shape, on.to_dense().flatten().int().tolist(), tensor.values().tolist(), precision
    )


def tensor_of(layer: oracle.Layer) -> Tensor:
    values = None if layer.values is None else torch.tensor(layer.values, dtype=torch.float32)
    if layer.bits is None:
        assert values is not None
        return values.reshape(layer.shape)
    mask = torch.tensor(layer.bits, dtype=torch.bool).reshape(layer.shape)
    if values is None:
        return mask
    return torch.sparse_coo_tensor(
        mask.nonzero().t(), values, layer.shape, is_coalesced=True, check_invariants=True
    )


OF_DIFFERENCES = [name for name, codec in PRECISIONS.items() if codec.of_differences]


@st.composite
def cases(
    draw: st.DrawFn, precisions: Sequence[str] = (*PRECISIONS,), *, known: bool = False
) -> Case:
    """``known``: there is a reference, and most likely one of use."""
    precision = draw(st.sampled_from(precisions))
    of_differences = PRECISIONS[precision].of_differences  # for dense layers alone
    kinds = [FLOATS, FLOATS, MASK] if of_differences else [MASK, MASK, FLOATS, SPARSE]
    layers = draw(
        st.dictionaries(
            names, st.tuples(shapes, st.sampled_from(kinds)), min_size=int(known), max_size=3
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random_mask(shape: tuple[int, ...], density: float) -> Tensor:
        return torch.rand(shape, generator=generator) < density

    tensors, last, flips, labels = {}, {}, {}, {}
    for name, (shape, kind) in layers.items():
        old = random_mask(shape, draw(densities))
        mask = old ^ random_mask(shape, draw(rates))
        values = torch.randn(shape, generator=generator)
        tensors[name] = (mask, values, sparse_of(mask, values))[kind]
        if kind != FLOATS and draw(st.integers(0, 5)):
            last[name] = old if draw(st.booleans()) else sparse_of(old, values)
            if draw(st.booleans()):
                flips[name] = np.flatnonzero(random_mask(shape, draw(rates)).flatten().numpy())
        if kind == FLOATS and draw(st.integers(0, 5)):
            near = values - draw(st.sampled_from([0.0, 1e-3, 1.0])) * torch.randn(
                shape, generator=generator
            )
            last[name] = draw(
                st.sampled_from([*[near] * 6, near.reshape(1, *shape), old, sparse_of(old, near)])
            )
        labels[name] = torch.randint(
            0, draw(st.sampled_from([1, 3, 9])), shape, generator=generator
        ).to(torch.uint8)
    for name in [name for name in tensors if draw(st.integers(0, 2))]:
        mask, gates = tensors[name], f"{name}:filters"
        if mask.dtype == torch.bool and mask.dim():  # two-level masks, or nearly so
            tensors[gates] = random_mask(mask.shape[:1], draw(densities))
            if draw(st.integers(0, 5)):
                mask[~tensors[gates]] = False
            if draw(st.booleans()):
                last[gates] = tensors[gates] ^ random_mask(mask.shape[:1], draw(rates))
            labels[gates] = torch.zeros(mask.shape[:1], dtype=torch.uint8)
    reference = (
        Reference(draw(st.sampled_from([0, 6])), last, flips)
        if known or draw(st.booleans())
        else None
    )
    return Case(tensors, reference, labels if draw(st.booleans()) else None, precision)


all_cases = st.one_of(cases(), cases(OF_DIFFERENCES, known=True))


# ---- what comes out is what went in --------------------------------------------------


@quick
@given(case=all_cases, packed=st.booleans())
def test_round_trip_and_bytes_of_the_oracle(case: Case, packed: bool) -> None:
    written = write_frame(
        case.tensors,
        sender=3,
        round=7,
        fingerprint=FINGERPRINT,
        reference=case.reference,
        prior=case.prior,
        precision=case.precision,
        packed=packed,
    )
    came = case.decode(written.data)
    layers = oracle.decode(
        written.data,
        shapes=shapes_of(case.tensors),
        reference=case.plain_reference(),
        classes=case.plain_classes(),
    )
    assert_same(came, {name: tensor_of(layer) for name, layer in layers.items()})
    of_differences = PRECISIONS[case.precision].of_differences
    assert_same(
        written.decoded,
        {n: t for n, t in came.items() if t.dtype != torch.bool} if of_differences else {},
    )
    if case.precision == "float32":
        assert_same(came, case.tensors)
    header = read_header(written.data, shapes_of(case.tensors))
    tellings = {
        str(entry.name): oracle.Telling(
            entry.kind, entry.with_classes, entry.with_recent, entry.among_live
        )
        for entry in header.layers
    }
    again = oracle.encode(
        case.plain(),
        tellings,
        sender=3,
        round=7,
        fingerprint=FINGERPRINT,
        reference=case.plain_reference(),
        classes=case.plain_classes(),
    )
    assert again == written.data
    assert (header.reference, header.content, header.header_bytes) == (
        written.reference,
        written.content,
        written.header_bytes,
    )


@quick
@given(case=all_cases, data=st.data())
def test_frames_of_the_oracle_coded_in_any_way_are_read(case: Case, data: st.DataObject) -> None:
    reference = case.plain_reference()
    tellings = {}
    for name in case.tensors:
        known = reference is not None and name in reference.bits
        kind = data.draw(st.sampled_from([PACKED, ALONE, *([DELTA] * 3 if known else [])]))
        with_recent = (
            kind == DELTA
            and reference is not None
            and name in reference.flips
            and data.draw(st.booleans())
        )
        with_classes = kind != PACKED and case.labels is not None and data.draw(st.booleans())
        among_live = (
            kind != PACKED and f"{name}:filters" in case.tensors and case.rows_are_off(name)
        )
        tellings[name] = oracle.Telling(
            kind, with_classes, with_recent, among_live and data.draw(st.booleans())
        )
    frame = oracle.encode(
        case.plain(),
        tellings,
        sender=3,
        round=7,
        fingerprint=FINGERPRINT,
        reference=reference,
        classes=case.plain_classes(),
    )
    came = case.decode(frame)
    wanted = oracle.decode(
        frame, shapes=shapes_of(case.tensors), reference=reference, classes=case.plain_classes()
    )
    assert_same(came, {name: tensor_of(layer) for name, layer in wanted.items()})


def test_golden_frame_never_drifts() -> None:
    assert encode(TENSORS, packed=True) == GOLDEN
    assert_same(decode_frame(GOLDEN).tensors, TENSORS)
    header = read_header(GOLDEN)
    assert (header.version, header.sender, header.round, header.reference) == (4, 3, 7, None)
    assert (header.model, header.content) == ("1a0dfd3752b8319b", "81814013501d2537")
    assert (header.fingerprint, header.total, header.coded_bytes, header.header_bytes) == (
        FINGERPRINT,
        89,
        0,
        83,
    )
    assert header.layers == (
        LayerEntry("a", (3, 3), PACKED, None),
        LayerEntry("b", (), 0, PRECISIONS["float32"]),
    )


def test_golden_delta_frame_never_drifts() -> None:
    written = write_frame(
        NEW, sender=3, round=7, fingerprint=FINGERPRINT, reference=SIX, prior=CLASSES
    )
    assert written.data == GOLDEN_DELTA
    assert written.flips["w"].tolist() == [8, 20, 22]
    frame = decode_frame(GOLDEN_DELTA, fingerprint=FINGERPRINT, **DELTA_KNOWN)
    assert_same(frame.tensors, NEW)
    assert frame.flips["w"].tolist() == [8, 20, 22]
    assert frame.header.layers == (
        LayerEntry("w", (24,), DELTA, None, with_classes=True, with_recent=True, num_listed=3),
    )
    assert frame.as_reference().round == 7


def test_golden_frame_of_differences_never_drifts() -> None:
    new = {"v": torch.tensor([1.5, -2.25, 0.5])}
    written = write_frame(
        new,
        sender=3,
        round=7,
        fingerprint=FINGERPRINT,
        reference=VALUES,
        precision="int8-differences",
    )
    assert written.data == GOLDEN_DIFFERENCES
    assert written.reference == 6
    frame = decode_frame(GOLDEN_DIFFERENCES, fingerprint=FINGERPRINT, **VALUES_KNOWN)
    came = {"v": torch.tensor([1.5, -2.2519684, 0.5])}
    assert_same(frame.tensors, came)
    assert_same(written.decoded, came)
    assert frame.header.layers == (LayerEntry("v", (3,), 0, PRECISIONS["int8-differences"]),)
    assert VALUES.tensors["v"].tolist() == [1.0, -2.0, 0.5]


def test_the_page_shows_the_same_bytes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text()
    blocks = [
        block for block in page.split("```") if "magic" in block and "checksum of bytes" in block
    ]
    frames = []
    for block in blocks:
        frame = b""
        for line in block.strip().splitlines():
            offset, octets = re.fullmatch(r" *(\d+)  ((?:[0-9a-f]{2} )+) +\S.*", line).groups()  # type: ignore[union-attr]
            assert int(offset) == len(frame)
            frame += bytes.fromhex(octets)
        frames.append(frame)
    assert frames == [GOLDEN, GOLDEN_DELTA, GOLDEN_DIFFERENCES, GOLDEN_NAMED]
    prose = " ".join(page.split())
    for frame, payload, content in (
        (GOLDEN, 75, "b1 80 01 00 00 c0 bf"),
        (GOLDEN_DELTA, 43, "10 a0 18"),
        (GOLDEN_DIFFERENCES, 42, "01 00 00 c0 3f 40 20 10 c0 00 00 00 3f"),
        (GOLDEN_NAMED, 72, "07 05 62 79 74 65 73 01 fe 03"),
    ):
        digest = oracle.blake(bytes.fromhex(content))
        around = oracle.blake(frame[:28] + frame[36:payload])
        assert frame[28:36] == oracle.exclusive_or(digest, around)
        assert f"that of `{content}`, which is `{digest.hex(' ')}`" in prose
        assert f"which is `{around.hex(' ')}`" in prose
    assert GOLDEN[20:28] == oracle.blake(bytes(8) + GOLDEN[40:72])
    classes = oracle.blake(bytes.fromhex("7700 1800000000000000" + 19 * "00" + 5 * "01"))
    assert classes.hex(" ") in prose
    described = FINGERPRINT + "01007701 18000000"
    assert bytes.fromhex(described).hex(" ") in prose
    assert GOLDEN_DELTA[20:28] == oracle.blake(bytes(8) + bytes.fromhex(described) + classes)


def test_golden_symbols_are_those_of_the_page() -> None:
    symbols: list[tuple[int, int]] = []
    groups = oracle.sort_weights(24, LAST["w"].int().tolist(), [22], [0] * 19 + [1] * 5)
    oracle.write_positions(
        lambda *symbol: symbols.append(symbol), [[int(k in (8, 20, 22)) for k in g] for g in groups]
    )
    assert [len(group) for group in groups] == [0, 1, 17, 2, 3, 1]
    counts = [
        (1, 1677721),
        (1, 6790777),
        (0, 5304830),
        (0, 2796202),
        (0, 645277),
        (1, 3595117),
        (0, 1161499),
    ]
    gap = [(1, 8134407), (1, 7880673), (1, 7376450), (0, 6393341), (0, 4611749)]
    assert symbols == [*counts, (0, 1677721), *gap, (1, 5592405), (0, 5592405), (0, 5592405)]


def test_bytes_do_not_depend_on_order_layout_or_gradient() -> None:
    assert encode(dict(reversed(TENSORS.items())), packed=True) == GOLDEN
    scattered = {
        "a": BITS.t().contiguous().t(),
        "b": torch.tensor([-1.5, 9.0], requires_grad=True)[0],
    }
    assert not scattered["a"].is_contiguous()
    assert encode(scattered, packed=True) == GOLDEN
    sloppy_true = {"a": torch.tensor([2, 0, 255], dtype=torch.uint8).view(torch.bool)}
    clean_true = {"a": torch.tensor([True, False, True])}
    assert encode(sloppy_true) == encode(clean_true)
    assert encode(sloppy_true, reference=Reference(1, clean_true)) == encode(
        clean_true, reference=Reference(1, sloppy_true)
    )


def test_order_of_reference_and_classes_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    last = {name: torch.rand(200, generator=generator) < 0.3 for name in "abc"}
    new = {
        name: mask ^ (torch.rand(200, generator=generator) < 0.03) for name, mask in last.items()
    }
    labels = {name: torch.arange(200).to(torch.uint8) % 4 for name in "abc"}
    flips = {name: np.arange(5) for name in "abc"}
    back = {
        name: dict(reversed(mapping.items()))
        for name, mapping in (("l", last), ("f", flips), ("p", labels))
    }
    assert encode(new, reference=Reference(1, last, flips), prior=Prior(labels)) == encode(
        dict(reversed(new.items())),
        reference=Reference(1, back["l"], back["f"]),
        prior=Prior(back["p"]),
    )


def test_scalars_empty_layers_and_no_layers() -> None:
    none = torch.zeros(0)
    tensors = {
        "": torch.tensor(True),
        "none": torch.zeros(0, 5),
        "wide": torch.zeros(2, 0, dtype=torch.bool),
        "sparse": sparse_of(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0)),
        "off": torch.sparse_coo_tensor(
            torch.zeros(0, 0, dtype=torch.long), none, (), check_invariants=True
        ).coalesce(),
        "on": sparse_of(torch.tensor(True), torch.tensor(2.5)),
    }
    for packed in (False, True):
        assert_same(decode_frame(encode(tensors, packed=packed)).tensors, tensors)
        assert decode_frame(encode({}, packed=packed)).tensors == {}
    again = decode_frame(
        encode(tensors, reference=Reference(0, tensors)), references=[Reference(0, tensors)]
    )
    assert_same(again.tensors, tensors)


def test_floats_keep_every_bit() -> None:
    odd = torch.tensor(
        [0x7FC00123, -0x80000000, 0x00000001, 0x7F800000, 0x7F800001], dtype=torch.int32
    )
    came = decode_frame(encode({"w": odd.view(torch.float32)})).tensors["w"]
    assert torch.equal(came.view(torch.int32), odd)  # NaN -0 tiny inf and a signaling NaN


def test_halves_and_bytes_round_as_torch_does() -> None:
    values = torch.cat(
        [
            torch.randn(500, generator=torch.Generator().manual_seed(1)) * 10.0**e
            for e in range(-9, 9)
        ]
    )
    for precision, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        came = decode_frame(encode({"w": values}, precision=precision)).tensors["w"]
        assert came.dtype == torch.float32
        assert torch.equal(came, values.to(dtype).float())
        assert torch.equal(
            decode_frame(encode({"w": values.to(dtype)}, precision=precision)).tensors["w"], came
        )
    came = decode_frame(encode({"w": values}, precision="int8")).tensors["w"]
    assert (came - values).abs().max() <= 0.501 * values.abs().max() / 127
    for flat in (torch.zeros(5), torch.full((5,), 1e-45), torch.zeros(0)):
        assert not decode_frame(encode({"w": flat}, precision="int8")).tensors["w"].any()


@quick
@given(
    numel=st.integers(2, 300),
    weight=st.sampled_from([1e-20, 1.0, 1e20]),
    change=st.sampled_from([0.0, 1e-45, 1e-9, 0.01, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_differences_miss_by_half_a_step_of_the_largest_change(
    numel: int, weight: float, change: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = weight * torch.randn(numel, generator=generator)
    values = base + change * weight * torch.randn(numel, generator=generator)
    known = Reference(6, {"w": base})
    frame = encode({"w": values}, reference=known, precision="int8-differences")
    came = decode_frame(frame, layers={"w": (numel,)}, references=[known]).tensors["w"].double()
    step = (values - base).abs().max().double() / 127
    rounding = 2.0**-22 * (values.abs() + base.abs()).double() + 1e-42
    assert bool(((came - values.double()).abs() <= step / 2 + rounding).all())
    assert len(frame) == 40 + 2 + 4 + numel + 8


def test_what_has_no_base_travels_whole_and_exact() -> None:
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    useless = [
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(2, 3).bool(),
        sparse_of(torch.ones(2, 3) > 0, values),
    ]
    for reference in (None, Reference(6, {}), *(Reference(6, {"w": tensor}) for tensor in useless)):
        frame = encode({"w": values}, reference=reference, precision="int8-differences")
        header = read_header(frame)
        assert (header.reference, header.layers[0].precision) == (None, PRECISIONS["float32"])
        assert frame == encode({"w": values})


def test_one_weight_is_as_short_as_it_is_exact() -> None:
    values = {
        "all": torch.tensor([0.1, 0.2]),
        "one": torch.tensor([0.3]),
        "none": torch.zeros(0, 2),
    }
    known = Reference(6, {name: torch.zeros_like(tensor) for name, tensor in values.items()})
    frame = encode(values, reference=known, precision="int8-differences")
    frame_read = decode_frame(frame, layers=shapes_of(values), references=[known])
    codecs = {
        str(layer.name): layer.precision.name
        for layer in frame_read.header.layers
        if layer.precision
    }
    assert codecs == {"all": "int8-differences", "none": "float32", "one": "float32"}
    assert frame_read.tensors["one"].tolist() == values["one"].tolist()


def test_packing_the_masks_leaves_the_differences_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(400, generator=generator) < 0.5  # nothing to gain from the reference
    known = Reference(6, {"m": random.roll(1), "w": torch.zeros(50)})
    new = {"m": random, "w": torch.randn(50, generator=generator)}
    frames = [
        encode(new, reference=known, precision="int8-differences", packed=packed)
        for packed in (False, True)
    ]
    assert frames[0] == frames[1]
    header = read_header(frames[0], shapes_of(new))
    assert (header.reference, header.layers[0].kind) == (6, PACKED)
    assert torch.equal(
        decode_frame(frames[0], layers=shapes_of(new), references=[known]).tensors["m"], random
    )


def test_the_content_of_differences_is_that_of_the_values_they_give() -> None:
    written = write_frame(
        {"v": torch.tensor([1.5, -2.25, 0.5])},
        sender=3,
        round=7,
        fingerprint=FINGERPRINT,
        reference=VALUES,
        precision="int8-differences",
    )
    exact = write_frame(written.decoded, sender=3, round=7, fingerprint=FINGERPRINT)
    assert exact.content == written.content
    assert_same(decode_frame(exact.data).tensors, written.decoded)
    assert exact.decoded == {}


def test_against_another_base_differences_ask_for_a_whole_frame() -> None:
    for base, reason in (
        (torch.tensor([1.0, -2.0, 0.75]), "it decodes to something else than was encoded"),
        (
            torch.tensor([1.0, -2.0]),
            "'v' the receiver does not know its values of an earlier round",
        ),
        (torch.ones(3).bool(), "'v' the receiver does not know its values of an earlier round"),
        (None, "'v' the receiver does not know its values of an earlier round"),
    ):
        reference = Reference(6, {} if base is None else {"v": base})
        with pytest.raises(errors.MissingReferenceError, match=reason):
            decode_frame(GOLDEN_DIFFERENCES, layers={"v": (3,)}, references=[reference])
    with pytest.raises(
        errors.MissingReferenceError, match=r"builds on round 6, and the rounds held .* are: 5"
    ):
        decode_frame(
            GOLDEN_DIFFERENCES, layers={"v": (3,)}, references=[Reference(5, VALUES.tensors)]
        )


def test_odd_differences_are_refused_without_a_crash() -> None:
    for scale in (float("nan"), float("inf"), -1.0, 3e38, 0.0):
        with pytest.raises(errors.MissingReferenceError, match="something else"):
            decode_frame(forged(GOLDEN_DIFFERENCES, 42, struct.pack("<f", scale)), **VALUES_KNOWN)
    with pytest.raises(
        errors.CorruptFrameError, match="builds on another frame, but the header names none"
    ):
        decode_frame(forged(GOLDEN_DIFFERENCES, 16, b"\xff\xff\xff\xff"), **VALUES_KNOWN)


def test_halves_that_are_no_numbers_travel_without_a_warning() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    for precision in ("float16", "bfloat16"):
        came = decode_frame(encode({"w": odd}, precision=precision)).tensors["w"]
        assert came[0].isnan()
        assert came[1:3].tolist() == [float("inf"), -float("inf")]
    signaling = replaced(encode({"w": torch.zeros(1)}, precision="float16"), -10, -8, b"\x01\x7c")
    with pytest.raises(errors.CorruptFrameError, match="something else"):
        decode_frame(signaling)


def test_tensors_are_writable_and_their_own() -> None:
    data = bytearray(GOLDEN)
    tensors = decode_frame(data).tensors
    data[:] = bytes(len(data))
    assert_same(tensors, TENSORS)
    for tensor in tensors.values():
        tensor.zero_()
    assert not tensors["a"].any()
    assert_same(decode_frame(GOLDEN).tensors, TENSORS)
    decode_frame(GOLDEN_DELTA, **DELTA_KNOWN).tensors["w"].zero_()
    assert_same(decode_frame(GOLDEN_DELTA, **DELTA_KNOWN).tensors, NEW)


def test_every_kind_of_buffer() -> None:
    array = np.frombuffer(GOLDEN, np.uint8)
    strided = np.repeat(array, 2)[::2]
    for data in (bytearray(GOLDEN), memoryview(GOLDEN), array, strided, array.reshape(1, -1)):
        assert_same(decode_frame(data).tensors, TENSORS)
    with pytest.raises(errors.ConfigError, match="as they came"):
        decode_frame(memoryview(np.zeros(20)))


# ---- how long frames are -------------------------------------------------------------


@quick
@given(case=all_cases)
def test_never_longer_than_packed_bits(case: Case) -> None:
    packed = encode(case.tensors, packed=True, precision=case.precision)
    best = encode(
        case.tensors, reference=case.reference, prior=case.prior, precision=case.precision
    )
    floats = sum(tensor.dtype != torch.bool for tensor in case.tensors.values())
    names = 0 if case.precision in BUILT_IN else floats * (1 + len(case.precision))
    assert len(best) <= len(packed) + names


@pytest.mark.parametrize("rate", [0.0, 0.0005, 0.005, 0.05, 0.3])
def test_flips_cost_their_entropy(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    last = {"w": torch.rand(300_000, generator=generator) < 0.3}
    new = {"w": last["w"] ^ (torch.rand(300_000, generator=generator) < rate)}
    share = float((last["w"] ^ new["w"]).float().mean())
    entropy = 0.0 if not share else -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    frame = encode(new, reference=Reference(5, last))
    assert len(frame) <= 1.02 * 300_000 / 8 * entropy + 70
    header = read_header(frame, {"w": (300_000,)})
    assert header.layers[0].kind == DELTA
    assert header.header_bytes <= 56


def test_classes_and_recent_flips_pay_where_they_tell_something() -> None:
    generator = torch.Generator().manual_seed(0)
    last = {"w": torch.rand(100_000, generator=generator) < 0.3}
    lively = torch.arange(100_000) < 5_000
    recent = torch.rand(100_000, generator=generator) < 0.01
    flips = torch.rand(100_000, generator=generator) < (0.0005 + 0.1 * lively + 0.3 * recent)
    new = {"w": last["w"] ^ flips}
    prior = Prior({"w": lively.to(torch.uint8)})
    known = Reference(5, last, {"w": np.flatnonzero(recent.numpy())})
    frame = encode(new, reference=known, prior=prior)
    assert len(frame) < 0.8 * len(encode(new, reference=Reference(5, last)))
    entry = read_header(frame, {"w": (100_000,)}).layers[0]
    assert (entry.with_classes, entry.with_recent) == (True, True)
    # more than one in 16 has flipped: no groups of their own
    many = Reference(5, last, {"w": np.arange(10_000)})
    assert not read_header(encode(new, reference=many), {"w": (100_000,)}).layers[0].with_recent


def test_all_on_and_all_off_cost_nothing() -> None:
    for mask in (torch.ones(80_000, dtype=torch.bool), torch.zeros(80_000, dtype=torch.bool)):
        frame = encode({"w": mask})
        assert len(frame) < 80
        assert_same(decode_frame(frame).tensors, {"w": mask})


def test_a_delta_frame_does_not_describe_itself() -> None:
    assert read_header(encode(NEW, reference=Reference(6, LAST))).fingerprint is None
    # a key frame
    assert read_header(encode(NEW, reference=Reference(0, LAST))).fingerprint == FINGERPRINT
    header = read_header(GOLDEN_DELTA)
    assert (header.layers[0].name, header.layers[0].shape, header.layers[0].num_listed) == (
        None,
        None,
        3,
    )
    random = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    far = {"w": random}, Reference(6, {"w": random.roll(1)})  # nothing to gain from the reference
    assert read_header(encode(far[0], reference=far[1])).reference is None


# ---- what cannot be sent -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int64, torch.complex64])
def test_other_types_name_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(errors.ConfigError, match=r"'w'.*\.bool\(\)"):
        encode({"w": torch.zeros(3, dtype=dtype)})


def test_what_does_not_fit_is_a_config_error() -> None:
    uncoalesced = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.ones(2), (3,), check_invariants=True
    )
    hybrid = torch.sparse_coo_tensor(
        torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True
    ).coalesce()
    for tensors in (
        {"w": uncoalesced},
        {"w": hybrid},
        {"w": sparse_of(BITS, torch.ones(3, 3)).bool()},
        {"w": torch.zeros(3, device="meta")},
        {"w" * 2**16: torch.zeros(1)},
        {"\ud800": torch.zeros(1)},
        {"w": torch.zeros([1] * 33)},
        {"w": torch.zeros(0, 2**31, 2**31)},
    ):
        with pytest.raises(errors.ConfigError):
            encode(tensors)
    for sender, round in ((-1, 0), (2**32, 0), (0, -1), (0, 2**32 - 1)):
        with pytest.raises(errors.ConfigError, match=f"lie in 0 to .*; got {sender or round}"):
            encode(TENSORS, sender=sender, round=round)
    for fingerprint in (
        "",
        "ab",
        FINGERPRINT.upper().replace("0", "A"),
        "g" * 32,
        FINGERPRINT + "\n",
    ):
        with pytest.raises(errors.ConfigError, match="hex"):
            encode_frame(TENSORS, sender=0, round=0, fingerprint=fingerprint)
        with pytest.raises(errors.ConfigError, match="hex"):
            decode_frame(GOLDEN, fingerprint=fingerprint)
    with pytest.raises(
        errors.ConfigError,
        match=r"one of float32, float16, bfloat16, int8, int8-differences, .*; got 'fp8'",
    ):
        encode(TENSORS, precision="fp8")
    for value in (float("nan"), float("inf")):
        with pytest.raises(errors.ConfigError, match="int8 needs finite values"):
            encode({"w": torch.tensor([1.0, value])}, precision="int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_differences_must_be_finite(value: float) -> None:
    reference = Reference(6, {"w": torch.tensor([1.0, -3e38])})
    with pytest.raises(errors.ConfigError, match="int8-differences needs finite values"):
        encode({"w": torch.tensor([1.0, value])}, reference=reference, precision="int8-differences")


def test_differences_of_sparse_layers_are_refused_with_the_way_out() -> None:
    for reference in (None, Reference(6, {"w": torch.zeros(3, 3)})):
        with pytest.raises(
            errors.ConfigError, match=r"for dense layers.*'w' is sparse\. Send it with .* int8"
        ):
            encode(
                {"w": sparse_of(BITS, torch.ones(3, 3))},
                reference=reference,
                precision="int8-differences",
            )


def test_classes_must_be_for_the_layer() -> None:
    with pytest.raises(errors.ConfigError, match=r"'w' has torch\.int64"):
        Prior({"w": torch.zeros(24, dtype=torch.int64)})
    with pytest.raises(errors.ConfigError, match="'w' has 24 weights and classes for 7"):
        encode(NEW, prior=Prior({"w": torch.zeros(7, dtype=torch.uint8)}))


# ---- damaged bytes -------------------------------------------------------------------


def test_every_truncation_is_called_truncated() -> None:
    for length in range(len(GOLDEN)):
        with pytest.raises(errors.TruncatedFrameError, match="sent again"):
            decode_frame(GOLDEN[:length])


def test_truncation_names_sender_and_round() -> None:
    with pytest.raises(
        errors.TruncatedFrameError, match="sender 3 in round 7 says 89 bytes and has 80"
    ):
        decode_frame(GOLDEN[:80])


@pytest.mark.parametrize(
    ("good", "known"),
    [(GOLDEN, {}), (GOLDEN_DELTA, DELTA_KNOWN), (GOLDEN_DIFFERENCES, VALUES_KNOWN)],
    ids=["whole", "delta", "differences"],
)
def test_every_flipped_bit_is_refused_by_name(good: bytes, known: dict[str, Any]) -> None:
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        byte = bit // 8
        expected: type[errors.FrameError] = errors.CorruptFrameError
        if byte < 4 or (byte == 4 and 0 < data[4] < WIRE_VERSION):
            expected = errors.ForeignFrameError
        elif byte == 4 and data[4]:
            expected = errors.FutureFrameError
        elif 36 <= byte < 40 and int.from_bytes(data[36:40], "little") > len(data):
            # it says more than came: nobody can tell the two apart
            expected = errors.TruncatedFrameError
        with pytest.raises(expected) as caught:
            decode_frame(data, fingerprint=FINGERPRINT, sender=3, latest_round=7, **known)
        assert type(caught.value) is expected


@quick
@given(data=st.binary(max_size=200), start=st.sampled_from([0, 4, 5, 8, 40, 72]))
def test_garbage_raises_nothing_but_frame_errors(data: bytes, start: int) -> None:
    for candidate in (
        GOLDEN[:start] + data,
        sealed(GOLDEN[:start] + data),
        replaced(GOLDEN, start, 81, data),
    ):
        with pytest.raises(errors.FrameError):
            decode_frame(candidate)


def edited(frame: bytes, edits: Sequence[tuple[int, int]]) -> bytes:
    """Overwrite single bytes and give the frame a good checksum again."""
    body = bytearray(frame[:-8])
    for at, value in edits:
        body[at] = value
    return sealed(bytes(body))


@settings(deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(5, 80), st.integers(0, 255)), min_size=1, max_size=4))
@example(edits=[(60, 10), (64, 1)])
def test_forged_frames_with_a_good_checksum_decode_to_what_was_encoded_or_are_refused(
    edits: list[tuple[int, int]],
) -> None:
    try:
        frame = decode_frame(edited(GOLDEN, edits))
    except errors.FrameError:
        return
    assert_same(frame.tensors, TENSORS)


def test_no_edit_of_a_header_is_taken() -> None:
    """Behind a good checksum, read by someone who expects nothing."""
    references = [Reference(0, {})]
    assert_same(decode_frame(GOLDEN, references=references).tensors, TENSORS)
    taken = []
    for edits in (
        [(60, 10), (64, 1)],  # 9 bits as 10
        [(60, 1), (64, 9)],  # the same bits in another shape
        [(58, ord("A"))],  # another name
        [(16, 0), (17, 0), (18, 0), (19, 0)],  # builds on the first payload
        *([(at, value)] for at in range(5, PAYLOAD) for value in (0, 1, 2, 255)),
    ):
        forgery = edited(GOLDEN, edits)
        try:
            decode_frame(forgery, references=references)
        except errors.FrameError:
            continue
        if forgery != GOLDEN:
            taken.append(edits)
    assert not taken


def test_layers_coded_as_each_other_are_refused() -> None:
    """If all bytes are a 1, a mask and floats have the digest of floats and a mask."""
    ones = torch.from_numpy(np.full(32, 1, np.uint8).view(np.float32).copy())
    frame = encode({"a": mask_of(8, 7), "b": ones}, packed=True)
    assert frame[72:75] == b"\x08\x01\x00"  # a packed, b float32, nothing range-coded
    assert frame[75:-8] == b"\x01" * 33
    with pytest.raises(errors.CorruptFrameError, match="it decodes to something else"):
        decode_frame(edited(frame, [(72, 1), (73, 8)]))


def test_equal_payloads_have_the_content_digest_of_version_2() -> None:
    """`relay.jsonl` records it, so that runs compare across versions."""
    assert read_header(GOLDEN).content == "81814013501d2537"
    assert read_header(GOLDEN_DELTA).content == "97746967517fc18a"
    assert read_header(GOLDEN_DIFFERENCES).content == "f9a8aa0aba1d9f5e"
    elsewhere = write_frame(TENSORS, sender=9, round=1, fingerprint="f" * 32)
    assert elsewhere.content == read_header(elsewhere.data).content == "81814013501d2537"
    values = {"w": torch.tensor([0.5, -1.0, 3.25, 0.0, 1e-3])}
    reference = Reference(1, {"w": torch.zeros(5)})
    contents = {
        precision: write_frame(
            values,
            sender=0,
            round=1,
            fingerprint=FINGERPRINT,
            reference=reference,
            precision=precision,
        ).content
        for precision in PRECISIONS
    }
    assert contents == {
        "float32": "5cab9cc0a91fb655",
        "float16": "aee1eefa5385ffc1",
        "bfloat16": "d3e2a58eb3ef9045",
        "int8": "7c7177d9bf90fd74",
        "int8-differences": "f5d5c4d760c9732b",
        # these came later, under the same rules
        "sign-differences": "9a36d3e1a7a1eb05",
        **{f"top-{share}-differences": "197fbc5649ce6f92" for share in (0.001, 0.01, 0.1)},
    }


def test_nothing_large_is_allocated_for_declared_sizes() -> None:
    huge = struct.pack("<II", 2**31, 2**28)
    claims = (
        forged(GOLDEN, 36, b"\xff\xff\xff\xff"),
        forged(GOLDEN, 60, huge),
        # all off, so that the length is right
        replaced(forged(GOLDEN, 60, huge), LINES, LINES + 1, b"\x10\x00"),
        replaced(forged(GOLDEN, 60, huge), LINES, LINES + 1, b"\x10" + varint(2**59)),
        replaced(
            forged(GOLDEN, 60, struct.pack("<II", 2**12, 2**12)), LINES, LINES + 1, b"\x10\x00"
        ),
        forged(GOLDEN, 6, b"\xff\xff"),
        forged(GOLDEN, 56, b"\xff\xff"),
        forged(GOLDEN, 59, b"\xff"),
        replaced(GOLDEN, 74, 75, b"\xff" * 8 + b"\x7f"),
    )
    tracemalloc.start()
    try:
        for data in claims:
            with pytest.raises((errors.CorruptFrameError, errors.TruncatedFrameError)):
                decode_frame(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_tells_of_many_weights_needs_little_more_memory_than_an_honest_one() -> None:
    generator = torch.Generator().manual_seed(0)
    last = {"w": torch.rand(400_000, generator=generator) < 0.3}
    new = {"w": last["w"] ^ (torch.rand(400_000, generator=generator) < 0.005)}
    known: dict[str, Any] = {"layers": {"w": (400_000,)}, "references": [Reference(6, last)]}
    honest = encode(new, reference=Reference(6, last))
    peaks = []
    for line in (
        honest[40:-8],
        *(b"\x18" + varint(n) + varint(0) for n in (20_000, 25_000, 200_000, 400_000)),
    ):
        data = replaced(honest, 40, len(honest) - 8, line)
        tracemalloc.start()
        try:
            decode_frame(data, **known)
        except errors.FrameError:
            pass
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 4 * peaks[0]


def random_masks(draw: np.random.Generator, share: float) -> dict[str, Tensor]:
    """40 layers of 70,000 weights."""
    return {f"{i:02}": torch.from_numpy(draw.random((700, 100)) < share) for i in range(40)}


def flipped(draw: np.random.Generator, masks: Mapping[str, Tensor], share: float) -> Any:
    return {
        name: mask ^ torch.from_numpy(draw.random(mask.shape) < share)
        for name, mask in masks.items()
    }


def traced_peak(run: Any) -> tuple[Any, int]:
    """What a call returns, and the most bytes that Python and NumPy held during it."""
    tracemalloc.start()
    try:
        return run(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("flips", [None, 0.02, 0.07, 0.5])
def test_a_frame_of_many_layers_needs_at_most_twice_the_memory_of_its_masks(
    share: float, flips: float | None
) -> None:
    """Positions take eight bytes each: those of one layer must go before the next."""
    draw = np.random.default_rng(0)
    masks, reference = random_masks(draw, share), None
    if flips is not None:
        reference = Reference(6, masks)
        masks = random_masks(draw, share) if flips == 0.5 else flipped(draw, masks, flips)
    layers, numel = shapes_of(masks), sum(mask.numel() for mask in masks.values())
    held = [] if reference is None else [reference]
    data, writing = traced_peak(lambda: encode(masks, reference=reference))
    frame, reading = traced_peak(lambda: decode_frame(data, layers=layers, references=held))
    assert_same(frame.tensors, masks)
    # the flips are part of what comes back
    results = sum(flips.nbytes for flips in frame.flips.values())
    assert writing < max(numel, results) + numel
    assert reading < results + 1.75 * numel


def test_strides_of_an_empty_layer_cannot_overflow() -> None:
    layer = struct.pack("<HB4I", 0, 4, 0, *[2**32 - 1] * 3)
    data = replaced(forged(GOLDEN, 6, b"\x01\x00"), 56, 81, layer + b"\x01\x00")
    with pytest.raises(errors.CorruptFrameError, match="impossible shape"):
        decode_frame(data)


@pytest.mark.parametrize(
    ("begin", "end", "new", "reason"),
    [
        (4, 5, b"\x00", "version 0 never existed"),
        (58, 59, b"b", "ascending order"),
        (58, 59, b"c", "ascending order"),
        (58, 59, b"\xff", "layer 0 of its description cannot be read"),
        (56, 58, b"\xff\xff", "layer 0 of its description cannot be read"),
        (60, 68, struct.pack("<II", 2**31, 2**31), "'a' has the impossible shape"),
        (6, 8, b"\x03\x00", "layer 2 of its description cannot be read"),
        (72, 81, b"", "it ends before the line of layer 'a'"),
        (72, 73, b"\x00", "the coding 0x00 of layer 'a' contradicts itself"),
        (72, 73, b"\x28", "the coding 0x28 of layer 'a' contradicts itself"),
        (72, 73, b"\x50\x00", "the coding 0x50 of layer 'a' contradicts itself"),
        (72, 73, b"\x10\x0a", "layer 'a' of 9 weights tells of 10"),
        (72, 73, b"\x09\x0a", "layer 'a' of 9 weights tells of 10"),
        (72, 73, b"\x18\x01", "builds on another frame, but the header names none"),
        (72, 81, b"\x10" + b"\xff" * 9, "a number in its header does not end"),
        (72, 81, b"\x10\x80", "a number in its header does not end"),
        (74, 75, b"\x02", "2 range-coded bytes are no whole words"),
        (74, 75, b"\x08", "8 range-coded bytes are no whole words, or more than there are"),
        (74, 75, b"\x04", "say 10 bytes of payload and 6 are there"),
        (81, 81, b"\x00", "say 6 bytes of payload and 7 are there"),
        (60, 64, b"\x06\x00\x00\x00", "say 7 bytes of payload and 6 are there"),
        (76, 77, b"\x81", "in layer 'a' the 7 padding bits must be zero; the last byte is 0x81"),
        (72, 73, b"\x09\x00", "in layer 'a' 0 values came for 5 weights"),
        (75, 76, b"\xb2", "it decodes to something else than was encoded"),
        (80, 81, b"\xbe", "it decodes to something else than was encoded"),
        (28, 29, b"\x82", "it decodes to something else than was encoded"),
    ],
)
def test_structure_is_checked_behind_the_checksum(
    begin: int, end: int, new: bytes, reason: str
) -> None:
    with pytest.raises(errors.CorruptFrameError, match=reason) as caught:
        decode_frame(replaced(GOLDEN, begin, end, new))
    assert type(caught.value) is errors.CorruptFrameError


def test_trailing_bytes_and_short_totals_are_corrupt() -> None:
    with pytest.raises(errors.CorruptFrameError, match="says 89 bytes and 90 came"):
        decode_frame(GOLDEN + b"\0")
    with pytest.raises(errors.CorruptFrameError, match="says 40 bytes and 40 came"):
        decode_frame(GOLDEN[:36] + struct.pack("<I", 40))


def test_a_whole_frame_whose_range_coded_bits_are_damaged_is_corrupt() -> None:
    mask = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.02
    good = encode({"w": mask})
    header = read_header(good)
    assert header.layers[0].kind == ALONE
    begin = header.header_bytes - 8
    reasons = set()
    for at in range(begin, len(good) - 8):
        with pytest.raises(errors.CorruptFrameError) as caught:
            decode_frame(forged(good, at, bytes([good[at] ^ 0x55])))
        reasons.add(str(caught.value))
    assert any("a position lies beyond its group" in reason for reason in reasons)
    assert any("range-coded bits are left over" in reason for reason in reasons)
    with pytest.raises(errors.CorruptFrameError, match="cannot be read"):
        decode_frame(forged(good, begin, b"\xff" * (len(good) - 8 - begin)))
    more = replaced(good, begin - 1, begin, varint(header.coded_bytes + 8))
    with pytest.raises(errors.CorruptFrameError, match="range-coded bits are left over"):
        decode_frame(replaced(more, len(more) - 8, len(more) - 8, bytes(8)))


def test_content_tells_kinds_and_precisions_apart() -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    half = encode({"w": values}, precision="float16")
    line = read_header(half).header_bytes - 8 - 2
    # the same bytes as other numbers
    with pytest.raises(errors.CorruptFrameError, match="something else"):
        decode_frame(forged(half, line, b"\x03"))
    off = encode({"w": torch.zeros(16, dtype=torch.bool)}, packed=True)
    line = read_header(off).header_bytes - 8 - 2
    # a mask as a sparse layer without values
    with pytest.raises(errors.CorruptFrameError, match="something else"):
        decode_frame(replaced(off, line, line + 1, b"\x09\x00"))


# ---- good frames of someone else -----------------------------------------------------


def test_header_is_checked_like_the_frame() -> None:
    for data, error in (
        (GOLDEN[:-1], errors.TruncatedFrameError),
        (GOLDEN[:-1] + b"\0", errors.CorruptFrameError),
        (b"GET / HTTP/1.1", errors.ForeignFrameError),
        (forged(GOLDEN, 4, b"\x01"), errors.ForeignFrameError),
        (forged(GOLDEN, 4, b"\x02"), errors.ForeignFrameError),
        (forged(GOLDEN, 4, b"\x03"), errors.ForeignFrameError),
        (forged(GOLDEN, 4, b"\x05"), errors.FutureFrameError),
    ):
        with pytest.raises(error):
            read_header(data)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_frames_of_older_versions_are_foreign(version: int) -> None:
    with pytest.raises(
        errors.ForeignFrameError,
        match=rf"frames of version 4; one came of version {version}.*Update .* there",
    ):
        decode_frame(forged(GOLDEN, 4, bytes([version])))


def test_newer_formats_are_future() -> None:
    longer = forged(GOLDEN, 4, bytes([WIRE_VERSION + 1])) + b"another layout"
    for data, what in (
        (longer, "version 5"),
        (GOLDEN[:4] + b"\xff", "version 255"),
        (forged(GOLDEN, 5, b"\x03"), "flags 0x03"),
        (forged(GOLDEN, LINES, b"\x06"), "coding 0x06 in layer 'a'"),
        (forged(GOLDEN, LINES, b"\x0d"), "coding 0x0d in layer 'a'"),  # sparse differences
        (forged(GOLDEN, LINES, b"\x88"), "coding 0x88 in layer 'a'"),
    ):
        with pytest.raises(errors.FutureFrameError, match=f"knows no {what}.*Update"):
            decode_frame(data)


LIKE = {"a": (3, 3), "b": ()}


@pytest.mark.parametrize(
    ("expected", "error", "reason"),
    [
        ({"fingerprint": "f" * 32}, errors.ForeignFrameError, "sender 3 in round 7 carries 0001"),
        ({"sender": 4}, errors.ForeignFrameError, "filed under, 4; this is the frame of sender 3"),
        ({"latest_round": 6}, errors.FutureFrameError, "at most 6; .* sender 3 in round 7"),
        (
            {"layers": {"a": (3, 3)}},
            errors.ForeignFrameError,
            r"'b' has shape \(\) instead of none",
        ),
        (
            {"layers": {"a": (9,), "b": ()}},
            errors.ForeignFrameError,
            r"'a' has shape \(3, 3\) instead of \(9,\)",
        ),
        ({"layers": {**LIKE, "c": (1,)}}, errors.ForeignFrameError, "'c' has shape none"),
        (
            {"dtype": torch.bool},
            errors.ForeignFrameError,
            "torch.bool only; .* has float32 in layer 'b'",
        ),
        (
            {"dtype": torch.float32},
            errors.ForeignFrameError,
            "torch.float32 only; .* has a mask in layer 'a'",
        ),
        (
            {"layers": LIKE, "fingerprint": FINGERPRINT, "prior": CLASSES},
            errors.ForeignFrameError,
            "together [0-9a-f]{16}; .* has 1a0dfd3752b8319b. .*give both agents the same model, "
            "seed and algorithm",
        ),
    ],
)
def test_expectations(expected: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        decode_frame(GOLDEN, **expected)


def test_met_expectations_pass() -> None:
    frame = decode_frame(
        GOLDEN, fingerprint=FINGERPRINT, layers={"b": (), "a": (3, 3)}, sender=3, latest_round=7
    )
    assert_same(frame.tensors, TENSORS)


def test_many_weights_in_few_bytes_need_the_layers() -> None:
    tensors = {"w": torch.zeros(2**21, dtype=torch.bool)}
    data = encode(tensors)
    with pytest.raises(
        errors.CorruptFrameError, match=r"declares 2097152 weights .* pass the layers"
    ):
        decode_frame(data)
    assert_same(decode_frame(data, layers=shapes_of(tensors)).tensors, tensors)


# ---- the wrong reference -------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "error", "reason"),
    [
        (
            {"references": []},
            errors.MissingReferenceError,
            "builds on round 6, and the rounds held .* are: none",
        ),
        (
            {"references": [Reference(4, LAST), Reference(0, LAST)]},
            errors.MissingReferenceError,
            "builds on round 6, and the rounds held of this sender are: 4, 0. The relay sends",
        ),
        (
            {"references": [Reference(6, {})]},
            errors.MissingReferenceError,
            "its mask of an earlier round",
        ),
        (
            {"references": [Reference(6, {"w": LAST["w"].reshape(4, 6)})]},
            errors.MissingReferenceError,
            "its mask of an earlier round",
        ),
        (
            {"references": [Reference(6, LAST)]},
            errors.MissingReferenceError,
            "which of its weights flipped",
        ),
        (
            {"prior": None},
            errors.MissingReferenceError,
            "in layer 'w' .* the classes of its weights",
        ),
        ({"prior": Prior({})}, errors.MissingReferenceError, "the classes of its weights"),
        (
            {"prior": Prior({"w": torch.zeros(7, dtype=torch.uint8)})},
            errors.MissingReferenceError,
            "the classes of its weights",
        ),
        (
            {"prior": None, "fingerprint": FINGERPRINT},
            errors.ForeignFrameError,
            "has ed8bf705e822adf8",
        ),
        (
            {"layers": None},
            errors.ForeignFrameError,
            "does not repeat names and shapes, 1 here; .* with none expected",
        ),
        ({"layers": {"v": (1,), "w": (24,)}}, errors.ForeignFrameError, "read with 2 expected"),
        ({"layers": {"w": (4, 6)}}, errors.MissingReferenceError, "its mask of an earlier round"),
        (
            {"layers": {"w": (4, 6)}, "fingerprint": FINGERPRINT},
            errors.ForeignFrameError,
            "has ed8bf705e822adf8",
        ),
    ],
)
def test_delta_frames_are_refused_without_what_they_build_on(
    known: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        decode_frame(GOLDEN_DELTA, **{**DELTA_KNOWN, **known})
    assert type(caught.value) is error


@pytest.mark.parametrize("weight", range(24))
def test_one_other_bit_in_what_is_known_is_noticed(weight: int) -> None:
    other = {"w": LAST["w"] ^ mask_of(24, weight)}
    for flips in ({"w": np.array([22])}, {"w": np.array([weight])}):
        with pytest.raises(errors.MissingReferenceError, match="sender 3 in round 7 does not fit"):
            decode_frame(
                GOLDEN_DELTA, **{**DELTA_KNOWN, "references": [Reference(6, other, flips)]}
            )


@settings(deadline=None, max_examples=150)
@given(case=all_cases, data=st.data())
def test_what_the_receiver_knows_wrongly_never_gives_another_payload(
    case: Case, data: st.DataObject
) -> None:
    """Other masks, values, flips, classes: refused, or of no consequence."""
    frame = encode(
        case.tensors, reference=case.reference, prior=case.prior, precision=case.precision
    )
    truth = case.decode(frame)
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    reference, labels = case.reference, case.labels
    if reference is not None:
        tensors = {}
        for name, tensor in reference.tensors.items():
            bits = plain(tensor, "float32").bits
            flat = (
                tensor.flatten().clone() if bits is None else torch.tensor(bits, dtype=torch.bool)
            )
            if flat.numel() and data.draw(st.booleans()):
                place = generator.integers(flat.numel())
                flat[place] = ~flat[place] if flat.dtype == torch.bool else 2 * flat[place] + 1
            tensors[name] = flat.reshape(tensor.shape)
        flips = {
            name: np.flatnonzero(generator.random(tensor.numel()) < 0.03)
            if data.draw(st.booleans())
            else listed
            for name, tensor in tensors.items()
            if (listed := reference.flips.get(name)) is not None
        }
        reference = Reference(reference.round, tensors, flips)
    if labels is not None and data.draw(st.booleans()):
        labels = {
            name: torch.from_numpy(generator.permutation(label.flatten().numpy())).reshape(
                label.shape
            )
            for name, label in labels.items()
        }
    try:
        frame_read = decode_frame(
            frame,
            layers=shapes_of(case.tensors),
            references=[] if reference is None else [reference],
            prior=None if labels is None else Prior(labels),
        )
    except errors.FrameError:
        return
    assert_same(frame_read.tensors, truth)


def test_model_digest_covers_weights_layers_and_classes() -> None:
    def model(
        tensors: Mapping[str, Tensor] = NEW,
        fingerprint: str = FINGERPRINT,
        prior: Prior | None = None,
        run: str = "",
    ) -> str:
        return read_header(
            encode_frame(tensors, sender=0, round=1, fingerprint=fingerprint, prior=prior, run=run)
        ).model

    shaped, named = {"w": NEW["w"].reshape(4, 6)}, {"v": NEW["w"]}
    models = [
        model(),
        model(shaped),
        model(named),
        model(fingerprint="f" * 32),
        model(prior=CLASSES),
    ]
    models.append(model(prior=Prior({"w": torch.zeros(24, dtype=torch.uint8)})))
    models.append(model(prior=Prior({})))
    models += [model(run="0" * 15 + "1"), model(run="1" + "0" * 15), model(prior=CLASSES, run=RUN)]
    assert len(set(models)) == len(models)
    description = oracle.describe(FINGERPRINT, {"w": (24,)})
    assert models[0] == model_digest(description, None, "").hex()
    classes = oracle.prior_digest({"w": [0] * 19 + [1] * 5})
    assert models[-1] == oracle.blake(bytes.fromhex(RUN) + description + classes).hex()


def test_a_frame_of_one_run_is_foreign_to_every_other() -> None:
    frame = encode(TENSORS, run=RUN)
    known: dict[str, Any] = {"fingerprint": FINGERPRINT, "layers": LIKE}
    assert_same(decode_frame(frame, **known, run=RUN).tensors, TENSORS)
    assert_same(decode_frame(frame, **known, run=None).tensors, TENSORS)  # asked not to look
    for run in ("", RUN[::-1]):
        with pytest.raises(
            errors.ForeignFrameError, match="It may be of another run; if not, give both"
        ):
            decode_frame(frame, **known, run=run)
    with pytest.raises(errors.ForeignFrameError, match="It may be of another run"):
        decode_frame(encode(TENSORS), **known, run=RUN)
    # the id in the header cannot be edited: what it decodes to is bound to it
    own = read_header(encode(TENSORS, run=RUN[::-1])).model
    with pytest.raises(errors.CorruptFrameError, match="decodes to something else"):
        decode_frame(forged(frame, 20, bytes.fromhex(own)), **known, run=RUN[::-1])
    assert read_header(frame).content == read_header(encode(TENSORS)).content


@pytest.mark.parametrize("run", ["0" * 15, "0" * 17, "F" * 16, "0x" + "0" * 14])
def test_the_id_of_a_run_is_16_hex_digits(run: str) -> None:
    with pytest.raises(errors.ConfigError, match="16 lower-case hex digits, or empty; got"):
        encode(TENSORS, run=run)
    with pytest.raises(errors.ConfigError, match="16 lower-case hex digits, or empty; got"):
        decode_frame(GOLDEN, fingerprint=FINGERPRINT, layers=LIKE, run=run)


def test_content_is_the_same_however_it_is_coded() -> None:
    frames = [
        encode(NEW),
        encode(NEW, packed=True),
        GOLDEN_DELTA,
        encode(NEW, reference=Reference(0, LAST)),
    ]
    assert {read_header(frame, {"w": (24,)}).content for frame in frames} == {"97746967517fc18a"}
