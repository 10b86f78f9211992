"""What one agent holds of its neighbors: the newest payload of each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.errors import (
    ConfigError,
    ForeignFrameError,
    FrameError,
    ReplayedFrameError,
)
from flower_mcepl.exchange.ages import check_decay, vote
from flower_mcepl.exchange.decoded import DecodedFrames, common_reference
from flower_mcepl.exchange.held import Held, check_finite, restore_held
from flower_mcepl.exchange.layer_lists import LayerLists, Layers
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
from flower_mcepl.wire.layout import most_bytes, name_frame

# an array of this name tells that a sender's frames no longer fit what is held
_DOUBTFUL = "doubtful"
_KEPT = "kept"  # and one of this name how many weights its masks keep
_decoded = DecodedFrames()


class Mailbox:
    """Newest payload of every neighbor, kept packed until it is used.

    A payload of round ``r`` has the age ``a = t - r`` in round ``t``. It counts when
    ``0 <= a <= max_staleness``, with the vote ``λ^a``. A neighbor that was never heard
    of counts as holding the common first payload, sent in round 0, under the same rule.
    Where senders have rounds of their own, ``r`` is the owner's round that was going on
    when the payload came to the relay.

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
    run : str (default: "")
        Id of the run that every frame must belong to, as in `decode_frame`.
    lists : sequence of mappings (default: ())
        Where senders hold different parts of a network: the layers that a frame may
        have, each list by names and shapes; ``layers`` is one of them.
    age_decay : float (default: 1.0)
        λ in (0, 1]: what a vote is multiplied by for each round of its age.
    float_types : Mapping[str, torch.dtype] (default: all float32)
        What the floats of a layer stand for, where that is another type
        (`agents.parts.words`): it is those that must be finite.

    Raises
    ------
    ConfigError
        If ``max_staleness``, ``fingerprint`` or ``age_decay`` is out of range.
    """

    def __init__(
        self,
        *,
        owner: int,
        fingerprint: str,
        layers: Layers,
        max_staleness: int,
        dtype: torch.dtype | None = torch.bool,
        prior: Prior | None = None,
        first: Mapping[str, Tensor] | None = None,
        run: str = "",
        lists: Sequence[Layers] = (),
        age_decay: float = 1.0,
        float_types: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        check_decay(age_decay)
        if max_staleness < 0:
            raise ConfigError(
                f"max_staleness is a number of rounds, at least 0; got {max_staleness}. 0 takes "
                "fresh frames only."
            )
        self._owner = owner
        self._fingerprint = check_fingerprint(fingerprint)
        self._lists = LayerLists(layers, lists, fingerprint=self._fingerprint, prior=prior)
        self._layers = self._lists.all  # those that a payload lacks are absent from what is held
        self._max_staleness, self._age_decay, self.run = max_staleness, age_decay, run
        self._most_bytes = most_bytes(
            sum(map(math.prod, self._layers.values())), only_masks=dtype == torch.bool
        )
        self._dtype, self._prior, self._first = dtype, prior, first
        self._first_versions = _versions(first or {})
        self._float_types = float_types
        self._held: dict[int, Held] = {}
        self._unpacked: dict[int, Reference | None] = {}  # just come, asked for at once
        self._doubtful: set[int] = set()  # senders that a whole frame is wanted of
        # sender -> weights that each of its masks keeps, as far as they were told
        self._kept: dict[int, list[int]] = {}

    def put(
        self,
        sender: int,
        frames: Sequence[FrameBytes],
        *,
        latest_round: int | None,
        kept: Sequence[int] | None = None,
        came: int | None = None,
    ) -> None:
        """Take in frames of one sender, oldest first.

        Each builds on the one before, or on what is held.
        Those no newer than what is held change nothing, as when an answer was lost.

        Parameters
        ----------
        sender : int
            The agent they are said to come from.
        frames : sequence of bytes, bytearray, memoryview or numpy uint8 array
            The frames, as they came.
        latest_round : int | None
            The newest round they may come from; None: any.
        kept : sequence of int | None (default: None)
            Weights that each of the sender's masks keeps from now on, layers sorted by
            name, as its handshake says. None: no news.
        came : int | None (default: None)
            The owner's round in which they came; None: the round that each says.

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
        # Frames of a sender that lost its state build on payloads nobody holds, and
        # one whose content is refused leaves a gap for those that build on it. Such a
        # sender is doubtful: what is held of it stays in use while it is fresh enough,
        # but the relay is no longer told of it (see `rounds`), so that a chain from a
        # whole frame comes next. That frame may be as old as what is held, if the chain
        # leads on to a newer one. Older news are never taken: no round comes twice.
        if kept is not None:
            self._kept[sender] = list(kept)
        held = self._held.get(sender)
        known = held
        newest, doubtful = -1, sender in self._doubtful
        for data in frames:
            self._check_size(sender, data)
            payload, header = check_frame(
                data,
                fingerprint=self._fingerprint,
                layers=self._lists.of(data, run=self.run),
                dtype=self._dtype,
                sender=sender,
                latest_round=latest_round,
                prior=self._prior,
                run=self.run,
            )
            newest = header.round
            is_new = held is None or newest > held.round
            if not is_new and not doubtful:
                continue
            try:
                fresh, unpacked = self._unpack(data, payload, header, known)
                self._check_kept(sender, fresh)
            except FrameError:
                self._doubtful.add(sender)
                raise
            known = fresh
            if is_new:
                held, doubtful = fresh if came is None else replace(fresh, came=came), False
                self._held[sender], self._unpacked[sender] = held, unpacked
                self._doubtful.discard(sender)
        if frames and held is not None and newest < held.round + doubtful:
            raise ReplayedFrameError(
                f"agent {self._owner} takes only frames newer than what it holds of a sender; of "
                f"sender {sender} it holds round {held.round} and round {newest} came. "
                "Nothing is lost: drop the older."
            )

    def _check_size(self, sender: int, data: FrameBytes) -> None:
        if len(data) > self._most_bytes:
            raise ForeignFrameError(
                f"a frame of this network has at most {self._most_bytes} bytes; one of sender "
                f"{sender} has {len(data)}. Give both agents the same model."
            )

    def _check_kept(self, sender: int, came: Held) -> None:
        """Check that each mask keeps as many weights as its sender's retention says."""
        due = self._kept.get(sender)
        if due is None:
            return
        if not came.keeps(due, self._layers):
            counts = came.counts(self._layers)
            raise ForeignFrameError(
                f"{name_frame(sender, came.round)} must keep as many weights of each layer as "
                f"its sender's retention says, {due!s:.200}; it keeps {counts!s:.200}. Look at "
                "the sender."
            )

    @cached_property
    def _common(self) -> list[Reference]:
        """The common first payload, if there is one."""
        return [] if self._first is None else [common_reference(self._first)]

    def _unpack(
        self, data: FrameBytes, payload: memoryview, header: FrameHeader, known: Held | None
    ) -> tuple[Held, Reference | None]:
        """Payload of a frame, decoded once in a process; unpacked, too, the first time.

        ``known`` is what is held of its sender.
        """
        held = [] if known is None else [known]
        builds = header.reference is not None  # then digests are worth taking
        references = [(past.round, past.identity) for past in held if builds]
        references += [(first.round, first.content) for first in self._common if builds]
        key = DecodedFrames.key(data, header, references, self._lists.digest)
        decoded = _decoded.get(key)
        if decoded is not None:
            return decoded, None
        usable = [*(past.reference(self._layers) for past in held), *self._common]
        frame = unpack_frame(payload, header, references=usable, prior=self._prior)
        reference = frame.as_reference()
        who = name_frame(header.sender, header.round)
        check_finite(reference.tensors, who, types=self._float_types)
        decoded = Held.of(reference, self._layers)
        _decoded.put(key, decoded)
        return decoded, reference

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
            Agent to its tensors, agents ascending; the first payload itself, no copy.
        """
        payloads: dict[int, Mapping[str, Tensor]] = {}
        for sender in sorted({*neighbors} - {self._owner}):
            held = self._held.get(sender)
            if not 0 <= self._age(sender, round=round) <= self._max_staleness:
                continue
            if held is not None:
                payloads[sender] = (
                    self._unpacked.pop(sender, None) or held.reference(self._layers)
                ).tensors
            elif self._first is not None:
                payloads[sender] = self._first
        return payloads

    def check_first(self) -> None:
        """Refuse a first payload that is no longer the one that all agents know.

        Raises
        ------
        ConfigError
            If one of its tensors was changed in place.
        """
        if _versions(self._first or {}) != self._first_versions:
            raise ConfigError(
                f"the first payload is what all agents know; one of agent {self._owner}'s tensors "
                "was changed in place since. Let first_payload return copies and not the weights "
                "that train, and let fuse leave what it hears as it is."
            )

    def votes(self, senders: Iterable[int], *, round: int) -> dict[int, float]:
        """Votes of payloads of `current` that are not whole, by agent."""
        votes = {
            sender: vote(self._age(sender, round=round), age_decay=self._age_decay)
            for sender in senders
        }
        return {sender: share for sender, share in votes.items() if share != 1}

    def _age(self, sender: int, *, round: int) -> int:
        """Age of what is held of a sender, the common first payload included."""
        held = self._held.get(sender)
        return round - (0 if held is None else held.since)

    def doubts(self, sender: int) -> bool:
        """Whether a whole frame of the sender is wanted."""
        return sender in self._doubtful

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
            if self._age(s, round=older_than) <= self._max_staleness
        }
        self._doubtful &= self._held.keys()
        self._kept = {s: kept for s, kept in self._kept.items() if s in self._held}
        self._unpacked = {}

    def arrays(self) -> Arrays:
        """All that is held, by names such as ``"3/bits"``; `restore` takes it back."""
        held = {
            f"{sender}/{name}": array
            for sender, held in sorted(self._held.items())
            for name, array in held.arrays().items()
        }
        doubtful = sorted(self._doubtful & self._held.keys())
        kept = {
            f"{sender}/{_KEPT}": np.array(counts, np.int64)
            for sender, counts in sorted(self._kept.items())
            if sender in self._held
        }
        return {
            **held,
            **{f"{sender}/{_DOUBTFUL}": np.ones(1, np.uint8) for sender in doubtful},
            **kept,
        }

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
        self._kept = {
            s: [int(count) for count in arrays[f"{s}/{_KEPT}"].reshape(-1)]
            for s in self._held
            if f"{s}/{_KEPT}" in arrays
        }


def _versions(payload: Mapping[str, Tensor]) -> list[int]:
    """How often each tensor was changed in place, as torch counts it."""
    return [tensor._version for tensor in payload.values()]
