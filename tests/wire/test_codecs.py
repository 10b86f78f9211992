"""Codecs of floats that a package adds: they travel by name, and are not trusted."""

import struct
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_mcepl import Topology, errors, simulate
from flower_mcepl.config.registry import _installed
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.wire import (
    PRECISIONS,
    Codec,
    Reference,
    decode_frame,
    read_header,
    write_frame,
)
from flower_mcepl.wire.layout import bind
from flower_mcepl.wire.values import BUILT_IN, find_precision
from tests.fleet.installed import install, installed
from tests.oracles import frames as oracle
from tests.oracles.baselines import fleet_of
from tests.wire.test_frames import (
    BITS,
    FINGERPRINT,
    GOLDEN,
    GOLDEN_NAMED,
    TENSORS,
    assert_same,
    encode,
    sealed,
    shapes_of,
    sparse_of,
)

PACKAGE = """
import numpy as np
from flower_mcepl.wire import Codec


def pack(values):
    scale = np.float32(np.abs(values).max(initial=0) / 7)
    steps = np.rint(values / scale) if scale else np.zeros_like(values)
    halves = np.pad(steps.astype(np.int8) + 8, (0, len(steps) % 2)).astype(np.uint8)
    return scale.tobytes() + (halves[::2] << 4 | halves[1::2]).tobytes()


def unpack(data, count):
    scale, pairs = np.frombuffer(data[:4], np.float32), np.frombuffer(data[4:], np.uint8)
    halves = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[:count]
    return scale * (halves.astype(np.float32) - 8)


def codec(name, num_bytes=lambda count: 4 + (count + 1) // 2, pack=pack, unpack=unpack, **how):
    return Codec(name=name, num_bytes=num_bytes, pack=pack, unpack=unpack, **how)


INT4 = codec("int4")
DIFFERENCES = codec("int4-differences", of_differences=True)
BYTES = codec(
    "bytes", lambda count: count, lambda values: np.rint(values).astype(np.int8).tobytes(),
    lambda data, count: np.frombuffer(data, np.int8).astype(np.float32),
)


def whole(data, count):
    return np.frombuffer(data, np.float32)


def greedy(values):
    values *= 0
    return values.tobytes()


def late(values):
    raise OSError("no such table")


size = lambda count: 4 * count
IN_PLACE = codec("in-place", size, greedy, whole)
VIEWS = codec("views", size, lambda values: values.tobytes(), whole)
MISNAMED = codec("another")
CRASHES = codec("crashes", size, late)
SHORT = codec("short", size, lambda values: values.tobytes()[1:])
ARRAYS = codec("arrays", size, lambda values: values)
UNSIZED = codec("unsized", lambda count: -1)
HALF = codec("half", lambda count: count / 2)
LOST = codec("lost", lambda count: {}[count])
"""
READS = """
def reads(name, unpack):
    return codec(name, size, lambda values: values.tobytes(), unpack)


DOUBLES = reads("doubles", lambda data, count: np.frombuffer(data, np.float32).astype(np.float64))
FEW = reads("few", lambda data, count: np.zeros(count - 1, np.float32))
FLAT = reads("square", lambda data, count: np.zeros((count, 1), np.float32))
LISTS = reads("lists", lambda data, count: [0.0] * count)
STOPS = reads("stops", lambda data, count: 1 / 0)
NOT_ONE = "a codec"
"""
NAMES = {
    "int4": "INT4",
    "int4-differences": "DIFFERENCES",
    "bytes": "BYTES",
    "in-place": "IN_PLACE",
    "views": "VIEWS",
    "misnamed": "MISNAMED",
    "crashes": "CRASHES",
    "short": "SHORT",
    "arrays": "ARRAYS",
    "unsized": "UNSIZED",
    "half": "HALF",
    "lost": "LOST",
    "doubles": "DOUBLES",
    "few": "FEW",
    "square": "FLAT",
    "lists": "LISTS",
    "stops": "STOPS",
    "not-one": "NOT_ONE",
    "not-there": "NOT_THERE",
}
VALUES = {"v": torch.tensor([1.0, -2.0, 3.4])}


def entry_points(package: str, names: dict[str, str]) -> str:
    lines = [f"{name} = {package}:{attribute}" for name, attribute in names.items()]
    return "[flower_mcepl.codecs]\n" + "\n".join(lines)


