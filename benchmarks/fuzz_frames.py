"""Feed damaged and forged frames to the decoder and the mailbox.

Only FrameErrors and the honest tensors may result.

python benchmarks/fuzz_frames.py --frames 1000000 --seed 0

Half of the mutants get a checksum that fits again, so that they reach the decoder
behind it. Some of these also get a bound content that fits their header, as if the
digest did not cover it, and some the digest of what they decode to. It ends with exit
code 1 if

- anything but a FrameError is raised;
- tensors come out that are not those encoded, although the fuzzer did not forge the
  digest of the content;
- reading one frame takes over a second of processor time and over 100 times as long as
  the slowest honest frame; or
- it allocates over 4 times as much as the most demanding honest frame (looked at on one
  mutant in 50).
"""

import argparse
import hashlib
import random
import resource
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from flower_mcepl.errors import FrameError
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.wire import (
    PRECISIONS,
    FrameHeader,
    Prior,
    Reference,
    decode_frame,
    read_header,
    reading,
    write_frame,
)
from flower_mcepl.wire.layout import (
    CONTENT,
    FIXED,
    FREE_WEIGHTS,
    WEIGHTS_PER_BYTE,
    bind,
    varint,
)
from flower_mcepl.wire.opening import open_frame
from flower_mcepl.wire.values import BY_CODE

FINGERPRINT = "000102030405060708090a0b0c0d0e0f"
LAYERS: dict[str, tuple[int, ...]] = {
    "conv": (12, 3, 3, 3),
    "fc": (50, 60),
    "fc:filters": (50,),
    "head": (10, 7),
    "none": (0, 4),
    "one": (),
}
SENDER, ROUND = 3, 7
CLASSES = Prior(
    {
        name: (torch.arange(int(np.prod(shape))) % 5).to(torch.uint8).reshape(shape)
        for name, shape in LAYERS.items()
    }
)
EXAMINE = 50  # the memory of one mutant in so many is looked at
MEMORY, SLOWER, SECONDS = 4, 100, 1.0

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Honest:
    """An honest frame and what its receiver knows."""

    name: str
    data: bytes
    tensors: Tensors  # what it decodes to
    prior: Prior | None
    first: Tensors | None
    chain: Sequence[bytes] = ()  # frames that the receiver got before

    @property
    def dtype(self) -> torch.dtype | None:
        """What the receiver takes."""
        return (
            torch.bool
            if all(tensor.dtype == torch.bool for tensor in self.tensors.values())
            else None
        )

    def expected(self) -> dict[str, Any]:
        """Return what the receiver passes to `decode_frame`."""
        references = [] if self.first is None else [Reference(0, self.first)]
        for data in self.chain:
            known = {"layers": LAYERS, "references": references, "prior": self.prior}
            references.insert(0, decode_frame(data, **known).as_reference())
        return {
            "fingerprint": FINGERPRINT,
            "layers": LAYERS,
            "dtype": self.dtype,
            "sender": SENDER,
            "latest_round": ROUND,
            "references": references,
            "prior": self.prior,
        }

    def mailbox(self) -> Mailbox:
        """Return the receiver's mailbox, holding the chain."""
        box = Mailbox(
            owner=0,
            fingerprint=FINGERPRINT,
            layers=LAYERS,
            max_staleness=ROUND,
            dtype=self.dtype,
            prior=self.prior,
            first=self.first,
        )
        if self.chain:
            box.put(SENDER, self.chain, latest_round=ROUND)
        return box


