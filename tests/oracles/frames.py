"""A slow, obvious second encoder and decoder of frames.

It is written from docs/wire-format.md alone. Everything is plain Python: bits are lists
of 0 and 1, values lists of floats, the range coder counts with integers of any length.
What the page leaves to the encoder (how a layer is coded) is an argument here.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

ALL, PACKED, ALONE, DELTA = 0, 1, 2, 3
PRECISIONS = {None: 0, "float32": 1, "float16": 2, "bfloat16": 3, "int8": 4, "int8-differences": 5}
NAMED = 7


@dataclass(frozen=True)
class Codec:
    """A codec that the page does not know: a frame says its name."""

    num_bytes: Callable[[int], int]
    pack: Callable[[Sequence[float]], bytes]
    unpack: Callable[[bytes, int], list[float]]
    of_differences: bool = False


def sign_bytes(values: Sequence[float]) -> bytes:
    scale = sum(map(abs, values)) / len(values) if values else 0.0
    return struct.pack("<f", scale) + pack_bits([int(value >= 0) for value in values])


def signs(data: bytes, count: int) -> list[float]:
    (scale,) = struct.unpack("<f", data[:4])
    return [scale if bit else -scale for bit in unpack_bits(data[4:], count)]


def num_largest(share: float, count: int) -> int:
    return min(count, max(1, math.ceil(share * count)))


def low_bits(kept: int, count: int) -> int:
    return max(bits for bits in range(64) if 2**bits <= max(1, count // kept))


def largest_size(share: float, count: int) -> int:
    kept = num_largest(share, count)
    if not kept:
        return 0
    low = low_bits(kept, count)
    return 2 * kept + math.ceil(kept * low / 8) + math.ceil((kept + count // 2**low + 1) / 8)


def largest_bytes(share: float, values: Sequence[float]) -> bytes:
    count = len(values)
    kept = num_largest(share, count)
    if not kept:
        return b""
    low = low_bits(kept, count)
    by_size = sorted(range(count), key=lambda place: -abs(values[place]))
    places = sorted(by_size[:kept])
    lower = [place >> bit & 1 for place in places for bit in range(low)]
    walk: list[int] = []
    for place in places:
        walk += [0] * (place // 2**low - (len(walk) - sum(walk))) + [1]
    walk += [0] * (kept + count // 2**low + 1 - len(walk))
    return (
        pack_values([values[place] for place in places], "bfloat16")
        + pack_bits(lower)
        + pack_bits(walk)
    )


def largest(share: float, data: bytes, count: int) -> list[float]:
    values = [0.0] * count
    kept = num_largest(share, count)
    if not kept:
        return values
    low = low_bits(kept, count)
    split = 2 * kept + math.ceil(kept * low / 8)
    lower = unpack_bits(data[2 * kept : split], kept * low)
    walk = unpack_bits(data[split:], kept + count // 2**low + 1)
    ones = [place for place, bit in enumerate(walk) if bit]
    for k, value in enumerate(unpack_values(data[: 2 * kept], "bfloat16", kept)):
        upper = ones[k] - k
        rest = sum(lower[k * low + bit] << bit for bit in range(low))
        values[upper * 2**low + rest] = value
    return values


# by name; tests add theirs
CODECS: dict[str, Codec] = {
    "sign-differences": Codec(
        lambda count: 4 + (count + 7) // 8, sign_bytes, signs, of_differences=True
    ),
    **{
        f"top-{share}-differences": Codec(
            partial(largest_size, share),
            partial(largest_bytes, share),
            partial(largest, share),
            of_differences=True,
        )
        for share in (0.001, 0.01, 0.1)
    },
}


@dataclass(frozen=True)
class Layer:
    shape: tuple[int, ...]
    bits: list[int] | None = None  # None: all weights have values
    values: list[float] | None = None  # None: a mask
    precision: str | None = None


@dataclass(frozen=True)
class Telling:
    """How an encoder tells a layer's bits."""

    kind: int = PACKED
    with_classes: bool = False
    with_recent: bool = False
    among_live: bool = False


@dataclass(frozen=True)
class Reference:
    round: int
    bits: Mapping[str, list[int]]
    flips: Mapping[str, list[int]] = field(default_factory=dict)
    values: Mapping[str, list[float]] = field(default_factory=dict)  # of dense layers


