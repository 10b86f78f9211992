"""Envelope of a frame: Flower carries byte arrays in NumPy's ``.npy`` format."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flower_mcepl.errors import CorruptFrameError


def raw_array(data: bytes, make: Callable[..., Any]) -> Any:
    """Array of Flower's, by its class ``make``, of bytes as they are.

    NumPy's format, in which Flower carries arrays, would copy them twice more.
    """
    return make(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)


def open_envelope(data: bytes) -> bytes:
    """Frame inside an ``.npy`` array of uint8, whose declared lengths are not believed.

    `numpy.load` allocates what the header asks for before it reads; a short message
    could so ask for terabytes.

    Raises
    ------
    CorruptFrameError
        If the bytes are anything but one whole one-dimensional uint8 array.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"its npy version is {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # whatever numpy's parser raises on foreign bytes
        raise CorruptFrameError(
            "a frame must come as an npy array of uint8, but its header is damaged: "
            f"{error!s:.100}."
        ) from None
    rest = len(data) - stream.tell()
    if dtype != np.uint8 or len(shape) != 1 or math.prod(shape) != rest:
        raise CorruptFrameError(
            "a frame must come as a one-dimensional uint8 array of its own length; its header "
            f"says {dtype!s:.40} {tuple(shape)!s:.40}, and {rest} bytes follow. The sender must "
            "run flower_mcepl's client."
        )
    return data[stream.tell() :]
