"""Bytes of a personal model's file: header, table of tensors, checksum.

Byte by byte in ``docs/mask-file.md``.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flower_mcepl.errors import StateError
from flower_mcepl.wire.support import packed_bytes

# raise it when a field moves, or a recipe or the classes of weights change; a file has
# the first version that knows its recipes
FIRST_VERSION, SCALED_VERSION = 1, 2

MAGIC = b"\x89MASK\r\n\x1a"  # shows a transfer as text, as PNG's does
DIGEST_NBYTES = 16
# magic version tensors total facts table frame values digest
HEADER = struct.Struct("<8sHIQIIQQ16s")
MAX_DIMS = 32
MAX_WORDS = 2**29  # of all twisters together, that a file may ask for
# a mask may have so many weights for each byte of its file
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 2**20, 2**10

# how a tensor comes back
RAW, LIVE, TERNARY, SIGNS, UNIFORM, SCALED = range(6)
MASKED = (LIVE, TERNARY, SIGNS, UNIFORM, SCALED)
UNIFORMS = (UNIFORM, SCALED)
DRAWN = (SIGNS, *UNIFORMS)
BY_SCORES, BY_ROWS = 1, 2  # how a mask is coded

DTYPES = {  # name in torch: code and size
    "float32": (1, 4),
    "float64": (2, 8),
    "float16": (3, 2),
    "bfloat16": (4, 2),
    "int64": (5, 8),
    "int32": (6, 4),
    "int16": (7, 2),
    "int8": (8, 1),
    "uint8": (9, 1),
    "bool": (10, 1),
}
_NAMES = {code: name for name, (code, _) in DTYPES.items()}


@dataclass(frozen=True)
class Draw:
    """Words of a Mersenne twister: those from ``skip`` on, of a seed of 32 bits."""

    seed: int
    skip: int

    LAYOUT = struct.Struct("<IQ")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file's table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: int  # RAW, or one of MASKED
    magnitude: float = 0.0  # of TERNARY and SIGNS; the bound of UNIFORM and SCALED
    draw: Draw | None = None  # of DRAWN
    scores: Draw | None = None  # first scores, by which the mask is coded; None: it is not
    rows: bytes = b""  # 1 bit for each row, set where it is all off; empty: the file does not say
    factor: float = 1.0  # of SCALED: on what was drawn

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def draws(self) -> list[Draw]:
        """Words that it asks for, ``numel`` of each."""
        return [draw for draw in (self.draw, self.scores) if draw is not None]

    def line(self) -> bytes:
        """The tensor's line in the table."""
        label = self.name.encode()
        code = DTYPES[self.dtype][0]
        line = struct.pack(f"<H{len(label)}s", len(label), label)
        line += struct.pack(f"<BBB{len(self.shape)}I", code, self.recipe, self._dims, *self.shape)
        if self.recipe in (TERNARY, *DRAWN):
            line += struct.pack("<d", self.magnitude)
        if self.recipe == SCALED:
            line += struct.pack("<d", self.factor)
        if self.draw is not None:
            line += Draw.LAYOUT.pack(self.draw.seed, self.draw.skip)
        if self.recipe in MASKED:
            line += bytes([BY_SCORES * (self.scores is not None) | BY_ROWS * bool(self.rows)])
        if self.scores is not None:
            line += Draw.LAYOUT.pack(self.scores.seed, self.scores.skip)
        return line + self.rows

    @property
    def _dims(self) -> int:
        return len(self.shape)

    def value_bytes(self, on: int) -> int:
        """Size of its values, where so many of its weights are on."""
        size = DTYPES[self.dtype][1]
        packed = packed_bytes(on)
        return {RAW: self.numel * size, LIVE: on * size, TERNARY: packed}.get(self.recipe, 0)


@dataclass(frozen=True)
class Parts:
    """What lies in a file between its header and its checksum."""

    facts: Mapping[str, Any]  # JSON-able
    entries: Sequence[Entry]  # by name, ascending
    frame: bytes | memoryview  # the masks, a whole frame of the wire
    values: bytes | memoryview
    digest: bytes  # of the tensors, see `tensors_digest`
    size: int = 0  # of the file in bytes, where it was read


