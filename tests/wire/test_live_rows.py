"""Frames of two-level masks: bits of rows that are on, and of no others."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl.errors import CorruptFrameError, FutureFrameError
from flower_mcepl.masks.gates import GATES
from flower_mcepl.wire import Prior, Reference, decode_frame, encode_frame, layout, read_header
from flower_mcepl.wire.groups import Classes
from tests.wire.test_frames import forged

FINGERPRINT = 32 * "a"
ROWS, COLUMNS = 40, 50
SHAPES = {"w": (ROWS, COLUMNS), "w:filters": (ROWS,)}
PRIOR = Prior({"w": (torch.arange(ROWS * COLUMNS) % 3).to(torch.uint8).view(ROWS, COLUMNS)})


def two_levels(share: float, seed: int = 0) -> dict[str, Tensor]:
    """Half of the weights in a share of the rows."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.zeros(ROWS, dtype=torch.bool)
    gates[torch.randperm(ROWS, generator=generator)[: round(share * ROWS)]] = True
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.5
    return {"w": mask & gates.unsqueeze(1), "w:filters": gates}


def flipped(tensors: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    flips = torch.rand(ROWS, COLUMNS, generator=generator) < rate
    return {**tensors, "w": (tensors["w"] ^ flips) & tensors["w:filters"].unsqueeze(1)}


def encode(tensors: Mapping[str, Tensor], reference: Reference | None = None) -> bytes:
    return encode_frame(
        tensors, sender=3, round=7, fingerprint=FINGERPRINT, reference=reference, prior=PRIOR
    )


def is_live(frame: bytes) -> list[bool]:
    return [entry.among_live for entry in read_header(frame, SHAPES).layers]


def test_masks_and_wire_name_gates_alike() -> None:
    assert GATES == layout.GATES


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_a_whole_frame_costs_a_bit_for_each_live_weight(share: float) -> None:
    frame = encode(two_levels(share))
    assert is_live(frame) == [True, False]
    header = read_header(frame)
    payload = 8 * (len(frame) - header.header_bytes)
    assert payload < 1.03 * (share * ROWS * COLUMNS + ROWS) + 96


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_flips_cost_their_entropy_among_live_weights(share: float) -> None:
    old = two_levels(share)
    new = flipped(old, 0.05)
    frame = encode(new, Reference(6, old))
    assert is_live(frame) == [True, False]
    header = read_header(frame, SHAPES)
    entropy = -0.05 * math.log2(0.05) - 0.95 * math.log2(0.95)
    payload = 8 * (len(frame) - header.header_bytes)
    assert payload < 1.1 * entropy * share * ROWS * COLUMNS + 200


def test_rows_that_close_and_open_come_out_right() -> None:
    """Also a frame after it, whose recent flips both ends must number alike."""
    frames = [two_levels(0.5, seed) for seed in (1, 2)] + [flipped(two_levels(0.5, 2), 0.02)]
    held = Reference(5, frames[0])
    for round, tensors in enumerate(frames[1:], start=6):
        data = encode_frame(
            tensors, sender=3, round=round, fingerprint=FINGERPRINT, reference=held, prior=PRIOR
        )
        came = decode_frame(data, layers=SHAPES, references=[held], prior=PRIOR, run=None)
        assert all(torch.equal(came.tensors[name], tensor) for name, tensor in tensors.items())
        held = came.as_reference()


def test_without_rows_that_are_off_frames_are_as_ever() -> None:
    open_all = {"w": two_levels(1.0)["w"], "w:filters": torch.ones(ROWS, dtype=torch.bool)}
    assert is_live(encode(open_all)) == [False, False]
    stray = two_levels(0.5)
    stray["w"][~stray["w:filters"]] = True
    assert is_live(encode(stray)) == [False, False]
    came = decode_frame(encode(stray), prior=PRIOR).tensors
    assert torch.equal(came["w"], stray["w"])


def line_at(frame: bytes) -> int:
    """Where the line of layer w begins."""
    names = sum(3 + len(name) + 4 * len(shape) for name, shape in SHAPES.items())
    return 40 + 16 + names


def test_gates_that_turn_nothing_off_are_refused() -> None:
    """A line that says that rows are off, and gates by which none is."""
    tensors = {"w": two_levels(1.0)["w"] & (torch.rand(ROWS, COLUMNS) < 0.05)}
    tensors["w:filters"] = torch.ones(ROWS, dtype=torch.bool)
    frame = encode(tensors)
    at = line_at(frame)
    assert frame[at] >> 3 & 3 == 2
    with pytest.raises(CorruptFrameError, match="said to be off by a mask w:filters"):
        decode_frame(forged(frame, at, bytes([frame[at] & ~0x20 | 0x80])))


def test_packed_bits_of_live_rows_are_of_the_future() -> None:
    frame = encode_frame(two_levels(0.5), sender=3, round=7, fingerprint=FINGERPRINT, packed=True)
    at = line_at(frame)
    assert frame[at] == 8
    with pytest.raises(FutureFrameError, match="coding 0x88 in layer 'w'"):
        decode_frame(forged(frame, at, b"\x88"))


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    data=st.data(),
)
def test_classes_among_live_weights_are_those_of_them_alone(
    labels: list[int], data: st.DataObject
) -> None:
    live = np.array(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))))
    numbers = np.array(labels, np.uint8)
    some, alone = Classes.of(numbers).among(live), Classes.of(numbers[live])
    assert np.array_equal(some.order, alone.order)
    assert np.array_equal(some.place, alone.place)
    # the classes that no live weight has stay, empty
    assert np.array_equal(np.diff(some.starts)[: len(alone.starts) - 1], np.diff(alone.starts))
