"""A slow, obvious second reader of personal models' files.

It is written from docs/mask-file.md alone: plain Python, with the reader of frames
beside it and a twister of its own.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tests.oracles import frames

SIZES = {1: 4, 2: 8, 3: 2, 4: 2, 5: 8, 6: 4, 7: 2, 8: 1, 9: 1, 10: 1}
NAMES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


@dataclass
class Line:
    name: str
    code: int
    shape: tuple[int, ...]
    recipe: int
    magnitude: float = 0.0
    draw: tuple[int, int] | None = None
    scores: tuple[int, int] | None = None
    rows: list[int] | None = None
    factor: float = 1.0


def read(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts, and the elements of each tensor as little-endian bytes."""
    assert data[:8] == b"\x89MASK\r\n\x1a"
    assert blake(data[:-16]) == data[-16:]
    version, count, total, f, table, m, v = struct.unpack_from("<HIQIIQQ", data, 8)
    assert version in (1, 2)
    assert total == len(data)
    at = 62
    facts, at = data[at : at + f], at + f
    lines, at = [*read_table(data[at : at + table], count)], at + table
    frame, at = data[at : at + m], at + m
    values, at = data[at : at + v], at + v
    assert at == total - 16
    masked = [line for line in lines if line.recipe]
    assert version == (2 if any(line.recipe == 5 for line in lines) else 1)
    classes = {line.name: [*class_of(line)] for line in masked if line.scores or line.rows}
    layers = frames.decode(frame, classes=classes or None)
    assert {n: x.shape for n, x in layers.items()} == {line.name: line.shape for line in masked}
    elements = {}
    for line in lines:
        layer = layers.get(line.name)
        bits = layer.bits if layer is not None else None
        assert layer is None or bits is not None
        elements[line.name], values = read_elements(line, bits, values)
    assert not values
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        label = f"{line.name}|{NAMES[line.code - 1]}|{list(line.shape)}|"
        digest.update(label.encode() + elements[line.name])
    assert digest.digest() == data[46:62]
    return json.loads(facts), elements


def read_table(data: bytes, count: int) -> Iterator[Line]:
    stream = frames.Stream(data, 0)
    for _ in range(count):
        name = stream.take(stream.number(2)).decode()
        code, recipe = stream.number(1), stream.number(1)
        shape = tuple(stream.number(4) for _ in range(stream.number(1)))
        line = Line(name, code, shape, recipe)
        if recipe >= 2:
            (line.magnitude,) = struct.unpack("<d", stream.take(8))
        if recipe == 5:
            (line.factor,) = struct.unpack("<d", stream.take(8))
        if recipe >= 3:
            line.draw = (stream.number(4), stream.number(8))
        coding = stream.number(1) if recipe else 0
        if coding & 1:
            line.scores = (stream.number(4), stream.number(8))
        if coding & 2:
            line.rows = frames.unpack_bits(stream.take((shape[0] + 7) // 8), shape[0])
        yield line
    assert stream.at == len(data)


def read_elements(line: Line, bits: list[int] | None, values: bytes) -> tuple[bytes, bytes]:
    size = SIZES[line.code]
    if bits is None:
        end = math.prod(line.shape) * size
        return values[:end], values[end:]
    on = sum(bits)
    form = "<f" if line.code == 1 else "<d"
    if line.recipe == 1:
        live = [values[size * k : size * (k + 1)] for k in range(on)]
        values = values[size * on :]
    elif line.recipe == 2:
        signs = frames.unpack_bits(values[: (on + 7) // 8], on)
        live = [struct.pack(form, -line.magnitude if s else line.magnitude) for s in signs]
        values = values[(on + 7) // 8 :]
    else:
        words = [
            word for word, bit in zip(words_of(line.draw, len(bits)), bits, strict=True) if bit
        ]
        live = [struct.pack(form, drawn(line, word)) for word in words]
    left = iter(live)
    return b"".join(next(left) if bit else bytes(size) for bit in bits), values


def drawn(line: Line, word: int) -> float:
    b = line.magnitude
    if line.recipe == 3:
        return b if word & 1 else -b
    exact = Fraction(word % 2**24) * Fraction(2 * b) / 2**24 - Fraction(b)
    if line.recipe == 4:
        return float(exact)  # struct rounds it to float32
    (once,) = struct.unpack("<f", struct.pack("<f", float(exact)))
    return once * line.factor  # exact in binary64, rounded again


def class_of(line: Line) -> Iterator[int]:
    numel = math.prod(line.shape)
    own = words_of(line.draw, numel) if line.recipe >= 4 else []
    scores = words_of(line.scores, numel) if line.scores else []
    for k in range(numel):
        by_score = level(scores[k], 16) if scores else 0
        if scores and own:
            by_score = 2 * by_score + level(own[k], 2)
        off = line.rows is not None and line.rows[k // (numel // line.shape[0])]
        yield 32 if off else by_score


def level(word: int, count: int) -> int:
    return min(abs(2 * (word % 2**24) - 2**24) * count // 2**24, count - 1)


def words_of(draw: tuple[int, int] | None, count: int) -> list[int]:
    assert draw is not None
    seed, skip = draw
    words = twister(seed)
    for _ in range(skip):
        next(words)
    return [next(words) for _ in range(count)]


def twister(seed: int) -> Iterator[int]:
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) % 2**32)
    while True:
        for i in range(624):
            y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7FFFFFFF
            state[i] = state[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
        for y in state:
            y ^= y >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            yield y ^ y >> 18


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