Classes = Mapping[str, list[int]]


def encode(
    layers: Mapping[str, Layer],
    tellings: Mapping[str, Telling],
    *,
    sender: int,
    round: int,
    fingerprint: str,
    reference: Reference | None = None,
    classes: Classes | None = None,
    run: bytes = bytes(8),
) -> bytes:
    names = sorted(layers, key=str.encode)
    lines, raw, canonical, coder = b"", b"", b"", Encoder()
    coded_later = []  # after the gates
    builds_on = None
    for name in names:
        layer, telling = layers[name], tellings.get(name, Telling())
        kind = ALL if layer.bits is None else telling.kind
        base = reference.values.get(name) if reference else None
        precision = layer.precision
        if of_differences(precision) and (
            base is None or num_bytes(precision, len(base)) >= 4 * len(base)
        ):
            precision = "float32"
        coding = PRECISIONS.get(precision, NAMED) + 8 * kind
        line = named(precision)
        if kind in (ALONE, DELTA):
            last = reference.bits[name] if reference and kind == DELTA else None
            listed = [k for k, bit in enumerate(layer.bits) if bit != (last[k] if last else 0)]
            recent = reference.flips[name] if reference and telling.with_recent else []
            groups = sort_weights(
                math.prod(layer.shape), last, recent if telling.with_recent else None,
                classes[name] if classes and telling.with_classes else None,
            )  # fmt: skip
            if telling.among_live:
                live = live_weights(layer.shape, layers[name + ":filters"].bits)
                listed = [k for k in listed if live[k]]
                groups = [[k for k in group if live[k]] for group in groups]
            taken = [[int(k in listed) for k in group] for group in groups]
            if name.endswith(":filters"):
                write_positions(coder.write, taken)
            else:
                coded_later.append(taken)
            coding += 0x20 * telling.with_classes + 0x40 * telling.with_recent
            coding += 0x80 * telling.among_live
            line += varint(len(listed))
            if kind == DELTA:
                builds_on = reference.round if reference else None
        if layer.bits is not None:
            canonical += pack_bits(layer.bits)
            if kind == PACKED:
                raw += pack_bits(layer.bits)
        if layer.values is not None:
            if layer.bits is not None:
                line += varint(len(layer.values))
            if of_differences(precision):
                assert reference
                assert base
                builds_on = reference.round
                values = pack_values(
                    [single(v - b) for v, b in zip(layer.values, base, strict=True)], precision
                )
                canonical += b"\1" + pack_values(
                    add(base, unpack_values(values, precision, len(base))), "float32"
                )
            else:
                values = pack_values(layer.values, precision)
                canonical += bytes([coding & 7 | (8 if layer.bits is not None else 0)])
                canonical += named(precision) + values
            raw += values
        lines += bytes([coding]) + line
    for taken in coded_later:
        write_positions(coder.write, taken)
    coded = coder.finish()
    description = describe(fingerprint, {name: layers[name].shape for name in names})
    middle = (b"" if builds_on else description) + lines + varint(len(coded))
    head = b"MCPL" + bytes([4, 0 if builds_on else 1]) + len(names).to_bytes(2, "little")
    head += sender.to_bytes(4, "little") + round.to_bytes(4, "little")
    head += (0xFFFFFFFF if builds_on is None else builds_on).to_bytes(4, "little")
    head += blake(run + description + (b"" if classes is None else prior_digest(classes)))
    tail = (40 + len(middle) + len(raw) + len(coded) + 8).to_bytes(4, "little") + middle
    body = head + exclusive_or(blake(canonical), blake(head + tail)) + tail + raw + coded
    return body + blake(body)


