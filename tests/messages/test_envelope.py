"""The npy envelope of frames: numpy's own output opens, nothing else does, and no
declared length is believed.
"""

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.errors import CorruptFrameError
from flower_mcepl.messages.envelope import open_envelope


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@given(st.binary(max_size=300))
def test_what_numpy_saves_opens(frame: bytes) -> None:
    assert open_envelope(npy(np.frombuffer(frame, np.uint8))) == frame


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptFrameError):
        open_envelope(data)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), np.uint8), np.zeros(4, np.int8), np.zeros(3), np.uint8(1)]
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(CorruptFrameError, match="one-dimensional uint8 array of its own length"):
        open_envelope(npy(array))


def test_every_cut_is_refused() -> None:
    data = npy(np.arange(20, dtype=np.uint8))
    for end in range(len(data)):
        with pytest.raises(CorruptFrameError):
            open_envelope(data[:end])


def test_a_header_that_asks_for_terabytes_allocates_nothing() -> None:
    data = npy(np.zeros(1, np.uint8)).replace(b"(1,), }" + b" " * 13, b"(9999999999999,), } ")
    assert b"9999999999999" in data
    tracemalloc.start()
    with pytest.raises(CorruptFrameError, match="9999999999999"):
        open_envelope(data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("shape", ["(" + "9," * 3000 + ")", "'" + "9" * 3000 + "'"])
def test_what_is_wrong_is_said_in_few_words(shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    envelope = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(CorruptFrameError) as caught:
        open_envelope(envelope)
    assert len(str(caught.value)) < 400
