"""What one agent holds of its neighbors: the newest payload of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.errors import (
    ConfigError,
    ForeignFrameError,
    MissingReferenceError,
    ReplayedFrameError,
    StateError,
)
from flower_mcepl.exchange.decoded import DecodedFrames, Key
from flower_mcepl.exchange.held import Held
from flower_mcepl.files.bundle import Arrays
from flower_mcepl.wire import (
    FrameBytes,
    FrameHeader,
    Prior,
    Reference,
    check_fingerprint,
    check_frame,
    unpack_frame,
)

# an array of this name tells that a sender's frames no longer fit what is held
_DOUBTFUL = "doubtful"
_decoded = DecodedFrames()


class Mailbox:
    """Newest payload of every neighbor, kept packed until it is used.

    A payload of round ``r`` counts in round ``t`` when ``0 <= t - r <= max_staleness``.
    A neighbor that was never heard of counts as holding the common first payload, sent
    in round 0, under the same rule.

    Parameters
    ----------
    owner : int
        Index of the agent whose mailbox this is.
    fingerprint : str
        Fingerprint of the shared frozen weights, 32 lower-case hex digits.
    layers : Mapping[str, tuple[int, ...]]
        Names and shapes of the layers that every frame must have.
    max_staleness : int
        How many rounds a payload stays usable, >= 0; 0 means only in the round it was
        sent in.
    dtype : torch.dtype | None (default: torch.bool)
        ``torch.bool`` takes masks only; None takes whatever a frame can carry.
    prior : Prior | None (default: None)
        Classes of weights that all agents know.
    first : Mapping[str, Tensor] | None (default: None)
        The common first payload; None leaves neighbors that were never heard of out.

    Raises
    ------
    ConfigError
        If ``max_staleness`` or ``fingerprint`` is out of range.
    """

    def __init__(
        self,
        *,
        owner: int,
        fingerprint: str,
        layers: Mapping[str, tuple[int, ...]],
        max_staleness: int,
        dtype: torch.dtype | None = torch.bool,
        prior: Prior | None = None,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        if max_staleness < 0:
            raise ConfigError(
                f"max_staleness is a number of rounds, at least 0; got {max_staleness}. 0 takes "
                "fresh frames only."
            )
        self._owner = owner
        self._fingerprint = check_fingerprint(fingerprint)
        self._layers = {name: tuple(shape) for name, shape in layers.items()}
        self._max_staleness = max_staleness
        self._dtype, self._prior, self._first = dtype, prior, first
        self._held: dict[int, Held] = {}
        # what has just come and will be asked for at once
        self._unpacked: dict[int, Reference] = {}
        self._doubtful: set[int] = set()  # senders whose frames no longer fit what is held of them

    def put(self, sender: int, frames: Sequence[FrameBytes], *, latest_round: int) -> None:
        """Take in frames of one sender, oldest first.

        Each builds on the one before, or on what is held.

        Frames that are not newer than what is held change nothing, as when an answer to
        the relay was lost and they come again.

        Parameters
        ----------
        sender : int
            The agent they are said to come from.
        frames : sequence of bytes, bytearray, memoryview or numpy uint8 array
            The frames, as they came.
        latest_round : int
            The newest round they may come from.

        Raises
        ------
        FrameError
            If one is refused, or all are older than what is held. Those before it
            count, the others do not.
        """
        if sender == self._owner:
            raise ForeignFrameError(
                f"an agent takes frames of others only; agent {sender} was given one filed under "
                "itself. Look at the routing."
            )
        # A sender that lost its state begins its rounds anew, and its frames then build
        # on payloads that nobody holds. Such a sender is doubtful: what is held of it
        # stays in use while it is fresh enough, but the relay is no longer told of it
        # (see `rounds`), so that a whole frame comes next, and that one is taken even
        # where its round is not newer than the one held.
        held = self._held.get(sender)
        known = [] if held is None else [held.reference(self._layers)]
        newest = -1
        for data in frames:
            payload, header = check_frame(
                data,
                fingerprint=self._fingerprint,
                layers=self._layers,
                dtype=self._dtype,
                sender=sender,
                latest_round=latest_round,
                prior=self._prior,
            )
            newest = header.round
            if known and newest <= known[0].round and sender not in self._doubtful:
                continue
            key = DecodedFrames.key(data, header, known[0] if known else None)
            reference, self._held[sender] = self._unpack(payload, header, known, key)
            self._unpacked[sender], known = reference, [reference]
            self._doubtful.discard(sender)
        if frames and known and newest < known[0].round:
            raise ReplayedFrameError(
                f"agent {self._owner} takes only frames newer than what it holds of a sender; of "
                f"sender {sender} it holds round {known[0].round} and round {newest} came. "
                "Nothing is lost: drop the older."
            )

    def _unpack(
        self, payload: memoryview, header: FrameHeader, known: Sequence[Reference], key: Key | None
    ) -> tuple[Reference, Held]:
        """Payload of a frame, unpacked and packed; decoded once in a process."""
        decoded = _decoded.get(key)
        if decoded is not None:
            return decoded.reference(self._layers), decoded
        first = [] if self._first is None else [Reference(0, self._first)]
        try:
            reference = unpack_frame(
                payload, header, references=[*known, *first], prior=self._prior
            ).as_reference()
        except MissingReferenceError:
            self._doubtful.add(header.sender)
            raise
        held = Held.of(reference, self._layers)
        _decoded.put(key, held)
        return reference, held

    def current(self, neighbors: Sequence[int], *, round: int) -> dict[int, Mapping[str, Tensor]]:
        """Unpack what counts in this round.

        Parameters
        ----------
        neighbors : Sequence[int]
            The agents asked for; the owner is never among those returned.
        round : int
            The round that asks.

        Returns
        -------
        dict[int, Mapping[str, Tensor]]
            Agent to its tensors, agents ascending. The first payload is handed out as
            it is, not copied.
        """
        payloads: dict[int, Mapping[str, Tensor]] = {}
        for sender in sorted({*neighbors} - {self._owner}):
            held = self._held.get(sender)
            if not 0 <= round - (held.round if held else 0) <= self._max_staleness:
                continue
            if held is not None:
                payloads[sender] = (
                    self._unpacked.pop(sender, None) or held.reference(self._layers)
                ).tensors
            elif self._first is not None:
                payloads[sender] = self._first
        return payloads

    def rounds(self) -> dict[int, int]:
        """Round of each sender's payload that its next frame may build on."""
        return {
            sender: held.round
            for sender, held in sorted(self._held.items())
            if sender not in self._doubtful
        }

    def forget(self, older_than: int) -> None:
        """Drop payloads that are too old to count in round ``older_than`` or later.

        In a graph that changes, this keeps the memory to the senders of the last
        ``max_staleness`` rounds.
        """
        self._held = {
            s: held
            for s, held in self._held.items()
            if older_than - held.round <= self._max_staleness
        }
        self._doubtful &= self._held.keys()
        self._unpacked = {}

    def arrays(self) -> Arrays:
        """All that is held, by names such as ``"3/bits"``; `restore` takes it back."""
        held = {
            f"{sender}/{name}": array
            for sender, held in sorted(self._held.items())
            for name, array in held.arrays().items()
        }
        doubtful = sorted(self._doubtful & self._held.keys())
        return {**held, **{f"{sender}/{_DOUBTFUL}": np.ones(1, np.uint8) for sender in doubtful}}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Hold exactly what :meth:`arrays` gave.

        Raises
        ------
        StateError
            If something in it is damaged or belongs elsewhere; the mailbox is then as
            it was.
        """
        self._held = restore_held(arrays, self._layers, f"the mailbox of agent {self._owner}")
        self._doubtful, self._unpacked = {s for s in self._held if f"{s}/{_DOUBTFUL}" in arrays}, {}


def restore_held(
    arrays: Mapping[str, NDArray[Any]], layers: Mapping[str, tuple[int, ...]], where: str
) -> dict[int, Held]:
    """Payload held under each number, from arrays by names such as ``"3/bits"``."""
    grouped: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        number, _, part = name.partition("/")
        grouped.setdefault(number, {})[part] = array
    held = {}
    for number, parts in grouped.items():
        try:
            held[int(number)] = Held.from_arrays(parts, layers)
        except (StateError, ValueError) as error:
            raise StateError(f"{where}, number {number}: {error}") from error
    return held