def forget() -> None:
    """Look at what is installed anew."""
    _installed.cache_clear()
    PRECISIONS._loaded.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    package = "codecs_of_others"
    install(folder, package, entry_points(package, NAMES), PACKAGE + READS)
    return folder


@pytest.fixture(autouse=True)
def package(folder: Path) -> Iterator[None]:
    with installed(folder, PRECISIONS):
        yield


def plain_pack(values: Any) -> bytes:
    scale = oracle.single(max(map(abs, values), default=0.0) / 7)
    steps = [round(oracle.single(value / scale)) + 8 if scale else 8 for value in values]
    steps += [0] * (len(steps) % 2)
    return struct.pack("<f", scale) + bytes(
        16 * left + right for left, right in zip(steps[::2], steps[1::2], strict=True)
    )


def plain_unpack(data: bytes, count: int) -> list[float]:
    (scale,) = struct.unpack("<f", data[:4])
    halves = [half for byte in data[4:] for half in (byte >> 4, byte & 15)]
    return [oracle.single(scale * (half - 8)) for half in halves[:count]]


@pytest.fixture(scope="module")
def plain() -> Iterator[None]:
    """The same codecs for the second reader."""
    codec = oracle.Codec(lambda count: 4 + (count + 1) // 2, plain_pack, plain_unpack)
    differences = oracle.Codec(codec.num_bytes, plain_pack, plain_unpack, of_differences=True)
    mine = {"int4": codec, "int4-differences": differences}
    oracle.CODECS.update(mine)
    yield
    for name in mine:
        del oracle.CODECS[name]


# ---- they travel by name -------------------------------------------------------------


def test_golden_frame_of_a_named_codec_never_drifts() -> None:
    assert encode(VALUES, precision="bytes") == GOLDEN_NAMED
    assert_same(decode_frame(GOLDEN_NAMED).tensors, {"v": torch.tensor([1.0, -2.0, 3.0])})
    (entry,) = read_header(GOLDEN_NAMED).layers
    assert entry.precision == PRECISIONS["bytes"]
    assert GOLDEN_NAMED[64:72] == b"\x07\x05bytes\x00"


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (3, 4)]),
    sparse=st.booleans(),
    seed=st.integers(0, 999),
    name=st.sampled_from(["int4", "int4-differences"]),
)
def test_round_trip_and_bytes_of_the_oracle(
    plain: None, shape: tuple[int, ...], sparse: bool, seed: int, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    values = torch.randn(shape, generator=generator)
    base = torch.randn(shape, generator=generator)
    sparse = sparse and name == "int4"
    tensors = {"b": mask, "w": sparse_of(mask, values) if sparse else values}
    flat = tensors["w"].values().tolist() if sparse else values.flatten().tolist()
    layers = {
        "b": oracle.Layer(shape, mask.flatten().int().tolist()),
        "w": oracle.Layer(shape, mask.flatten().int().tolist() if sparse else None, flat, name),
    }
    frame = encode(tensors, precision=name, packed=True, reference=Reference(6, {"w": base}))
    known = oracle.Reference(6, {}, {}, {"w": base.flatten().tolist()})
    again = oracle.encode(layers, {}, sender=3, round=7, fingerprint=FINGERPRINT, reference=known)
    assert again == frame
    read = oracle.decode(frame, shapes=shapes_of(tensors), reference=known)["w"]
    came = decode_frame(frame, layers=shapes_of(tensors), references=[Reference(6, {"w": base})])
    assert came.tensors["w"].layout == tensors["w"].layout
    kept = came.tensors["w"].values() if sparse else came.tensors["w"].flatten()
    assert kept.tolist() == read.values
    assert torch.equal(came.tensors["b"], mask)


def test_differences_are_from_what_the_receiver_holds() -> None:
    held, known, round = torch.zeros(50), Reference(0, {"w": torch.zeros(50)}), 1
    target = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for round in range(1, 9):
        written = write_frame(
            {"w": target},
            sender=3,
            round=round,
            fingerprint=FINGERPRINT,
            reference=known,
            precision="int4-differences",
        )
        frame = decode_frame(written.data, layers={"w": (50,)}, references=[known])
        assert_same(frame.tensors, written.decoded)
        held, known = frame.tensors["w"], frame.as_reference()
    assert float((held - target).abs().max()) < 1e-5  # errors of rounding do not add up
    with pytest.raises(errors.ConfigError, match="int4-differences is for dense layers"):
        encode({"w": sparse_of(BITS, torch.ones(3, 3))}, precision="int4-differences")


@pytest.mark.parametrize("precision", ["int4", "int4-differences"])
def test_agents_send_in_it(precision: str) -> None:
    agents = fleet_of("dfedavgm", 3, precision=precision)
    codecs = set()

    def note(round: int, agent: int, reply: Reply) -> None:
        assert not reply.refused
        for frame in reply.frames:
            header = read_header(frame.data, agents[agent].layers)
            codecs.update(entry.precision.name for entry in header.layers if entry.precision)

    simulate(agents, Topology.ring(3), num_rounds=3, on_reply=note)
    assert precision in codecs
    assert codecs <= {precision, "float32"}  # whole frames beside those of differences


def test_the_same_bytes_in_another_codec_are_another_content() -> None:
    one = torch.tensor([1.0, 2.0])
    written = [
        write_frame({"w": one}, sender=0, round=1, fingerprint=FINGERPRINT, precision=name)
        for name in ("views", "float32")
    ]
    assert written[0].content != written[1].content


# ---- what the receiver lacks ---------------------------------------------------------


def test_a_codec_that_is_not_installed_is_refused_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    forget()
    for read in (decode_frame, read_header):
        with pytest.raises(
            errors.FutureFrameError,
            match=r"sender 3 in round 7 has layer 'v' in codec 'bytes', and this installation "
            r"has float32, .*0\.1-differences\. Install the package that adds it here, or let",
        ):
            read(GOLDEN_NAMED)
    with pytest.raises(
        errors.ConfigError, match=r"precision must be one of float32, .*; got 'bytes'"
    ):
        encode(VALUES, precision="bytes")


def test_frames_of_built_in_codecs_are_read_without_a_look_at_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(**_: object) -> None:
        raise AssertionError("looked")

    frames = [encode(TENSORS, precision=name) for name in BUILT_IN]
    forget()
    monkeypatch.setattr(metadata, "entry_points", look)
    for frame in (GOLDEN, *frames):
        assert decode_frame(frame).tensors.keys() == TENSORS.keys()
    with pytest.raises(AssertionError, match="looked"):
        decode_frame(GOLDEN_NAMED)


def test_a_package_cannot_replace_a_built_in_codec(tmp_path: Path) -> None:
    frame = encode(VALUES)
    names = entry_points("usurper", {"float32": "X", "float8": "X"})
    install(tmp_path, "usurper", names, PACKAGE + "X = codec('float32')")
    with installed(tmp_path, PRECISIONS):
        forget()
        with pytest.raises(
            errors.ConfigError, match=r"'float32' comes from flower_mcepl .*usurper"
        ):
            encode(VALUES)
        with pytest.raises(
            errors.ConfigError, match="entry point, 'float8'; it calls itself 'float32'"
        ):
            encode(VALUES, precision="float8")
        assert_same(decode_frame(frame).tensors, VALUES)


# ---- what a package does wrong -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("misnamed", "name of its entry point, 'misnamed'; it calls itself 'another'"),
        ("crashes", "codec 'crashes': it cannot pack 3 values: OSError: no such table"),
        ("short", r"codec 'short': pack must return num_bytes\(3\) = 12 bytes; got 11 bytes"),
        ("arrays", r"codec 'arrays': pack must return .* 12 bytes; got float32 of shape \(3,\)"),
        ("unsized", r"codec 'unsized': num_bytes\(3\) must be an int, at least 0; got -1"),
        ("half", r"codec 'half': num_bytes\(3\) must be an int, at least 0; got 1\.5"),
        ("lost", "codec 'lost': it cannot tell the size of 3 values: KeyError: 3"),
        ("not-one", "'not-one' from package codecs_of_others .* is a str. Mend that package"),
        ("not-there", "'not-there' cannot be loaded from package codecs_of_others"),
    ],
)
def test_what_cannot_be_sent_names_the_codec(name: str, reason: str) -> None:
    with pytest.raises(errors.ConfigError, match=reason):
        encode(VALUES, precision=name)


