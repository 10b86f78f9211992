"""The wire: masks and float tensors as framed bytes, far below one bit per weight."""

from flower_mcepl.wire.layout import (
    WIRE_VERSION,
    FrameBytes,
    FrameHeader,
    LayerEntry,
    check_fingerprint,
)
from flower_mcepl.wire.opening import check_frame, read_header
from flower_mcepl.wire.payload import Reference
from flower_mcepl.wire.reading import Frame, decode_frame, unpack_frame
from flower_mcepl.wire.support import Prior
from flower_mcepl.wire.values import PRECISIONS, Codec
from flower_mcepl.wire.writing import WrittenFrame, encode_frame, write_frame

__all__ = [
    "PRECISIONS",
    "WIRE_VERSION",
    "Codec",
    "Frame",
    "FrameBytes",
    "FrameHeader",
    "LayerEntry",
    "Prior",
    "Reference",
    "WrittenFrame",
    "check_fingerprint",
    "check_frame",
    "decode_frame",
    "encode_frame",
    "read_header",
    "unpack_frame",
    "write_frame",
]