def join(parts: Parts) -> bytes:
    """The bytes of a file."""
    facts = json.dumps(parts.facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    table = b"".join(entry.line() for entry in parts.entries)
    body = [facts, table, bytes(parts.frame), bytes(parts.values)]
    total = HEADER.size + sum(map(len, body)) + DIGEST_NBYTES
    count = len(parts.entries)
    scaled = any(entry.recipe == SCALED for entry in parts.entries)
    version = SCALED_VERSION if scaled else FIRST_VERSION
    header = HEADER.pack(MAGIC, version, count, total, *map(len, body), parts.digest)
    data = header + b"".join(body)
    return data + checksum(data)


def split(data: bytes, *, where: str) -> Parts:
    """Check a file and take its parts.

    Raises
    ------
    StateError
        If the bytes are no such file, damaged, or of a newer version.
    """
    if len(data) < HEADER.size + DIGEST_NBYTES or data[: len(MAGIC)] != MAGIC:
        raise damaged(where, f"its {len(data)} bytes do not begin as a personal model does")
    if checksum(data[:-DIGEST_NBYTES]) != data[-DIGEST_NBYTES:]:
        raise damaged(where, f"the checksum over its {len(data)} bytes is wrong")
    _, version, count, total, *sizes, digest = HEADER.unpack_from(data)
    if not FIRST_VERSION <= version <= SCALED_VERSION:
        raise StateError(
            f"{where} is a personal model of format version {version}; this flower_mcepl reads "
            f"versions {FIRST_VERSION} to {SCALED_VERSION}. Update it, or export the model anew."
        )
    if total != len(data) or HEADER.size + sum(sizes) + DIGEST_NBYTES != total:
        raise damaged(where, "its parts do not add up to its length")
    pieces, at = [], HEADER.size
    for size in sizes:
        pieces.append(memoryview(data)[at : at + size])
        at += size
    try:
        last = SCALED if version >= SCALED_VERSION else UNIFORM
        facts, entries = json.loads(bytes(pieces[0])), _table(pieces[1], count, last)
    except (ValueError, struct.error, IndexError, KeyError, RecursionError) as error:
        raise damaged(where, f"its table cannot be read ({error!r})") from error
    if not isinstance(facts, dict):
        raise damaged(where, "its facts are no table")
    _check_sizes(entries, len(data), where)
    return Parts(facts, entries, pieces[2], pieces[3], digest, total)


def damaged(where: str, what: str) -> StateError:
    """The error of a file that is not what was written."""
    return StateError(
        f"a personal model must be read as it was written; {where} is damaged: {what}. Use "
        "another copy, or export it anew."
    )


def checksum(data: bytes | memoryview) -> bytes:
    """The 16 bytes of BLAKE2b over everything before them."""
    return hashlib.blake2b(data, digest_size=DIGEST_NBYTES).digest()


def tensors_digest(tensors: Iterable[tuple[Entry, bytes]]) -> bytes:
    """The 16 bytes of BLAKE2b over names, types, shapes and elements, name by name."""
    state = hashlib.blake2b(digest_size=DIGEST_NBYTES)
    for entry, elements in tensors:
        state.update(f"{entry.name}|{entry.dtype}|{list(entry.shape)}|".encode())
        state.update(elements)
    return state.digest()


def _table(data: memoryview, count: int, last: int) -> list[Entry]:
    """Entries of a table, whose recipes go up to the last that its version knows."""
    entries, at = [], 0
    for _ in range(count):
        entry, at = _entry(data, at, last)
        entries.append(entry)
    names = [entry.name for entry in entries]
    if at != len(data) or names != sorted(set(names)):
        raise ValueError("its names do not ascend, or bytes are left over")
    return entries


def _entry(data: memoryview, at: int, last: int) -> tuple[Entry, int]:
    def take(layout: struct.Struct) -> tuple[Any, ...]:
        nonlocal at
        fields = layout.unpack_from(data, at)
        at += layout.size
        return fields

    def draw() -> Draw:
        return Draw(*take(Draw.LAYOUT))

    (length,) = take(struct.Struct("<H"))
    (label,) = take(struct.Struct(f"<{length}s"))
    code, recipe, dims = take(struct.Struct("<BBB"))
    odd = recipe in UNIFORMS and _NAMES[code] != "float32"
    if recipe > last or dims > MAX_DIMS or odd:
        raise ValueError(f"no tensor has recipe {recipe}, {dims} dimensions and type {code}")
    shape = take(struct.Struct(f"<{dims}I"))
    magnitude = take(struct.Struct("<d"))[0] if recipe in (TERNARY, *DRAWN) else 0.0
    factor = take(struct.Struct("<d"))[0] if recipe == SCALED else 1.0
    words = draw() if recipe in DRAWN else None
    coding = take(struct.Struct("<B"))[0] if recipe in MASKED else 0
    if coding > BY_SCORES | BY_ROWS or (coding & BY_ROWS and not math.prod(shape[:1])):
        raise ValueError(f"no mask is coded in way {coding}")
    scores = draw() if coding & BY_SCORES else None
    size = packed_bytes(shape[0]) if coding & BY_ROWS else 0
    (rows,) = take(struct.Struct(f"<{size}s"))
    name, kind = bytes(label).decode(), _NAMES[code]
    return Entry(name, kind, shape, recipe, magnitude, words, scores, rows, factor), at


# Before anything is allocated: a file of a few bytes must not make its reader fill the
# memory. What lies in the file as it is, is bounded by the file.
def _check_sizes(entries: Sequence[Entry], size: int, where: str) -> None:
    weights = sum(entry.numel for entry in entries if entry.recipe in MASKED)
    raw = sum(entry.value_bytes(0) for entry in entries if entry.recipe == RAW)
    # torch multiplies the other dimensions of a tensor without elements, too
    vast = any(math.prod(max(1, dim) for dim in entry.shape) >= 2**63 for entry in entries)
    if vast or raw > size or not masks_fit(weights, size) or not draws_fit(entries):
        raise damaged(where, f"it declares more than fits into {size} bytes")


def pieces_by_seed(entries: Iterable[Entry]) -> dict[int, list[tuple[int, int]]]:
    """Words that a file asks for by twister's seed: ``(skip, count)``, ascending."""
    pieces: dict[int, set[tuple[int, int]]] = {}
    for entry in entries:
        for draw in entry.draws():
            pieces.setdefault(draw.seed, set()).add((draw.skip, entry.numel))
    return {seed: sorted(of_seed) for seed, of_seed in pieces.items()}


def draws_fit(entries: Iterable[Entry]) -> bool:
    """Whether the words that a file asks for are few enough, and none comes twice."""
    total = 0
    for pieces in pieces_by_seed(entries).values():
        ends = [skip + count for skip, count in pieces]
        total += ends[-1]
        if any(skip < end for (skip, _), end in zip(pieces[1:], ends, strict=False)):
            return False
    return total <= MAX_WORDS


def masks_fit(weights: int, size: int) -> bool:
    """Whether a file of ``size`` bytes may hold masks of so many weights."""
    return weights <= FREE_WEIGHTS + WEIGHTS_PER_BYTE * size