def named_frame(name: str, raw: bytes) -> bytes:
    """A frame of three values in a codec, packed by somebody else's version of it."""
    begin = GOLDEN_NAMED[:64] + b"\x07" + bytes([len(name)]) + name.encode() + b"\x00"
    header = begin[:36] + struct.pack("<I", len(begin) + len(raw) + 8) + begin[40:]
    content = oracle.blake(b"\x07" + bytes([len(name)]) + name.encode() + raw)
    return sealed(header[:28] + bind(content, header) + header[36:] + raw)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doubles", r"unpack must return float32 of shape \(3,\); got float64 of shape \(3,\)"),
        ("few", r"unpack must return float32 of shape \(3,\); got float32 of shape \(2,\)"),
        ("square", r"unpack must return float32 of shape \(3,\); got float32 of shape \(3, 1\)"),
        ("lists", r"unpack must return float32 of shape \(3,\); got list"),
        ("stops", "it cannot unpack 3 values: ZeroDivisionError: division by zero"),
        ("unsized", r"num_bytes\(3\) must be an int, at least 0; got -1"),
        ("half", r"num_bytes\(3\) must be an int, at least 0; got 1\.5"),
        ("lost", "it cannot tell the size of 3 values: KeyError: 3"),
        ("misnamed", "it calls itself 'another'"),
        ("not-one", "is a str"),
        ("not-there", "cannot be loaded from package codecs_of_others"),
    ],
)
def test_what_cannot_be_read_names_frame_and_codec(name: str, reason: str) -> None:
    assert named_frame("bytes", b"\x01\xfe\x03") == GOLDEN_NAMED
    with pytest.raises(
        errors.ForeignFrameError,
        match=rf"the frame of sender 3 in round 7 cannot be decoded.*{name}.*{reason}",
    ):
        decode_frame(named_frame(name, bytes(12)))


