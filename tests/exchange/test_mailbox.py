"""What an agent holds of its neighbors: chains of frames, what it names, and what it
refuses.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import errors
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.wire import Prior, Reference, encode_frame, write_frame

quick = settings(deadline=None, max_examples=60)

FINGERPRINT = "0123456789abcdef" * 2
LAYERS = {"conv": (20, 3), "fc": (500,)}
OWNER = 0


@cache
def masks(sender: int, round: int) -> dict[str, Tensor]:
    """What a sender sends in a round: another twentieth of its mask flips each time."""
    generator = torch.Generator().manual_seed(1000 * sender + round)
    share = 0.05 if round else 0.3
    changed = {
        name: torch.rand(shape, generator=generator) < share for name, shape in LAYERS.items()
    }
    return (
        {name: masks(sender, round - 1)[name] ^ flips for name, flips in changed.items()}
        if round
        else changed
    )


FIRST = masks(99, 0)


def frame(sender: int, round: int, **other: Any) -> bytes:
    return encode_frame(
        masks(sender, round), sender=sender, round=round, **{"fingerprint": FINGERPRINT, **other}
    )


def chain(sender: int, *rounds: int, key: bool = True) -> list[bytes]:
    """Frames of these rounds, each built on the one before; the first is a key, or left
    out.
    """
    frames: list[bytes] = []
    reference = None
    for round in rounds:
        written = write_frame(
            masks(sender, round),
            sender=sender,
            round=round,
            fingerprint=FINGERPRINT,
            reference=reference,
        )
        assert written.reference == (None if reference is None else reference.round)
        reference = Reference(round, masks(sender, round), written.flips)
        frames.append(written.data)
    return frames[not key :]


def mailbox(max_staleness: int = 2, **options: Any) -> Mailbox:
    return Mailbox(
        **{
            "owner": OWNER,
            "fingerprint": FINGERPRINT,
            "layers": LAYERS,
            "max_staleness": max_staleness,
            **options,
        }
    )


def assert_holds(box: Mailbox, sender: int, round: int) -> None:
    held = box.current([sender], round=round)[sender]
    assert held.keys() == LAYERS.keys()
    assert all(torch.equal(held[name], mask) for name, mask in masks(sender, round).items())


def saved(box: Mailbox) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in box.arrays().items()}


def test_newest_frame_counts() -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=4)
    box.put(1, [frame(1, 5)], latest_round=6)
    assert_holds(box, 1, 5)
    assert box.rounds() == {1: 5}


def test_no_frames_change_nothing() -> None:
    box = mailbox()
    box.put(1, [], latest_round=4)
    assert (box.rounds(), box.arrays()) == ({}, {})


@pytest.mark.parametrize("frames", [[frame(1, 3)], chain(1, 2, 3), chain(1, 1, 2, 3, key=False)])
def test_older_is_replayed(frames: list[bytes]) -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=4)
    with pytest.raises(
        errors.ReplayedFrameError,
        match=r"of sender 1 it holds round 4 and round 3 came\. Nothing is",
    ):
        box.put(1, frames, latest_round=9)
    assert_holds(box, 1, 4)
    assert box.rounds() == {1: 4}


OTHER_BITS = encode_frame(masks(1, 9), sender=1, round=4, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("again", [frame(1, 4), OTHER_BITS, chain(1, 3, 4, key=False)[0]])
def test_a_frame_of_the_round_that_is_held_changes_nothing(again: bytes) -> None:
    box = mailbox()
    for data in (frame(1, 4), again):
        box.put(1, [data], latest_round=4)
    assert_holds(box, 1, 4)
    assert box.rounds() == {1: 4}


FLOATS = encode_frame(
    {name: torch.zeros(shape) for name, shape in LAYERS.items()},
    sender=1,
    round=5,
    fingerprint=FINGERPRINT,
)
OTHER_LAYERS = encode_frame({"fc": masks(1, 5)["fc"]}, sender=1, round=5, fingerprint=FINGERPRINT)
OTHER_PRIOR = Prior({name: torch.ones(shape, dtype=torch.uint8) for name, shape in LAYERS.items()})


@pytest.mark.parametrize(
    ("sender", "data", "error"),
    [
        (1, frame(1, 6), errors.FutureFrameError),
        (1, frame(2, 5), errors.ForeignFrameError),
        (OWNER, frame(OWNER, 5), errors.ForeignFrameError),
        (1, frame(1, 5, fingerprint="f" * 32), errors.ForeignFrameError),
        (1, frame(1, 5, prior=OTHER_PRIOR), errors.ForeignFrameError),
        (1, OTHER_LAYERS, errors.ForeignFrameError),
        (1, FLOATS, errors.ForeignFrameError),
        (1, frame(1, 5)[:-1], errors.TruncatedFrameError),
        (1, b"", errors.TruncatedFrameError),
        (1, frame(1, 5) + b"\0", errors.CorruptFrameError),
        (1, frame(1, 3), errors.ReplayedFrameError),
    ],
)
def test_refusals_leave_the_mailbox_as_it_was(
    sender: int, data: bytes, error: type[Exception]
) -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=5)
    box.put(2, [frame(2, 5)], latest_round=5)
    before = saved(box)
    with pytest.raises(error):
        box.put(sender, [data], latest_round=5)
    assert saved(box) == before
    assert box.rounds() == {1: 4, 2: 5}


def test_any_type_when_told_so() -> None:
    box = mailbox(0, dtype=None)
    box.put(1, [FLOATS], latest_round=5)
    assert box.current([1], round=5)[1]["fc"].dtype == torch.float32


@quick
@given(
    held=st.dictionaries(st.integers(1, 4), st.integers(0, 6)),
    asked=st.lists(st.integers(0, 6), max_size=6),
    round=st.integers(0, 8),
    max_staleness=st.integers(0, 3),
    has_first=st.booleans(),
)
def test_staleness_matches_the_rule(
    held: dict[int, int], asked: list[int], round: int, max_staleness: int, has_first: bool
) -> None:
    box = mailbox(max_staleness, first=FIRST if has_first else None)
    for sender, sent in held.items():
        box.put(sender, [frame(sender, sent)], latest_round=6)
    heard = {s: held[s] for s in asked if s in held}
    unheard = {s: 0 for s in asked if s not in held and s != OWNER and has_first}
    expected = sorted(s for s, r in {**heard, **unheard}.items() if 0 <= round - r <= max_staleness)
    current = box.current(asked, round=round)
    assert list(current) == expected
    for sender in expected:
        truth = masks(sender, held[sender]) if sender in held else FIRST
        assert all(torch.equal(current[sender][name], mask) for name, mask in truth.items())


def test_boundaries() -> None:
    box = mailbox(2)
    box.put(1, [frame(1, 4)], latest_round=4)
    assert [list(box.current([1], round=t)) for t in (3, 4, 6, 7)] == [[], [1], [1], []]
    with_first = mailbox(2, first=FIRST)
    assert [list(with_first.current([2], round=t)) for t in (0, 2, 3)] == [[2], [2], []]
    fresh = mailbox(0)
    fresh.put(1, [frame(1, 4)], latest_round=5)
    assert [list(fresh.current([1], round=t)) for t in (4, 5)] == [[1], []]


def test_the_first_payload_is_handed_out_as_it_is() -> None:
    assert mailbox(first=FIRST).current([3], round=1)[3] is FIRST
    assert mailbox(first=FIRST).rounds() == {}  # everyone knows it: no need to name it


def test_stale_sender_does_not_fall_back_to_the_first_payload() -> None:
    box = mailbox(9, first=FIRST)
    box.put(1, [frame(1, 4)], latest_round=4)
    assert box.current([1], round=3) == {}


def test_decoded_masks_are_the_readers_own() -> None:
    box = mailbox()
    data = bytearray(frame(1, 4))
    box.put(1, [data], latest_round=4)
    data[:] = bytes(len(data))
    box.current([1], round=4)[1]["fc"].fill_(True)
    assert_holds(box, 1, 4)
    box.arrays().clear()
    box.rounds().clear()
    assert_holds(box, 1, 4)


# --- chains ---


def test_a_chain_is_read_in_one_go() -> None:
    box = mailbox()
    box.put(1, chain(1, 2, 3, 4, 5), latest_round=5)
    assert_holds(box, 1, 5)
    assert box.rounds() == {1: 5}


@pytest.mark.parametrize("known", [2, 3, 4, 5])
def test_of_a_chain_that_is_partly_known_only_the_rest_is_read(known: int) -> None:
    """The relay does not know what came with a message whose answer was lost."""
    frames = chain(1, 1, 2, 3, 4, 5)
    box = mailbox()
    box.put(1, frames[:known], latest_round=5)
    box.put(1, frames[1:], latest_round=5)
    assert_holds(box, 1, 5)


def test_a_key_in_the_middle_of_a_chain() -> None:
    box = mailbox()
    box.put(1, [*chain(1, 1, 2), *chain(1, 4, 5)], latest_round=5)
    assert_holds(box, 1, 5)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_parts_of_a_chain_in_any_messages_lead_to_the_newest_mask(data: st.DataObject) -> None:
    rounds = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6, unique=True).map(sorted))
    frames = chain(1, *rounds)
    box, known = mailbox(9), 0
    while known < len(rounds):
        start = data.draw(st.integers(0, known))
        end = data.draw(st.integers(max(known, start + 1), len(rounds)))
        if end > known or start < end == known:
            box.put(1, frames[start:end], latest_round=9)
        known = max(known, end)
        assert box.rounds() == {1: rounds[known - 1]}
        assert_holds(box, 1, rounds[known - 1])


def test_a_delta_may_build_on_the_first_payload() -> None:
    delta = write_frame(
        masks(99, 2), sender=1, round=3, fingerprint=FINGERPRINT, reference=Reference(0, FIRST)
    )
    assert delta.reference == 0
    box = mailbox(first=FIRST)
    box.put(1, [delta.data], latest_round=3)
    held = box.current([1], round=3)[1]
    assert all(torch.equal(held[name], mask) for name, mask in masks(99, 2).items())
    with pytest.raises(errors.MissingReferenceError, match="builds on round 0"):
        mailbox().put(1, [delta.data], latest_round=3)


def test_frames_before_a_bad_one_count_and_the_others_do_not() -> None:
    frames = chain(1, 1, 2, 3, 4)
    frames[2] = frames[2][:-1]
    box = mailbox()
    with pytest.raises(errors.TruncatedFrameError):
        box.put(1, frames, latest_round=4)
    assert_holds(box, 1, 2)
    assert box.rounds() == {1: 2}  # what it holds is sound: the rest of the chain will do
    box.put(1, chain(1, 1, 2, 3, 4)[2:], latest_round=4)
    assert_holds(box, 1, 4)


# --- senders in doubt ---


def unfit_delta(sender: int, round: int, builds_on: int) -> bytes:
    """A sound frame of a sender that remembers another mask than it sent."""
    elsewhere = Reference(builds_on, masks(sender, builds_on + 20))
    data = write_frame(
        masks(sender, builds_on + 21),
        sender=sender,
        round=round,
        fingerprint=FINGERPRINT,
        reference=elsewhere,
    )
    assert data.reference == builds_on
    return data.data


@pytest.mark.parametrize(
    "bad", [chain(1, 3, 5, key=False), [unfit_delta(1, 5, 4)]], ids=["not held", "misfit"]
)
def test_a_delta_that_does_not_fit_puts_its_sender_in_doubt_until_a_key_comes(
    bad: list[bytes],
) -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=5)
    box.put(2, [frame(2, 5)], latest_round=5)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, bad, latest_round=5)
    assert box.rounds() == {2: 5}  # the relay will send what stands alone
    assert_holds(box, 1, 4)  # and meanwhile the last good mask stays in use
    box.put(1, chain(1, 5, 6), latest_round=6)
    assert box.rounds() == {1: 6, 2: 5}
    assert_holds(box, 1, 6)


def test_a_doubtful_sender_is_mended_by_a_key_as_old_as_what_is_held() -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=5)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, [unfit_delta(1, 5, 4)], latest_round=5)
    box.put(1, chain(1, 3, 4, 5), latest_round=5)
    assert box.rounds() == {1: 5}
    assert_holds(box, 1, 5)


def test_doubt_survives_a_save() -> None:
    """On a device every message is a process of its own."""
    box, later = mailbox(9), mailbox(9)
    box.put(1, [frame(1, 4)], latest_round=5)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, [unfit_delta(1, 5, 4)], latest_round=5)
    later.restore(box.arrays())
    assert later.rounds() == {}
    assert_holds(later, 1, 4)
    later.put(1, chain(1, 3, 4, 5), latest_round=5)
    assert later.rounds() == {1: 5}
    assert_holds(later, 1, 5)
    later.restore(later.arrays())
    assert later.rounds() == {1: 5}


def test_a_delta_of_someone_never_heard_of() -> None:
    box = mailbox(first=FIRST)
    with pytest.raises(
        errors.MissingReferenceError,
        match=r"builds on round 4, and the rounds held .* are: 0\. The",
    ):
        box.put(1, chain(1, 4, 5, key=False), latest_round=5)
    assert box.rounds() == {}
    assert list(box.current([1], round=1)) == [1]  # the first payload still counts, while it may
    box.put(1, chain(1, 4, 5), latest_round=5)
    assert_holds(box, 1, 5)


def test_doubt_goes_with_what_is_forgotten() -> None:
    box = mailbox(1)
    box.put(1, [frame(1, 4)], latest_round=5)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, [unfit_delta(1, 5, 4)], latest_round=5)
    box.forget(older_than=6)
    box.put(1, [frame(1, 6)], latest_round=6)
    assert box.rounds() == {1: 6}


@pytest.mark.parametrize("replay", [1, 2, 3, 4])
def test_doubt_makes_no_older_frame_welcome(replay: int) -> None:
    """A relay that holds back round 5 cannot make round 6 lead back to an older one."""
    box = mailbox(9)
    box.put(1, [frame(1, 4)], latest_round=4)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, chain(1, 5, 6, key=False), latest_round=6)
    assert box.doubts(1)
    for _ in range(2):
        with pytest.raises(errors.ReplayedFrameError):
            box.put(1, [frame(1, replay)], latest_round=6)
    assert_holds(box, 1, 4)
    box.put(1, [frame(1, 6)], latest_round=6)
    assert_holds(box, 1, 6)
    assert not box.doubts(1)


# --- what a sender may send ---

FLOATS_OF = {name: torch.ones(shape) for name, shape in LAYERS.items()}


def kept_by(payload: Mapping[str, Tensor]) -> list[int]:
    return [int(payload[name].sum()) for name in sorted(LAYERS)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_values_that_are_not_finite_leave_the_last_good_ones(value: float, sparse: bool) -> None:
    box = mailbox(9, dtype=None)

    def sent(round: int, one: float) -> bytes:
        fc = FLOATS_OF["fc"].clone()
        fc[17] = one
        payload = {**FLOATS_OF, "fc": fc.to_sparse() if sparse else fc}
        return encode_frame(payload, sender=1, round=round, fingerprint=FINGERPRINT)

    box.put(1, [sent(3, 2.0)], latest_round=3)
    with pytest.raises(errors.CorruptFrameError, match=r"values must be finite.*layer 'fc'"):
        box.put(1, [sent(4, value)], latest_round=4)
    assert box.rounds() == {}  # a whole frame is wanted: nothing builds on what was refused
    assert box.doubts(1)
    assert box.current([1], round=4)[1]["fc"].to_dense()[17] == 2
    box.put(1, [sent(5, 3.0)], latest_round=5)
    assert box.current([1], round=5)[1]["fc"].to_dense()[17] == 3


@pytest.mark.parametrize("fraud", ["all", "none", "one more"])
def test_masks_keep_as_many_weights_as_their_sender_said(fraud: str) -> None:
    honest = masks(1, 4)
    other = {
        "all": {name: torch.ones_like(mask) for name, mask in honest.items()},
        "none": {name: torch.zeros_like(mask) for name, mask in honest.items()},
        "one more": {**honest, "fc": honest["fc"].clone().index_fill_(0, first_off(honest), True)},
    }[fraud]
    forged = encode_frame(other, sender=1, round=5, fingerprint=FINGERPRINT)
    moved = {name: mask.roll(1, 0) for name, mask in honest.items()}  # as many, elsewhere
    box, later = mailbox(9), mailbox(9)
    box.put(1, [frame(1, 4)], latest_round=5, kept=kept_by(honest))
    later.restore(box.arrays())  # what was said outlives the process
    for receiver in (box, later):
        with pytest.raises(errors.ForeignFrameError, match="as many weights of each layer"):
            receiver.put(1, [forged], latest_round=5)
        assert_holds(receiver, 1, 4)
        receiver.put(
            1,
            [encode_frame(moved, sender=1, round=6, fingerprint=FINGERPRINT)],
            latest_round=6,
        )
        assert receiver.rounds() == {1: 6}
    # who introduces itself anew may say otherwise, but keeps one weight at least
    anew = encode_frame(other, sender=1, round=7, fingerprint=FINGERPRINT)
    if fraud == "none":
        with pytest.raises(errors.ForeignFrameError):
            box.put(1, [anew], latest_round=7, kept=kept_by(other))
    else:
        box.put(1, [anew], latest_round=7, kept=kept_by(other))
        assert box.rounds() == {1: 7}


def first_off(mask: Mapping[str, Tensor]) -> Tensor:
    return (~mask["fc"]).nonzero()[0]


def test_masks_of_which_nothing_was_said_may_vary() -> None:
    box = mailbox()
    box.put(1, [frame(1, 4)], latest_round=5)
    assert kept_by(masks(1, 4)) != kept_by(masks(1, 5))
    box.put(1, [frame(1, 5)], latest_round=5)
    assert_holds(box, 1, 5)


def test_a_frame_larger_than_the_network_is_not_opened() -> None:
    box = mailbox()
    with pytest.raises(errors.ForeignFrameError, match=r"at most 262704 bytes; .* has 262705\."):
        box.put(1, [bytes(2**18 + 560 + 1)], latest_round=5)


# --- state ---


def test_save_and_restore() -> None:
    box, other = mailbox(), mailbox()
    for sender, round in ((3, 4), (1, 5)):
        box.put(sender, [frame(sender, round)], latest_round=5)
    other.put(2, [frame(2, 2)], latest_round=5)
    other.restore(box.arrays())
    assert saved(other) == saved(box)
    assert list(other.rounds().items()) == list(box.rounds().items()) == [(1, 5), (3, 4)]
    with pytest.raises(errors.ReplayedFrameError):
        other.put(1, [frame(1, 4)], latest_round=5)


def with_recent(round: int) -> list[bytes]:
    """A chain in whose frames the same weights flip again and again, so that each
    presumes the one before.
    """
    prior, at = torch.Generator().manual_seed(3), masks(5, 0)
    hot = {name: torch.rand(mask.shape, generator=prior) < 0.06 for name, mask in at.items()}
    frames, reference = [], None
    for t in range(1, round + 1):
        at = {
            name: mask ^ (hot[name] & (torch.rand(mask.shape, generator=prior) < 0.6))
            for name, mask in at.items()
        }
        written = write_frame(at, sender=5, round=t, fingerprint=FINGERPRINT, reference=reference)
        reference = Reference(t, at, written.flips)
        frames.append(written.data)
    return frames


def test_a_chain_goes_on_after_a_restore_in_its_middle() -> None:
    frames = with_recent(6)
    through, kept = mailbox(9), mailbox(9)
    for data in frames:
        through.put(5, [data], latest_round=6)
        kept.put(5, [data], latest_round=6)
        renewed = mailbox(9)
        renewed.restore({name: array.copy() for name, array in kept.arrays().items()})
        kept = renewed
    assert any(name.endswith("/flips") and array.size for name, array in kept.arrays().items())
    assert saved(kept) == saved(through)
    assert kept.rounds() == {5: 6}


def test_the_flips_that_are_kept_are_those_that_the_next_frame_presumes() -> None:
    *known, last = with_recent(6)
    box = mailbox(9)
    box.put(5, known, latest_round=6)
    arrays = box.arrays()
    box.put(5, [last], latest_round=6)
    assert box.rounds() == {5: 6}
    forgetful = mailbox(9)
    forgetful.restore({**arrays, "5/flips": np.zeros(0, np.uint32)})
    with pytest.raises(errors.MissingReferenceError):
        forgetful.put(5, [last], latest_round=6)


def spoiled(name: str, change: Any) -> dict[str, Any]:
    box = mailbox()
    box.put(2, chain(2, 4, 5), latest_round=5)
    arrays: dict[str, Any] = {key: array.copy() for key, array in box.arrays().items()}
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    return arrays


@pytest.mark.parametrize(
    "bad",
    [
        *(spoiled(f"2/{part}", None) for part in ("round", "kinds", "bits", "values", "flips")),
        *(
            spoiled(f"2/{part}", lambda array: array.astype(np.int16))
            for part in ("kinds", "bits", "values", "flips")
        ),
        *(
            spoiled(f"2/{part}", lambda array: array.reshape(1, -1))
            for part in ("kinds", "bits", "values", "flips")
        ),
        spoiled("2/round", lambda array: array[:0]),
        spoiled("2/kinds", lambda array: array[:1]),
        spoiled("2/kinds", lambda array: array + 1),
        spoiled("2/kinds", lambda array: array + 7),
        spoiled("2/bits", lambda array: array[:-3]),
        spoiled("2/bits", lambda array: np.concatenate([array, array])),
        spoiled("2/values", lambda array: np.ones(3, np.float32)),
        spoiled("2/flips", lambda array: array[::-1].copy()),
        spoiled("2/flips", lambda array: np.array([560], np.uint32)),
        spoiled("2/flips", lambda array: np.array([3, 3], np.uint32)),
        {"two/bits": np.zeros(3, np.uint8)},
        {"bits": np.zeros(3, np.uint8)},
        {"": np.zeros(3, np.uint8)},
    ],
)
def test_damaged_state_is_refused_whole(bad: dict[str, Any]) -> None:
    box, good = mailbox(), mailbox()
    box.put(1, [frame(1, 4)], latest_round=4)
    good.put(3, [frame(3, 5)], latest_round=5)
    before = saved(box)
    with pytest.raises(errors.StateError, match="the mailbox of agent 0, number"):
        box.restore({**good.arrays(), **bad})
    assert saved(box) == before
    assert box.rounds() == {1: 4}


@quick
@given(
    sent=st.integers(0, 9),
    now=st.integers(0, 12),
    later=st.integers(0, 4),
    max_staleness=st.integers(0, 3),
)
def test_forgetting_is_noticed_only_where_the_first_payload_counts(
    sent: int, now: int, later: int, max_staleness: int
) -> None:
    full, lean = (mailbox(max_staleness, first=FIRST) for _ in range(2))
    for box in (full, lean):
        box.put(1, [frame(1, sent)], latest_round=9)
    lean.forget(now)
    asked = now + later
    assert full.current([1], round=asked).keys() == lean.current([1], round=asked).keys()
    assert bool(lean.arrays()) == bool(lean.rounds()) == (now - sent <= max_staleness)


def test_settings_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="at least 0; got -1"):
        mailbox(-1)
    with pytest.raises(errors.ConfigError, match="hex"):
        mailbox(fingerprint="none")


# --- what floats bring ---


def payloads(round: int) -> dict[str, Tensor]:
    """One dense and one sparse layer of floats."""
    support = masks(1, round)["conv"]
    return {
        "conv": (support * (support.cumsum(0) + 0.5)).to_sparse_coo().coalesce(),
        "fc": torch.rand(500) + round,
    }


def dense(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.to_dense() for name, tensor in tensors.items()}


def test_masks_with_values_travel_as_changes_of_the_mask() -> None:
    box = mailbox(9, dtype=None)
    reference: Sequence[Any] = [None]
    for round in (3, 4, 5):
        sent = payloads(round)
        written = write_frame(
            sent, sender=1, round=round, fingerprint=FINGERPRINT, reference=reference[0]
        )
        reference = [Reference(round, copy.deepcopy(sent), written.flips)]
        assert written.reference == (None if round == 3 else round - 1)
        box.put(1, [written.data], latest_round=round)
        renewed = mailbox(9, dtype=None)
        renewed.restore(box.arrays())
        for held in (box, renewed):
            found, truth = dense(held.current([1], round=round)[1]), dense(sent)
            assert all(torch.equal(found[name], truth[name]) for name in truth)
        box = renewed


# --- senders that hold different parts of a network ---

PARTS = [{"conv": (20, 3), "exit": (7,)}, {"conv": (20, 3), "fc": (500,), "head": (9, 2)}]


@cache
def part_masks(part: int, round: int) -> dict[str, Tensor]:
    """What the holder of a part sends: another twentieth of it flips each time."""
    generator = torch.Generator().manual_seed(10 * part + round)
    drawn = {name: torch.rand(shape, generator=generator) for name, shape in PARTS[part].items()}
    if not round:
        return {name: draw < 0.5 for name, draw in drawn.items()}
    return {name: mask ^ (drawn[name] < 0.05) for name, mask in part_masks(part, round - 1).items()}


def part_chain(sender: int, part: int, *rounds: int, run: str = "") -> list[bytes]:
    """Frames of a sender that holds one of the parts, each built on the one before."""
    frames, reference = [], None
    for round in rounds:
        written = write_frame(
            part_masks(part, round),
            sender=sender,
            round=round,
            fingerprint=FINGERPRINT,
            reference=reference,
            run=run,
        )
        reference = Reference(round, part_masks(part, round), written.flips)
        frames.append(written.data)
    return frames


def parts_box(own: int = 0, **options: Any) -> Mailbox:
    return mailbox(layers=PARTS[own], lists=PARTS, **options)


def assert_has(box: Mailbox, sender: int, part: int, round: int) -> None:
    held = box.current([sender], round=round)[sender]
    due = part_masks(part, round)
    assert held.keys() == due.keys()
    assert all(torch.equal(held[name], mask) for name, mask in due.items())


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("part", [0, 1])
def test_a_frame_is_read_by_its_senders_layers(own: int, part: int) -> None:
    box = parts_box(own)
    box.put(1, part_chain(1, part, 3, 4), latest_round=4)
    assert_has(box, 1, part, 4)
    box.put(1, part_chain(1, part, 4, 5)[1:], latest_round=5)
    assert_has(box, 1, part, 5)
    copy = parts_box(own)
    copy.restore(box.arrays())
    copy.put(1, part_chain(1, part, 5, 6)[1:], latest_round=6)
    assert_has(copy, 1, part, 6)


def test_a_layer_of_another_part_counts_no_weights() -> None:
    box = parts_box()
    kept = [int(part_masks(1, 3)[name].sum()) for name in sorted(PARTS[1])]
    box.put(1, part_chain(1, 1, 3), latest_round=3, kept=kept)
    with pytest.raises(errors.ForeignFrameError, match="must keep as many weights"):
        box.put(2, part_chain(2, 0, 3), latest_round=3, kept=kept)


def test_a_delta_without_its_frame_is_missing_a_reference_at_any_depth() -> None:
    box = parts_box()
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, part_chain(1, 1, 3, 4)[1:], latest_round=4)
    assert box.doubts(1)


def test_a_delta_of_another_part_than_what_is_held_fits_nothing() -> None:
    box = parts_box()
    box.put(1, part_chain(1, 0, 3), latest_round=3)
    with pytest.raises(errors.MissingReferenceError):
        box.put(1, part_chain(1, 1, 3, 4)[1:], latest_round=4)
    assert_has(box, 1, 0, 3)


def test_layers_that_no_part_has_are_foreign() -> None:
    box = parts_box()
    with pytest.raises(errors.ForeignFrameError, match="must have the receiver's layers"):
        box.put(1, [frame(1, 3)], latest_round=3)
    with pytest.raises(errors.ForeignFrameError, match="of the receiver's run"):
        box.put(1, part_chain(1, 0, 3, run="0" * 15 + "1"), latest_round=3)
    with pytest.raises(errors.FrameError):
        box.put(1, [b"MCPL"], latest_round=3)


def test_the_same_frame_is_held_among_the_layers_of_each_mailbox() -> None:
    """What one mailbox has decoded serves no other that holds more."""
    frames = part_chain(1, 0, 3)
    small, large = mailbox(layers=PARTS[0]), parts_box()
    for box in (small, large):
        box.put(1, frames, latest_round=3)
        assert_has(box, 1, 0, 3)
