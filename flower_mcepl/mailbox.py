"""What one agent holds of its neighbours: the newest frame of each, as it came."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flower_mcepl.errors import ConfigError, ForeignFrameError, FrameError, ReplayedFrameError, StateError
from flower_mcepl.wire import Frame, FrameBytes, check_fingerprint, decode_frame


class Mailbox:
    """The newest frame of every neighbour, kept packed and decoded only when it is used.

    A frame of round ``r`` counts in round ``t`` when ``0 <= t - r <= max_staleness``. A neighbour that was
    never heard of counts as holding a default, sent in round 0, under the same rule.

    Parameters
    ----------
    owner : int
        Index of the agent whose mailbox this is.
    fingerprint : str
        Fingerprint of the shared frozen weights, 32 lower-case hex digits.
    layers : Mapping[str, tuple[int, ...]]
        Names and shapes of the layers that every frame must have.
    max_staleness : int
        How many rounds a frame stays usable, >= 0; 0 means only in the round it was sent in.
    dtype : torch.dtype | None (default: torch.bool)
        The type that every layer must have; None takes whatever a frame can carry.

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
    ) -> None:
        if max_staleness < 0:
            raise ConfigError(
                f"max_staleness is a number of rounds, at least 0; got {max_staleness}. 0 takes fresh frames only."
            )
        self._owner = owner
        self._fingerprint = check_fingerprint(fingerprint)
        self._layers = {name: tuple(shape) for name, shape in layers.items()}
        self._max_staleness = max_staleness
        self._dtype = dtype
        self._frames: dict[int, bytes] = {}
        self._rounds: dict[int, int] = {}

    def put(self, sender: int, frame: FrameBytes, *, latest_round: int) -> None:
        """Take in a frame, in place of the older one of the same sender.

        The very frame that is held may come again, as when an answer to the relay was lost: nothing changes.

        Parameters
        ----------
        sender : int
            The agent it is said to come from.
        frame : bytes, bytearray, memoryview or numpy uint8 array
            The frame, as it came.
        latest_round : int
            The newest round it may come from.

        Raises
        ------
        FrameError
            If the frame is refused; the mailbox is then as it was.
        """
        round = self._decode(sender, frame, latest_round=latest_round).header.round
        held = self._rounds.get(sender)
        if self._frames.get(sender) == bytes(frame):
            return
        if held is not None and round <= held:
            raise ReplayedFrameError(
                f"agent {self._owner} takes only frames newer than the one it holds of a sender; of sender "
                f"{sender} it holds round {held} and round {round} came. Nothing is lost: drop the older one."
            )
        self._frames[sender] = bytes(frame)
        self._rounds[sender] = round

    def current(
        self, neighbors: Sequence[int], *, round: int, default: Mapping[str, Tensor] | None = None
    ) -> dict[int, Mapping[str, Tensor]]:
        """Decode what counts in this round.

        Parameters
        ----------
        neighbors : Sequence[int]
            The agents asked for; the owner is never among those returned.
        round : int
            The round that asks.
        default : Mapping[str, Tensor] | None (default: None)
            What a neighbour never heard of holds since round 0; it is handed out as it is, not copied. None
            leaves such a neighbour out.

        Returns
        -------
        dict[int, Mapping[str, Tensor]]
            Agent to its tensors, agents ascending.
        """
        found: dict[int, Mapping[str, Tensor]] = {}
        for sender in sorted({*neighbors} - {self._owner}):
            if not 0 <= round - self._rounds.get(sender, 0) <= self._max_staleness:
                continue
            if sender in self._frames:
                found[sender] = self._decode(sender, self._frames[sender]).tensors
            elif default is not None:
                found[sender] = default
        return found

    def rounds(self) -> dict[int, int]:
        """Return the round held of each sender, senders ascending."""
        return dict(sorted(self._rounds.items()))

    def frames(self) -> dict[int, bytes]:
        """Return the frame held of each sender, senders ascending; :meth:`restore` takes it back."""
        return dict(sorted(self._frames.items()))

    def restore(self, frames: Mapping[int, bytes]) -> None:
        """Hold exactly these frames, as saved by :meth:`frames`.

        Raises
        ------
        StateError
            If one of them is damaged or belongs elsewhere; the mailbox is then as it was.
        """
        rounds = {}
        for sender, frame in frames.items():
            try:
                rounds[sender] = self._decode(sender, frame).header.round
            except FrameError as error:
                raise StateError(
                    f"a saved mailbox holds one good frame of each sender; agent {self._owner} finds for "
                    f"sender {sender}: {error} Use the state that this agent saved for this model."
                ) from error
        self._frames = {sender: bytes(frame) for sender, frame in frames.items()}
        self._rounds = rounds

    def forget(self, older_than: int) -> None:
        """Drop every frame that is too old to count in round ``older_than`` or any later one.

        In a graph that changes, this keeps the memory to the senders of the last ``max_staleness`` rounds.
        What is dropped here never counts again, nor does its sender's default, nor that frame put in anew.
        """
        self._rounds = {s: r for s, r in self._rounds.items() if older_than - r <= self._max_staleness}
        self._frames = {s: self._frames[s] for s in self._rounds}

    def _decode(self, sender: int, frame: FrameBytes, *, latest_round: int | None = None) -> Frame:
        if sender == self._owner:
            raise ForeignFrameError(
                f"an agent takes frames of others only; agent {sender} was given one filed under "
                "itself. Look at the routing."
            )
        return decode_frame(
            frame,
            fingerprint=self._fingerprint,
            layers=self._layers,
            dtype=self._dtype,
            sender=sender,
            latest_round=latest_round,
        )