def test_a_codec_cannot_touch_the_model_it_sends() -> None:
    weights = torch.ones(3)
    encode({"w": weights}, precision="in-place")
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_values_are_writable_and_their_own() -> None:
    data = bytearray(encode(VALUES, precision="views"))
    tensors = decode_frame(data).tensors
    data[:] = bytes(len(data))
    assert_same(tensors, VALUES)
    tensors["v"].zero_()


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, 7])
def test_a_name_must_fit_into_a_frame(name: Any) -> None:
    make: Callable[..., Codec] = find_precision("int4").__class__
    with pytest.raises(errors.ConfigError, match="1 to 255 bytes"):
        make(name=name, num_bytes=len, pack=bytes, unpack=bytes)


# ---- hostile lines -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "error", "reason"),
    [
        (b"\x07", errors.CorruptFrameError, "the codec of layer 'v' has no name"),
        (b"\x07\x80by", errors.CorruptFrameError, "the codec of layer 'v' has no name"),
        (b"\x07\x01\xff\x00", errors.CorruptFrameError, "the codec of layer 'v' has no name"),
        (b"\x07\x00\x00", errors.FutureFrameError, "in codec ''"),
        (b"\x07\x04int5\x00", errors.FutureFrameError, "in codec 'int5'"),
        (b"\x07\x04int8\x00", errors.CorruptFrameError, "came by its name, 'int8'"),
        (b"\x07\x04int4\x00", errors.CorruptFrameError, "say 6 bytes of payload and 3 are there"),
        (b"\x0f\x10int4-differences\x00\x00", errors.FutureFrameError, "coding 0x0f in layer 'v'"),
        (b"\x07\x10int4-differences\x00", errors.CorruptFrameError, "the header names none"),
    ],
)
def test_lines_that_name_a_codec_are_checked(
    line: bytes, error: type[errors.FrameError], reason: str
) -> None:
    body = GOLDEN_NAMED[:64] + line + (b"\x01\xfe\x03" if line[-1:] == b"\x00" else b"")
    with pytest.raises(error, match=reason) as caught:
        decode_frame(sealed(body[:36] + struct.pack("<I", len(body) + 8) + body[40:]))
    assert type(caught.value) is error


@settings(max_examples=200)
@given(
    edits=st.lists(
        st.tuples(st.integers(5, len(GOLDEN_NAMED) - 9), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )
)
def test_an_edited_frame_raises_nothing_but_frame_errors(edits: list[tuple[int, int]]) -> None:
    body = bytearray(GOLDEN_NAMED[:-8])
    for at, value in edits:
        body[at] = value
    if bytes(body) != GOLDEN_NAMED[:-8]:
        with pytest.raises(errors.FrameError):
            decode_frame(sealed(bytes(body)))