def decode(
    data: bytes,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    reference: Reference | None = None,
    classes: Classes | None = None,
) -> dict[str, Layer]:
    """Read a frame that is known to be good; anything odd is an AssertionError."""
    assert data[:5] == b"MCPL\x04"
    flags, count, total = (
        data[5],
        int.from_bytes(data[6:8], "little"),
        int.from_bytes(data[36:40], "little"),
    )
    builds_on = int.from_bytes(data[16:20], "little")
    assert total == len(data)
    assert blake(data[:-8]) == data[-8:]
    stream = Stream(data, 40)
    if flags & 1:
        stream.take(16)
        shapes = {}
        for _ in range(count):
            name = stream.take(stream.number(2)).decode()
            shapes[name] = tuple(stream.number(4) for _ in range(stream.number(1)))
    assert shapes is not None
    names = sorted(shapes, key=str.encode)
    assert len(names) == count
    lines = []
    for _ in names:
        coding = stream.number(1)
        kind = coding >> 3 & 3
        if coding & 7 == NAMED:
            precision: str | None = stream.take(stream.number(1)).decode()
        else:
            precision = list(PRECISIONS)[coding & 7]
        num_listed = stream.varint() if kind in (ALONE, DELTA) else 0
        num_values = stream.varint() if kind and precision else None
        lines.append((coding, kind, precision, num_listed, num_values))
    coded = stream.varint()
    around = blake(data[:28] + data[36 : stream.at])
    coder = Decoder(data[total - 8 - coded : total - 8])
    stored, masks = {}, {}
    for name, (_, kind, precision, _, num_values) in zip(names, lines, strict=True):
        numel = math.prod(shapes[name])
        if kind == PACKED:
            masks[name] = unpack_bits(stream.take((numel + 7) // 8), numel)
        if precision:
            length = numel if num_values is None else num_values
            stored[name] = stream.take(num_bytes(precision, length))
    of_name = dict(zip(names, lines, strict=True))
    for name in sorted(names, key=lambda name: (not name.endswith(":filters"), name.encode())):
        coding, kind, _, num_listed, _ = of_name[name]
        if kind not in (ALONE, DELTA):
            continue
        numel = math.prod(shapes[name])
        last = None
        if kind == DELTA:
            assert reference
            assert reference.round == builds_on
            last = reference.bits[name]
        recent = reference.flips[name] if reference and coding & 0x40 else None
        groups = sort_weights(
            numel, last, recent, classes[name] if classes and coding & 0x20 else None
        )
        bits = list(last or [0] * numel)
        if coding & 0x80:
            live = live_weights(shapes[name], masks[name + ":filters"])
            groups = [[k for k in group if live[k]] for group in groups]
            bits = [bit * on for bit, on in zip(bits, live, strict=True)]
        for group, taken in zip(
            groups, read_positions(coder.read, list(map(len, groups)), num_listed), strict=True
        ):
            for weight, flip in zip(group, taken, strict=True):
                bits[weight] ^= flip
        masks[name] = bits
    layers, canonical = {}, b""
    for name, (coding, kind, precision, _, num_values) in zip(names, lines, strict=True):
        numel = math.prod(shapes[name])
        bits, values = masks.get(name), None
        if bits is not None:
            canonical += pack_bits(bits)
        if precision:
            length = numel if num_values is None else num_values
            values = unpack_values(stored[name], precision, length)
            if of_differences(precision):
                assert kind == ALL
                assert reference
                assert reference.round == builds_on
                values = add(reference.values[name], values)
                canonical += b"\1" + pack_values(values, "float32")
            else:
                canonical += bytes([coding & 7 | (8 if kind else 0)]) + named(precision)
                canonical += stored[name]
            assert bits is None or sum(bits) == len(values)
        layers[name] = Layer(shapes[name], bits, values, precision)
    assert stream.at == total - 8 - coded
    assert coder.all_read()
    assert exclusive_or(blake(canonical), around) == data[28:36]
    return layers


def live_weights(shape: tuple[int, ...], gates: Sequence[int] | None) -> list[int]:
    """The gate of each weight's row; weights are in C order."""
    assert gates is not None
    assert len(gates) == shape[0]
    return [gate for gate in gates for _ in range(math.prod(shape[1:]))]


# ---- bytes ---------------------------------------------------------------------------


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def exclusive_or(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def describe(fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    description = bytes.fromhex(fingerprint)
    for name in sorted(shapes, key=str.encode):
        label = name.encode()
        description += len(label).to_bytes(2, "little") + label + bytes([len(shapes[name])])
        description += b"".join(size.to_bytes(4, "little") for size in shapes[name])
    return description


def prior_digest(classes: Classes) -> bytes:
    data = b""
    for name in sorted(classes, key=str.encode):
        data += (
            name.encode() + b"\0" + len(classes[name]).to_bytes(8, "little") + bytes(classes[name])
        )
    return blake(data)


def varint(number: int) -> bytes:
    head = b""
    while number >= 128:
        head += bytes([128 + number % 128])
        number //= 128
    return head + bytes([number])


class Stream:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def varint(self) -> int:
        digit = self.number(1)
        return digit if digit < 128 else digit - 128 + 128 * self.varint()


def pack_bits(bits: Sequence[int]) -> bytes:
    packed = bytearray((len(bits) + 7) // 8)
    for k, bit in enumerate(bits):
        packed[k // 8] |= bit << 7 - k % 8
    return bytes(packed)


def unpack_bits(data: bytes, count: int) -> list[int]:
    bits = [data[k // 8] >> 7 - k % 8 & 1 for k in range(8 * len(data))]
    assert not any(bits[count:])
    return bits[:count]


def single(value: float) -> float:
    """Round to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def named(precision: str | None) -> bytes:
    """What a line says of the codec besides its code."""
    if precision in PRECISIONS:
        return b""
    assert precision is not None
    return bytes([len(precision.encode())]) + precision.encode()


def of_differences(precision: str | None) -> bool:
    if precision in CODECS:
        return CODECS[precision].of_differences
    return precision == "int8-differences"


def num_bytes(precision: str | None, count: int) -> int:
    if precision in CODECS:
        return CODECS[precision].num_bytes(count)
    sizes: dict[str | None, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
    return sizes.get(precision, 1) * count + 4 * (precision not in sizes)


def pack_values(values: Sequence[float], precision: str | None) -> bytes:
    if precision in CODECS:
        return CODECS[precision].pack(values)
    if precision == "float32":
        return struct.pack(f"<{len(values)}f", *values)
    if precision == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    if precision == "bfloat16":
        words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
        # to the nearest, ties to the even one
        return struct.pack(
            f"<{len(values)}H", *((word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words)
        )
    scale = single(max(map(abs, values), default=0.0) / 127)
    steps = [round(single(value / scale)) if scale else 0 for value in values]
    return struct.pack(f"<f{len(values)}b", scale, *(max(-127, min(127, step)) for step in steps))


def unpack_values(data: bytes, precision: str, count: int) -> list[float]:
    if precision in CODECS:
        return CODECS[precision].unpack(data, count)
    if precision == "float32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if precision == "float16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    if precision == "bfloat16":
        words = struct.unpack(f"<{len(data) // 2}H", data)
        return list(
            struct.unpack(
                f"<{len(words)}f", b"".join((word << 16).to_bytes(4, "little") for word in words)
            )
        )
    scale, *steps = struct.unpack(f"<f{len(data) - 4}b", data)
    return [single(scale * step) for step in steps]


def add(base: Sequence[float], differences: Sequence[float]) -> list[float]:
    return [single(b + d) for b, d in zip(base, differences, strict=True)]


# ---- groups, positions, numbers ------------------------------------------------------


def sort_weights(
    numel: int,
    last: Sequence[int] | None,
    recent: Sequence[int] | None,
    classes: Sequence[int] | None,
) -> list[list[int]]:
    """Return the weights of each group."""
    groups = []
    if recent is not None and last is not None:
        groups += [[k for k in range(numel) if k in recent and last[k] == bit] for bit in (0, 1)]
    for number in range(max(classes or [0]) + 1):
        for bit in (0, 1) if last is not None else (None,):
            groups.append([
                k for k in range(numel)
                if (classes is None or classes[k] == number) and (last is None or last[k] == bit)
                and not (recent is not None and k in recent)
            ])  # fmt: skip
    return groups


def frequencies(ratio: int, largest: int) -> list[int]:
    """Return the frequency of the 1 for each binary digit of a number, lowest first."""
    x, digits = min(ratio, 2**32 - 1), []
    for _ in range(largest.bit_length()):
        digits.append(max((x << 24) // (x + 2**32), 1))
        x = x * x >> 32
    return digits


def count_frequencies(sizes: Sequence[int], total: int) -> list[list[int]]:
    everything = sum(sizes)
    return [
        frequencies((total * size << 32) // max(everything + total * size, 1), min(size, total))
        for size in sizes
    ]


def gap_frequencies(size: int, rare: int) -> list[int]:
    return frequencies((size - rare << 32) // size, size - rare)


def share(rare: int, size: int) -> int:
    return min(max((rare << 24) // size, 1), 2**24 - 1)


def write_positions(write: Callable[[int, int], None], groups: Sequence[Sequence[int]]) -> None:
    """Tell which members of each group are taken: a 1 for those, a 0 for the others."""
    sizes, counts = [len(group) for group in groups], [sum(group) for group in groups]
    if len(groups) > 1:
        for count, digits in zip(counts, count_frequencies(sizes, sum(counts)), strict=True):
            for b, frequency in enumerate(digits):
                write(count >> b & 1, frequency)
    rarer = [
        [1 - bit for bit in g] if 2 * count > len(g) else list(g)
        for g, count in zip(groups, counts, strict=True)
    ]
    for group in rarer:
        if 16 * sum(group) <= len(group):
            previous = -1
            for position in [k for k, bit in enumerate(group) if bit]:
                for b, frequency in enumerate(gap_frequencies(len(group), sum(group))):
                    write(position - previous - 1 >> b & 1, frequency)
                previous = position
    for group in rarer:
        if 16 * sum(group) > len(group):
            for bit in group:
                write(bit, share(sum(group), len(group)))


def read_positions(read: Callable[[int], int], sizes: Sequence[int], total: int) -> list[list[int]]:
    def number(digits: Sequence[int]) -> int:
        return sum(read(frequency) << b for b, frequency in enumerate(digits))

    counts = [total]
    if len(sizes) > 1:
        counts = [number(digits) for digits in count_frequencies(sizes, total)]
    assert sum(counts) == total
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    rare = [min(count, size - count) for count, size in zip(counts, sizes, strict=True)]
    groups = [[0] * size for size in sizes]
    for group, few in zip(groups, rare, strict=True):
        if 16 * few <= len(group):
            previous = -1
            for _ in range(few):
                previous += 1 + number(gap_frequencies(len(group), few))
                assert previous < len(group)
                group[previous] = 1
    for group, few in zip(groups, rare, strict=True):
        if 16 * few > len(group):
            group[:] = [read(share(few, len(group))) for _ in group]
            assert sum(group) == few
    return [
        [1 - bit for bit in g] if 2 * count > len(g) else g
        for g, count in zip(groups, counts, strict=True)
    ]


# ---- the range coder -----------------------------------------------------------------


class Encoder:
    """Counts with one long integer, so a carry needs no care."""

    def __init__(self) -> None:
        self.lower, self.range, self.words = 0, 2**64 - 1, 0

    def write(self, bit: int, frequency: int) -> None:
        scale = self.range >> 24
        begin, width = (2**24 - frequency, frequency) if bit else (0, 2**24 - frequency)
        self.lower += scale * begin
        self.range = scale * width
        if self.range < 2**32:
            self.lower <<= 32
            self.range <<= 32
            self.words += 1

    def finish(self) -> bytes:
        if self.range == 2**64 - 1:
            return b""
        first, beyond = (self.lower + 2**32 - 1) >> 32, (self.lower + self.range) >> 32
        words = [first >> 32 * k & 0xFFFFFFFF for k in range(self.words, -1, -1)] + [0] * (
            first == beyond
        )
        return struct.pack(f"<{len(words)}I", *words)


class Decoder:
    def __init__(self, data: bytes) -> None:
        self.words: Iterator[int] = iter(struct.unpack(f"<{len(data) // 4}I", data))
        self.lower, self.range = 0, 2**64 - 1
        self.point = next(self.words, 0) << 32 | next(self.words, 0)

    def read(self, frequency: int) -> int:
        scale = self.range >> 24
        place = (self.point - self.lower) % 2**64 // scale
        assert place < 2**24
        bit = int(place >= 2**24 - frequency)
        begin, width = (2**24 - frequency, frequency) if bit else (0, 2**24 - frequency)
        self.lower = (self.lower + scale * begin) % 2**64
        self.range = scale * width
        if self.range < 2**32:
            self.lower = (self.lower << 32) % 2**64
            self.range <<= 32
            self.point = (self.point << 32) % 2**64 | next(self.words, 0)
        return bit

    def all_read(self) -> bool:
        untouched = self.range == 2**64 - 1
        return next(self.words, None) is None and (
            untouched or (self.point - self.lower) % 2**64 < 2**33 - 1
        )