def honest_frames(seed: int) -> list[Honest]:
    """Return frames of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def masks(density: float) -> dict[str, Tensor]:
        return {
            name: torch.rand(shape, generator=generator) < density for name, shape in LAYERS.items()
        }

    def changed(old: Tensors, rate: float) -> dict[str, Tensor]:
        return {
            name: mask ^ (torch.rand(mask.shape, generator=generator) < rate)
            for name, mask in old.items()
        }

    def closed(all_masks: Tensors) -> dict[str, Tensor]:
        """Masks whose rows are off where their gates say so."""
        gates = all_masks["fc:filters"]
        return {**all_masks, "fc": all_masks["fc"] & gates.unsqueeze(1)}

    def floats() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}

    def under(support: Tensors) -> dict[str, Tensor]:
        return {
            name: values.sparse_mask(_sparse(support[name])) for name, values in floats().items()
        }

    frames: list[Honest] = []

    def add(
        name: str,
        tensors: Tensors,
        *,
        last: Honest | None = None,
        prior: Prior | None = None,
        first: Tensors | None = None,
        **how: Any,
    ) -> Honest:
        chain = () if last is None else (*last.chain, last.data)
        draft = Honest(name, b"", tensors, prior, first, chain)
        references = draft.expected()["references"]
        written = write_frame(
            tensors,
            sender=SENDER,
            round=ROUND - 2 + len(chain),
            fingerprint=FINGERPRINT,
            reference=references[0] if references else None,
            prior=prior,
            **how,
        )
        decoded = decode_frame(written.data, **draft.expected()).tensors  # int8 and the like round
        frames.append(replace(draft, data=written.data, tensors=decoded))
        return frames[-1]

    common = masks(0.3)
    add("packed masks", masks(0.3), packed=True)
    add("dense masks", masks(0.5))
    add("masks with one side rare", {**masks(0.01), "fc": ~masks(0.02)["fc"]}, prior=CLASSES)
    add("masks by classes", masks(0.2), prior=CLASSES)
    two_levels = closed(masks(0.3))
    levels = add("two-level masks", two_levels, prior=CLASSES)
    add("two-level masks, changed", closed(changed(two_levels, 0.01)), last=levels, prior=CLASSES)
    start = add("masks against the first", changed(common, 0.02), first=common, prior=CLASSES)
    delta = add(
        "flips by classes", changed(start.tensors, 0.02), last=start, first=common, prior=CLASSES
    )
    add("flips of flips", changed(delta.tensors, 0.02), last=delta, first=common, prior=CLASSES)
    plain = add("plain masks", masks(0.3))
    flips = add("plain flips", changed(plain.tensors, 0.01), last=plain)
    add("plain flips of flips", changed(flips.tensors, 0.01), last=flips)
    for precision in ("float32", "float16", "bfloat16", "int8"):
        add(f"{precision} values", floats(), precision=precision)
        support = masks(0.1)
        sparse = add(f"sparse {precision} values", under(support), precision=precision)
        add(
            f"changed sparse {precision} values",
            under(changed(support, 0.01)),
            last=sparse,
            precision=precision,
        )
    begun = floats()
    for precision in (name for name, codec in PRECISIONS.items() if codec.of_differences):
        key = add(f"{precision} from the first", floats(), first=begun, precision=precision)
        add(precision, floats(), last=key, first=begun, precision=precision)
    beside = {**changed(common, 0.01), "fc": floats()["fc"]}
    older = add("masks and values", {**common, "fc": floats()["fc"]}, prior=CLASSES)
    add("flips and differences", beside, last=older, prior=CLASSES, precision="int8-differences")
    add(
        "a mixture",
        {**masks(0.2), "conv": floats()["conv"], "head": under(masks(0.2))["head"]},
        prior=CLASSES,
    )
    return frames


def _sparse(support: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        support.nonzero().t(),
        torch.ones(int(support.sum())),
        support.shape,
        is_coalesced=True,
        check_invariants=False,
    )


# ---- mutants -------------------------------------------------------------------------


@dataclass
class Mutants:
    """Makes mutants of honest frames."""

    honest: Sequence[Honest]
    rng: random.Random
    headers: dict[str, FrameHeader] = field(init=False)

    def __post_init__(self) -> None:
        self.headers = {case.name: read_header(case.data, LAYERS) for case in self.honest}

    def make(self, case: Honest) -> bytes:
        """Return a frame that is not the honest one."""
        ways: list[Callable[[Honest], bytes]] = [
            self.flip_bits,
            self.change_bytes,
            self.change_line,
            self.change_field,
            self.cut,
            self.splice,
            self.insert,
            self.remove,
        ]
        data = self.rng.choices(ways, [3, 2, 3, 1, 1, 1, 1, 1])[0](case)
        if self.rng.random() < 0.1:
            data = self.rng.choice(ways[:2])(replace(case, data=data)) if data else data
        return data

    def place(self, case: Honest) -> int:
        """A place in a frame, as often in its short header as in its payload."""
        header = self.headers[case.name]
        begin = header.header_bytes - 8
        ranges = [
            (0, FIXED.size),
            (FIXED.size, begin),
            (begin, len(case.data)),
            (begin, len(case.data)),
        ]
        low, high = self.rng.choice(ranges)
        return min(self.rng.randrange(low, max(high, low + 1)), max(len(case.data) - 1, 0))

    def flip_bits(self, case: Honest) -> bytes:
        """Flip a few bits."""
        data = bytearray(case.data)
        for _ in range(self.rng.choice([1, 1, 1, 2, 8])):
            data[self.place(case)] ^= 1 << self.rng.randrange(8)
        return bytes(data)

    def change_bytes(self, case: Honest) -> bytes:
        """Change a few bytes."""
        data = bytearray(case.data)
        for _ in range(self.rng.choice([1, 1, 2, 4, 16])):
            data[self.place(case)] = self.rng.choice([0, 1, 127, 128, 255, self.rng.randrange(256)])
        return bytes(data)

    def cut(self, case: Honest) -> bytes:
        """Keep the beginning."""
        return case.data[: self.rng.randrange(len(case.data))]

    def splice(self, case: Honest) -> bytes:
        """Join the beginning of a frame to the end of another, or put a piece in."""
        other = self.rng.choice(self.honest)
        at, start = self.place(case), self.place(other)
        if self.rng.random() < 0.5:
            return case.data[:at] + other.data[start:]
        piece = other.data[start : start + self.rng.choice([4, 40, 400])]
        return (case.data[:at] + piece + case.data[at + len(piece) :])[: len(case.data)]

    def insert(self, case: Honest) -> bytes:
        """Insert random bytes; the frame grows, or loses as many at its end."""
        at = self.place(case)
        data = case.data[:at] + self.rng.randbytes(self.rng.choice([1, 4, 8, 100])) + case.data[at:]
        return self.rng.choice([data, data[: len(case.data)]])

    def remove(self, case: Honest) -> bytes:
        """Leave some bytes out."""
        at = self.place(case)
        return case.data[:at] + case.data[at + self.rng.choice([1, 4, 8, 100]) :]

    def change_field(self, case: Honest) -> bytes:
        """Change one field of the fixed header."""
        fields = list(FIXED.unpack_from(case.data))
        number = self.rng.randrange(len(fields))
        sizes = (4, 1, 1, 2, 4, 4, 4, 8, 8, 4)
        other = FIXED.unpack_from(self.rng.choice(self.honest).data)[number]
        if isinstance(fields[number], bytes):
            fields[number] = self.rng.choice([other, self.rng.randbytes(sizes[number])])
        else:
            most = 256 ** sizes[number] - 1
            near = (fields[number] + self.rng.choice([-1, 1])) % (most + 1)
            fields[number] = self.rng.choice([other, 0, 1, near, most, self.rng.randint(0, most)])
        return FIXED.pack(*fields) + case.data[FIXED.size :]

    def change_line(self, case: Honest) -> bytes:
        """Code one layer in another way, with a payload of the length then declared."""
        header, rng = self.headers[case.name], self.rng
        entries = list(header.layers)
        at = rng.randrange(len(entries))
        entry = entries[at]
        numel = int(np.prod(entry.shape or ()))
        numbers = [
            0,
            1,
            entry.num_listed,
            entry.num_values,
            numel // 16,
            numel // 3,
            numel,
            numel + 1,
        ]
        entries[at] = replace(
            entry,
            kind=rng.choice([entry.kind, rng.randrange(4)]),
            precision=rng.choice([entry.precision, None, *BY_CODE.values()]),
            with_classes=rng.choice([entry.with_classes, rng.random() < 0.5]),
            with_recent=rng.choice([entry.with_recent, rng.random() < 0.5]),
            num_listed=rng.choice([entry.num_listed, rng.choice(numbers)]),
            num_values=rng.choice([entry.num_values, rng.choice(numbers)]),
        )
        payload = case.data[header.header_bytes - 8 : -8]
        split = len(payload) - header.coded_bytes
        raw, coded = payload[:split], payload[split:]
        wanted = sum(entry.raw_bytes() for entry in entries)
        raw = (raw + rng.choice([bytes(wanted), rng.randbytes(wanted)]))[:wanted]
        coded = rng.choice(
            [coded, coded, b"", coded[: len(coded) // 8 * 4], rng.randbytes(len(coded))]
        )
        described = case.data[FIXED.size : header.header_bytes - 8 - self._lines(header)]
        lines = b"".join(entry.line() for entry in entries) + varint(len(coded))
        return case.data[: FIXED.size] + described + lines + raw + coded + case.data[-8:]

    @staticmethod
    def _lines(header: FrameHeader) -> int:
        return sum(len(entry.line()) for entry in header.layers) + len(varint(header.coded_bytes))


def sealed(data: bytes) -> bytes:
    """Return the frame with a length and a checksum that fit."""
    if len(data) < FIXED.size + 8:
        return data
    body = data[:36] + struct.pack("<I", len(data)) + data[40:-8]
    return body + hashlib.blake2b(body, digest_size=8).digest()


def with_content(data: bytes, expected: Mapping[str, Any]) -> bytes:
    """Return the frame with the digest of whatever it decodes to, if it decodes."""
    digests = []

    def note(parts: Any) -> bytes:
        digests.append(
            hashlib.blake2b(b"".join(bytes(part) for part in parts), digest_size=8).digest()
        )
        return digests[-1]

    try:
        with patch.object(reading, "digest", note):
            decode_frame(data, **expected)
    except Exception:
        pass  # if it is no FrameError, it comes again where the mutant is judged
    return bound(data, digests[-1]) if digests else data


def bound(data: bytes, content: bytes) -> bytes:
    """The frame with this content digest bound to its header, if it can be read."""
    try:
        payload, _ = open_frame(data, LAYERS)
    except Exception:
        return data
    header = data[: len(data) - 8 - len(payload)]
    return sealed(data[: CONTENT.start] + bind(content, header) + data[CONTENT.stop :])


# ---- what comes of them --------------------------------------------------------------


@dataclass
class Outcome:
    """What came of all mutants."""

    counts: Counter[str] = field(default_factory=Counter)
    deep: int = 0  # mutants whose layers were decoded, at least one of them
    failures: list[str] = field(default_factory=list)
    reached: bool = False  # the present one is among them
    slowest: float = 0.0  # seconds of processor time for one mutant
    honest_seconds: float = 0.0
    # bytes allocated for one mutant whose shapes were known, of those looked at
    largest: float = 0.0
    honest_bytes: float = 0.0


class Receiver:
    """Reads the mutants of one honest frame."""

    def __init__(self, case: Honest) -> None:
        self.case = case
        self.expected = case.expected()
        # no expectation of names and shapes
        self.open = {key: self.expected[key] for key in ("references", "prior")}
        self.box = case.mailbox()
        self.state = self.box.arrays()
        self.held = self.box.current([SENDER], round=ROUND).get(SENDER, {})

    def put(self, data: bytes) -> Tensors | None:
        """Put a mutant into the mailbox; return what it then holds if that changed."""
        try:
            self.box.put(SENDER, [data], latest_round=ROUND)
            current = self.box.current([SENDER], round=ROUND).get(SENDER, {})
        finally:
            self.box.restore(self.state)
        return None if _same(current, self.held) else current


def fuzz(frames: int, *, seed: int, seconds: float = float("inf")) -> Outcome:
    """Read mutants until there were so many or so much time has passed."""
    rng = random.Random(seed)
    honest = honest_frames(seed)
    mutants = Mutants(honest, rng)
    receivers = [Receiver(case) for case in honest]
    encoded = {mutants.headers[case.name].content: case.tensors for case in honest}
    outcome = Outcome()
    for receiver in receivers:
        read = _reading(receiver, receiver.case.data, "decode")
        outcome.honest_seconds = max(outcome.honest_seconds, min(_timed(read) for _ in range(3)))
        outcome.honest_bytes = max(outcome.honest_bytes, _peak(read))
    with patch.object(reading, "_read_layer", _noting(outcome)):
        _try_all(frames, seconds, mutants, receivers, encoded, outcome)
    return outcome


def _noting(outcome: Outcome) -> Callable[..., Any]:
    """Return the function that decodes a layer, noting that a mutant got so far."""
    read_layer = reading._read_layer

    def noting(*args: Any) -> Any:
        outcome.reached = True
        return read_layer(*args)

    return noting


def _try_all(
    frames: int,
    seconds: float,
    mutants: Mutants,
    receivers: Sequence[Receiver],
    encoded: Mapping[str, Tensors],
    outcome: Outcome,
) -> None:
    rng = mutants.rng
    end = time.monotonic() + seconds
    number = 0
    while number < frames and time.monotonic() < end and len(outcome.failures) < 20:
        receiver = rng.choice(receivers)
        data = mutants.make(receiver.case)
        fits, forged = rng.random() < 0.5, False
        how = rng.choice(["decode", "decode", "open", "mailbox"])
        if fits:
            data = sealed(data)
        if fits and rng.random() < 0.2:
            changed = with_content(data, receiver.expected)
            forged, data = changed != data, changed
        elif fits and how != "open" and rng.random() < 0.2:
            # who knows names and shapes does not depend on the header being bound
            data = bound(data, bytes.fromhex(mutants.headers[receiver.case.name].content))
        if data in {receiver.case.data, *receiver.case.chain}:
            continue
        outcome.reached = False
        _judge(
            outcome,
            receiver,
            data,
            how,
            encoded,
            forged=forged,
            fits=fits,
            examine=number % EXAMINE == 0,
        )
        outcome.deep += outcome.reached
        number += 1


def _reading(receiver: Receiver, data: bytes, how: str) -> Callable[[], Tensors | None]:
    if how == "mailbox":
        return lambda: receiver.put(data)
    return lambda: (
        decode_frame(data, **(receiver.open if how == "open" else receiver.expected)).tensors
    )


def _judge(
    outcome: Outcome,
    receiver: Receiver,
    data: bytes,
    how: str,
    encoded: Mapping[str, Tensors],
    *,
    forged: bool,
    fits: bool,
    examine: bool,
) -> None:
    tensors: list[Tensors | None] = []
    result, peak = "accepted", 0.0

    def read() -> None:
        nonlocal result
        try:
            tensors.append(_reading(receiver, data, how)())
        except FrameError as error:
            result = type(error).__name__

    def fail(what: str) -> None:
        outcome.failures.append(f"{receiver.case.name}, {how}, {what}: {data.hex()}")

    try:
        if examine:
            peak = _peak(read)
            spent = 0.0
        else:
            spent = _timed(read)
    except BaseException as error:  # a panic of the coder is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        fail(repr(error)[:300])
        return
    decoded = tensors[0] if tensors else None
    if decoded is not None and not forged and not _as_encoded(decoded, encoded.get(_content(data))):
        fail("other tensors than were encoded")
    if decoded is not None and forged:
        result = "accepted with a forged digest"
    if tensors and decoded is None:
        result = "nothing new"
    outcome.counts[("good checksum" if fits else "as damaged") + ": " + result] += 1
    outcome.slowest = max(outcome.slowest, spent)
    if spent > max(SECONDS, SLOWER * outcome.honest_seconds):
        fail(f"{spent:.1f} s")
    limit = MEMORY * outcome.honest_bytes
    if how == "open":
        limit = 32.0 * (FREE_WEIGHTS + WEIGHTS_PER_BYTE * len(data))
    else:
        outcome.largest = max(outcome.largest, peak)
    if peak > limit:
        fail(f"{peak:.0f} bytes")


def _timed(read: Callable[[], object]) -> float:
    start = time.thread_time()
    read()
    return time.thread_time() - start


def _peak(read: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        read()
        return float(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def _content(data: bytes) -> str:
    """The content digest that a frame names; empty if it cannot be read."""
    try:
        return read_header(data, LAYERS).content
    except FrameError:
        return ""


def _as_encoded(decoded: Tensors, wanted: Tensors | None) -> bool:
    return wanted is not None and _same(decoded, wanted)


def _same(left: Tensors, right: Tensors) -> bool:
    if left.keys() != right.keys():
        return False
    pairs = [(left[name], right[name]) for name in left]
    return all(
        a.shape == b.shape and a.layout == b.layout and _contents(a) == _contents(b)
        for a, b in pairs
    )


def _contents(tensor: Tensor) -> tuple[bytes, bytes]:
    """Return which elements are on, and the values of those."""
    if tensor.layout is torch.strided:
        return b"", tensor.numpy().tobytes()
    places = (
        np.ravel_multi_index(tuple(tensor.indices().numpy()), tensor.shape)
        if tensor.shape
        else np.zeros(0)
    )
    return places.tobytes(), tensor.values().numpy().tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--frames", type=int, default=1_000_000, help="mutants to try (default: 1000000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other mutants (default: 0)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long (default: never)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    outcome = fuzz(options.frames, seed=options.seed, seconds=options.seconds)
    print(
        f"{sum(outcome.counts.values()):,} mutants, seed {options.seed}, "
        f"{time.monotonic() - start:.0f} s"
    )
    for result, count in sorted(outcome.counts.items()):
        print(f"  {count:>9,}  {result}")
    print(f"{outcome.deep:,} of them came as far as the decoding of a layer")
    print(
        f"slowest: {1000 * outcome.slowest:.1f} ms; honest {1000 * outcome.honest_seconds:.1f} ms"
    )
    print(f"largest: {outcome.largest / 1000:.0f} kB; honest {outcome.honest_bytes / 1000:.0f} kB")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"the process: {before / 1000:.0f} MB before, {after / 1000:.0f} MB at most")
    for failure in outcome.failures:
        print(f"FAILED {failure}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
