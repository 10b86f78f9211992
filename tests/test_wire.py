import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import errors, wire
from flower_mcepl.wire import WIRE_VERSION, LayerEntry, decode_frame, encode_frame, read_header

quick = settings(deadline=None, max_examples=60)

FINGERPRINT = "000102030405060708090a0b0c0d0e0f"
BITS = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
TENSORS = {"a": BITS, "b": torch.tensor(-1.5)}
# The test vector of docs/wire-format.md. If this changes, WIRE_VERSION must change, too.
GOLDEN = bytes.fromhex(
    "4d43504c 01 00 0200 03000000 07000000 000102030405060708090a0b0c0d0e0f 5800000000000000"
    "0100 61 01 02 03000000 03000000 0200000000000000"
    "0100 62 02 00 0400000000000000"
    "b180 0000c0bf 1a404070a353c198"
)

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def payloads(draw: st.DrawFn) -> dict[str, Tensor]:
    layers = draw(st.dictionaries(names, st.tuples(shapes, st.booleans()), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    floats = {name: torch.randn(shape, generator=generator) for name, (shape, _) in layers.items()}
    return {name: floats[name] > 0.4 if is_mask else floats[name] for name, (_, is_mask) in layers.items()}


def encode(tensors: dict[str, Tensor], *, sender: int = 3, round: int = 7) -> bytes:
    return encode_frame(tensors, sender=sender, round=round, fingerprint=FINGERPRINT)


def slow_bits(mask: Tensor) -> bytes:
    """One bit at a time: weight k goes to byte k // 8, most significant bit first."""
    packed = bytearray((mask.numel() + 7) // 8)
    for k, bit in enumerate(mask.flatten().tolist()):
        packed[k // 8] |= int(bit) << (7 - k % 8)
    return bytes(packed)


def slow_frame(tensors: dict[str, Tensor], *, sender: int, round: int) -> bytes:
    """The obvious truth, written from docs/wire-format.md alone."""
    table = payload = b""
    for name, tensor in sorted(tensors.items()):
        is_mask = tensor.dtype == torch.bool
        data = slow_bits(tensor) if is_mask else struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())
        label = name.encode()
        table += len(label).to_bytes(2, "little") + label + bytes([1 if is_mask else 2, tensor.dim()])
        table += b"".join(d.to_bytes(4, "little") for d in tensor.shape) + len(data).to_bytes(8, "little")
        payload += data
    head = b"MCPL" + bytes([1, 0]) + len(tensors).to_bytes(2, "little")
    head += sender.to_bytes(4, "little") + round.to_bytes(4, "little") + bytes.fromhex(FINGERPRINT)
    head += (40 + len(table) + len(payload) + 8).to_bytes(8, "little")
    return sealed(head + table + payload)


def sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=8).digest()


def forged(frame: bytes, at: int, new: bytes) -> bytes:
    """Overwrite some bytes and give the frame a good checksum again."""
    return sealed(frame[:at] + new + frame[at + len(new) : -8])


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.shape == right[name].shape
        assert torch.equal(tensor, right[name])


# ---- what comes out is what went in -----------------------------------------------------------------------


@quick
@given(tensors=payloads(), sender=st.integers(0, 2**32 - 1), round=st.integers(0, 2**32 - 1))
def test_round_trip_and_bytes_of_the_oracle(tensors: dict[str, Tensor], sender: int, round: int) -> None:
    data = encode(tensors, sender=sender, round=round)
    assert data == slow_frame(tensors, sender=sender, round=round)
    layers = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    frame = decode_frame(data, fingerprint=FINGERPRINT, layers=layers, sender=sender, latest_round=round)
    assert_same(frame.tensors, tensors)
    assert frame.header == read_header(data)
    assert (frame.header.sender, frame.header.round) == (sender, round)


def test_golden_frame_never_drifts() -> None:
    assert encode(TENSORS) == GOLDEN
    assert_same(decode_frame(GOLDEN).tensors, TENSORS)
    header = read_header(GOLDEN)
    assert header == wire.FrameHeader(1, 3, 7, FINGERPRINT, (LayerEntry("a", (3, 3), 1, 2), LayerEntry("b", (), 2, 4)))
    assert [entry.dtype for entry in header.layers] == [torch.bool, torch.float32]


def test_one_bit_per_weight() -> None:
    assert len(encode({"w": torch.ones(8000, dtype=torch.bool)})) < 1000 + 80


def test_bytes_do_not_depend_on_order_layout_or_gradient() -> None:
    assert encode(dict(reversed(TENSORS.items()))) == GOLDEN
    scattered = {"a": BITS.t().contiguous().t(), "b": torch.tensor([-1.5, 9.0], requires_grad=True)[0]}
    assert not scattered["a"].is_contiguous()
    assert encode(scattered) == GOLDEN
    sloppy_true = torch.tensor([2, 0, 255], dtype=torch.uint8).view(torch.bool)
    assert encode({"a": sloppy_true}) == encode({"a": torch.tensor([True, False, True])})


def test_scalars_empty_layers_and_no_layers() -> None:
    tensors = {"": torch.tensor(True), "none": torch.zeros(0, 5), "wide": torch.zeros(2, 0, dtype=torch.bool)}
    assert_same(decode_frame(encode(tensors)).tensors, tensors)
    assert decode_frame(encode({})).tensors == {}


def test_floats_keep_every_bit() -> None:
    odd = torch.tensor([0x7FC00123, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)  # NaN -0 tiny inf
    came = decode_frame(encode({"w": odd.view(torch.float32)})).tensors["w"]
    assert torch.equal(came.view(torch.int32), odd)


def test_tensors_are_writable_and_their_own() -> None:
    data = bytearray(GOLDEN)
    tensors = decode_frame(data).tensors
    data[:] = bytes(len(data))
    assert_same(tensors, TENSORS)
    for tensor in tensors.values():
        tensor.zero_()
    assert not tensors["a"].any()
    assert_same(decode_frame(GOLDEN).tensors, TENSORS)


def test_every_kind_of_buffer() -> None:
    array = np.frombuffer(GOLDEN, np.uint8)
    strided = np.repeat(array, 2)[::2]
    for data in (bytearray(GOLDEN), memoryview(GOLDEN), array, strided, array.reshape(2, -1)):
        assert_same(decode_frame(data).tensors, TENSORS)
    with pytest.raises(errors.ConfigError, match="as they came"):
        decode_frame(memoryview(np.zeros(20)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64])
def test_other_types_name_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(errors.ConfigError, match=r"'w'.*\.bool\(\)"):
        encode({"w": torch.zeros(3, dtype=dtype)})


def test_what_does_not_fit_is_a_config_error() -> None:
    for tensors in (
        {"w": torch.zeros(3).to_sparse()},
        {"w": torch.zeros(3, device="meta")},
        {"w" * 2**16: torch.zeros(1)},
        {"\ud800": torch.zeros(1)},
        {"w": torch.zeros([1] * 33)},
        {"w": torch.zeros(0, 2**31, 2**31)},
    ):
        with pytest.raises(errors.ConfigError):
            encode(tensors)
    for sender, round in ((-1, 0), (2**32, 0), (0, -1), (0, 2**32)):
        with pytest.raises(errors.ConfigError, match="2\\*\\*32"):
            encode(TENSORS, sender=sender, round=round)
    for fingerprint in ("", "ab", FINGERPRINT.upper(), "g" * 32, FINGERPRINT + "\n"):
        with pytest.raises(errors.ConfigError, match="hex"):
            encode_frame(TENSORS, sender=0, round=0, fingerprint=fingerprint)
        with pytest.raises(errors.ConfigError, match="hex"):
            decode_frame(GOLDEN, fingerprint=fingerprint)


# ---- damaged bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(len(GOLDEN)))
def test_every_truncation_is_called_truncated(length: int) -> None:
    with pytest.raises(errors.TruncatedFrameError, match="sent again"):
        decode_frame(GOLDEN[:length])


def test_truncation_names_sender_and_round() -> None:
    with pytest.raises(errors.TruncatedFrameError, match="sender 3 in round 7 says 88 bytes and has 80"):
        decode_frame(GOLDEN[:80])


def test_every_flipped_bit_is_refused_by_name() -> None:
    for bit in range(8 * len(GOLDEN)):
        data = bytearray(GOLDEN)
        data[bit // 8] ^= 1 << bit % 8
        byte = bit // 8
        expected: type[errors.FrameError] = errors.CorruptFrameError
        if byte < 4:
            expected = errors.ForeignFrameError
        elif byte == 4 and data[4]:
            expected = errors.FutureFrameError
        elif 32 <= byte < 40 and int.from_bytes(data[32:40], "little") > len(data):
            expected = errors.TruncatedFrameError  # it says more than came: nobody can tell the two apart
        with pytest.raises(expected) as caught:
            decode_frame(data, fingerprint=FINGERPRINT, sender=3, latest_round=7)
        assert type(caught.value) is expected


@quick
@given(data=st.binary(max_size=200), start=st.sampled_from([0, 4, 5, 8, 40, 60]))
def test_garbage_raises_nothing_but_frame_errors(data: bytes, start: int) -> None:
    for candidate in (GOLDEN[:start] + data, sealed(GOLDEN[:start] + data)):
        with pytest.raises(errors.FrameError):
            decode_frame(candidate)


@settings(deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(5, 79), st.integers(0, 255)), min_size=1, max_size=4))
def test_forged_frames_with_a_good_checksum_decode_canonically_or_are_refused(
    edits: list[tuple[int, int]],
) -> None:
    body = bytearray(GOLDEN[:-8])
    for at, value in edits:
        body[at] = value
    data = sealed(bytes(body))
    try:
        frame = decode_frame(data)
    except errors.FrameError:
        return
    header = frame.header
    again = encode_frame(frame.tensors, sender=header.sender, round=header.round, fingerprint=header.fingerprint)
    assert again == data


def test_nothing_large_is_allocated_for_declared_sizes() -> None:
    huge = struct.pack("<II", 2**31, 2**31)
    total = struct.pack("<Q", 2**63)
    claims = (
        forged(GOLDEN, 32, total),
        forged(GOLDEN, 45, huge),
        forged(GOLDEN, 45, struct.pack("<IIQ", 2**31, 1, 2**28)),
        forged(GOLDEN, 45, struct.pack("<IIQ", 2**31, 2**29 - 1, 2**57 - 2**28)),
        forged(GOLDEN, 6, b"\xff\xff"),
        forged(GOLDEN, 40, b"\xff\xff"),
        forged(GOLDEN, 44, b"\xff"),
    )
    tracemalloc.start()
    try:
        for data in claims:
            with pytest.raises((errors.CorruptFrameError, errors.TruncatedFrameError)):
                decode_frame(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_strides_of_an_empty_layer_cannot_overflow() -> None:
    line = struct.pack("<HBB4IQ", 0, 1, 4, 0, *[2**32 - 1] * 3, 0)
    head = struct.pack("<4sBBHII16sQ", b"MCPL", 1, 0, 1, 3, 7, bytes(16), 40 + len(line) + 8)
    with pytest.raises(errors.CorruptFrameError, match="impossible shape"):
        decode_frame(sealed(head + line))


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (4, b"\x00", "version 0 never existed"),
        (75, b"\x81", "'a' the 7 padding bits must be zero"),
        (42, b"b", "ascending order"),
        (42, b"c", "ascending order"),
        (42, b"\xff", "cannot be read"),
        (49, b"\x09", "needs 4 bytes of payload and says 2"),
        (45, struct.pack("<IIQ", 3, 6, 3), "say 7 bytes of payload and 6 are there"),
        (6, b"\x01\x00", "say 2 bytes of payload"),
        (6, b"\x03\x00", "cannot be read"),
    ],
)
def test_structure_is_checked_behind_the_checksum(at: int, new: bytes, reason: str) -> None:
    with pytest.raises(errors.CorruptFrameError, match=reason):
        decode_frame(forged(GOLDEN, at, new))


def test_trailing_bytes_and_short_totals_are_corrupt() -> None:
    with pytest.raises(errors.CorruptFrameError, match="says 88 bytes and 89 came"):
        decode_frame(GOLDEN + b"\0")
    with pytest.raises(errors.CorruptFrameError, match="says 40 bytes and 40 came"):
        decode_frame(GOLDEN[:32] + struct.pack("<Q", 40))


# ---- good frames of someone else --------------------------------------------------------------------------


def test_header_is_checked_like_the_frame() -> None:
    for data, error in (
        (GOLDEN[:-1], errors.TruncatedFrameError),
        (GOLDEN[:-1] + b"\0", errors.CorruptFrameError),
        (b"GET / HTTP/1.1", errors.ForeignFrameError),
        (forged(GOLDEN, 4, b"\x02"), errors.FutureFrameError),
    ):
        with pytest.raises(error):
            read_header(data)


def test_newer_formats_are_future() -> None:
    longer = forged(GOLDEN, 4, bytes([WIRE_VERSION + 1])) + b"another layout"
    for data, what in (
        (longer, "version 2"),
        (GOLDEN[:4] + b"\xff", "version 255"),
        (forged(GOLDEN, 5, b"\x01"), "flags 0x01"),
        (forged(GOLDEN, 43, b"\x03"), "coding 3 in layer 'a'"),
    ):
        with pytest.raises(errors.FutureFrameError, match=f"knows no {what}.*Update"):
            decode_frame(data)


@pytest.mark.parametrize(
    ("expected", "error", "reason"),
    [
        ({"fingerprint": "f" * 32}, errors.ForeignFrameError, "sender 3 in round 7 carries 0001"),
        ({"sender": 4}, errors.ForeignFrameError, "filed under, 4; this is the frame of sender 3"),
        ({"latest_round": 6}, errors.FutureFrameError, "at most 6; .* sender 3 in round 7"),
        ({"layers": {"a": (3, 3)}}, errors.ForeignFrameError, r"'b' has shape \(\) instead of none"),
        (
            {"layers": {"a": (9,), "b": ()}},
            errors.ForeignFrameError,
            r"'a' has shape \(3, 3\) instead of \(9,\)",
        ),
        ({"layers": {"a": (3, 3), "b": (), "c": (1,)}}, errors.ForeignFrameError, "'c' has shape none"),
        ({"dtype": torch.bool}, errors.ForeignFrameError, "torch.float32 in layer 'b'"),
    ],
)
def test_expectations(expected: dict[str, object], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        decode_frame(GOLDEN, **expected)  # type: ignore[arg-type]


def test_met_expectations_pass() -> None:
    frame = decode_frame(GOLDEN, fingerprint=FINGERPRINT, layers={"b": (), "a": (3, 3)}, sender=3, latest_round=7)
    assert_same(frame.tensors, TENSORS)
