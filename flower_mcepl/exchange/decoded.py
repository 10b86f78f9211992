"""Cache of decoded frames, for agents that live in one process."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import final

from torch import Tensor

from flower_mcepl.exchange.held import Held
from flower_mcepl.wire.layout import FrameBytes, FrameHeader, digest
from flower_mcepl.wire.payload import Reference, support_of, values_of

Key = tuple[bytes, str]


@final
class DecodedFrames:
    """Payloads of the last frames, by a frame's bytes and what the frame builds on.

    A frame says by digest which weights, layers and classes it presumes, so equal bytes
    on an equal reference decode to equal payloads. Only frames with range-coded bits
    are kept: the others decode as fast as they are found.

    Parameters
    ----------
    most_bytes : int (default: 64 MiB)
        Bytes of frames and payloads to keep; the least recently used go first.
    """

    def __init__(self, most_bytes: int = 1 << 26) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._found: OrderedDict[Key, Held] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(
        data: FrameBytes,
        header: FrameHeader,
        references: Sequence[tuple[int, str]],
        within: str = "",
    ) -> Key | None:
        """Return what a checked frame is kept under; None if it is not to be kept.

        ``references`` are round and identity of what the receiver may decode it with,
        in the order of `unpack_frame`; ``within`` stands for the layers among which the
        payload is held, where those are more than its own.
        """
        if not header.coded_bytes:
            return None
        if header.reference is None:
            return bytes(data), within
        identity = next((known for round, known in references if round == header.reference), "")
        return (bytes(data), within + identity) if identity else None

    def get(self, key: Key | None) -> Held | None:
        """Return the payload under that key, if it is still there."""
        with self._lock:
            if key is None or key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key]

    def put(self, key: Key | None, held: Held) -> None:
        """Keep a payload."""
        if key is None:
            return
        with self._lock:
            self._drop(key)
            self._found[key] = held
            self._num_bytes += _num_bytes(key, held)
            while self._num_bytes > self._most_bytes:
                self._drop(next(iter(self._found)))

    def _drop(self, key: Key) -> None:
        if key in self._found:
            self._num_bytes -= _num_bytes(key, self._found.pop(key))


def _num_bytes(key: Key, held: Held) -> int:
    return len(key[0]) + sum(array.nbytes for array in held.arrays().values())


def common_reference(first: Mapping[str, Tensor]) -> Reference:
    """The common first payload as a reference, with a content to be known by.

    It came in no frame, so its content is of another form than that of a frame.
    """
    return Reference(0, first, content="first " + digest(_pieces(first)).hex())


def _pieces(payload: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    for name in sorted(payload):
        support, values = support_of(payload[name]), values_of(payload[name])
        about = name, tuple(payload[name].shape), support is None, values is None
        yield repr(about).encode()
        yield from (array.data for array in (support, values) if array is not None)
