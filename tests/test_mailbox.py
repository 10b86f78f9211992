import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_mcepl import errors
from flower_mcepl.mailbox import Mailbox
from flower_mcepl.wire import encode_frame

quick = settings(deadline=None, max_examples=60)

FINGERPRINT = "0123456789abcdef" * 2
LAYERS = {"conv": (2, 3), "fc": (5,)}
OWNER = 0


def masks(sender: int, round: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * sender + round)
    return {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in LAYERS.items()}


def frame(sender: int, round: int, **other: str) -> bytes:
    return encode_frame(masks(sender, round), sender=sender, round=round, **{"fingerprint": FINGERPRINT, **other})


def mailbox(max_staleness: int = 2) -> Mailbox:
    return Mailbox(owner=OWNER, fingerprint=FINGERPRINT, layers=LAYERS, max_staleness=max_staleness)


def assert_holds(box: Mailbox, sender: int, round: int) -> None:
    held = box.current([sender], round=round)[sender]
    assert all(torch.equal(held[name], mask) for name, mask in masks(sender, round).items())


def test_newest_frame_counts() -> None:
    box = mailbox()
    box.put(1, frame(1, 4), latest_round=4)
    box.put(1, frame(1, 5), latest_round=6)
    assert_holds(box, 1, 5)
    assert box.rounds() == {1: 5}


OTHER_BITS = encode_frame(masks(1, 9), sender=1, round=4, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(("data", "round"), [(frame(1, 3), 3), (OTHER_BITS, 4)])
def test_not_newer_is_replayed(data: bytes, round: int) -> None:
    box = mailbox()
    box.put(1, frame(1, 4), latest_round=4)
    with pytest.raises(errors.ReplayedFrameError, match=f"of sender 1 it holds round 4 and round {round} came"):
        box.put(1, data, latest_round=9)
    assert_holds(box, 1, 4)


def test_the_frame_that_is_held_may_come_again() -> None:
    box = mailbox()
    for _ in range(2):
        box.put(1, frame(1, 4), latest_round=4)
    assert_holds(box, 1, 4)


FLOATS = encode_frame(
    {name: torch.zeros(shape) for name, shape in LAYERS.items()}, sender=1, round=5, fingerprint=FINGERPRINT
)
OTHER_LAYERS = encode_frame({"fc": masks(1, 5)["fc"]}, sender=1, round=5, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("sender", "data", "error"),
    [
        (1, frame(1, 6), errors.FutureFrameError),
        (1, frame(2, 5), errors.ForeignFrameError),
        (OWNER, frame(OWNER, 5), errors.ForeignFrameError),
        (1, frame(1, 5, fingerprint="f" * 32), errors.ForeignFrameError),
        (1, OTHER_LAYERS, errors.ForeignFrameError),
        (1, FLOATS, errors.ForeignFrameError),
        (1, frame(1, 5)[:-1], errors.TruncatedFrameError),
        (1, b"", errors.TruncatedFrameError),
        (1, frame(1, 5) + b"\0", errors.CorruptFrameError),
        (1, frame(1, 3), errors.ReplayedFrameError),
    ],
)
def test_refusals_leave_the_mailbox_as_it_was(sender: int, data: bytes, error: type[Exception]) -> None:
    box = mailbox()
    box.put(1, frame(1, 4), latest_round=5)
    box.put(2, frame(2, 5), latest_round=5)
    before = box.frames()
    with pytest.raises(error):
        box.put(sender, data, latest_round=5)
    assert box.frames() == before
    assert box.rounds() == {1: 4, 2: 5}


def test_any_type_when_told_so() -> None:
    box = Mailbox(owner=OWNER, fingerprint=FINGERPRINT, layers=LAYERS, max_staleness=0, dtype=None)
    box.put(1, FLOATS, latest_round=5)
    assert box.current([1], round=5)[1]["fc"].dtype == torch.float32


@quick
@given(
    held=st.dictionaries(st.integers(1, 4), st.integers(0, 6)),
    asked=st.lists(st.integers(0, 6), max_size=6),
    round=st.integers(0, 8),
    max_staleness=st.integers(0, 3),
    has_default=st.booleans(),
)
def test_staleness_matches_the_rule(
    held: dict[int, int], asked: list[int], round: int, max_staleness: int, has_default: bool
) -> None:
    box = mailbox(max_staleness)
    for sender, sent in held.items():
        box.put(sender, frame(sender, sent), latest_round=6)
    default = masks(99, 0) if has_default else None
    heard = {s: held[s] for s in asked if s in held}
    unheard = {s: 0 for s in asked if s not in held and s != OWNER and has_default}
    expected = sorted(s for s, r in {**heard, **unheard}.items() if 0 <= round - r <= max_staleness)
    current = box.current(asked, round=round, default=default)
    assert list(current) == expected
    for sender in expected:
        truth = masks(sender, held[sender]) if sender in held else masks(99, 0)
        assert all(torch.equal(current[sender][name], mask) for name, mask in truth.items())


def test_boundaries() -> None:
    box, first = mailbox(2), masks(99, 0)
    box.put(1, frame(1, 4), latest_round=4)
    assert [list(box.current([1], round=t)) for t in (3, 4, 6, 7)] == [[], [1], [1], []]
    assert [list(box.current([2], round=t, default=first)) for t in (0, 2, 3)] == [[2], [2], []]
    fresh = mailbox(0)
    fresh.put(1, frame(1, 4), latest_round=5)
    assert [list(fresh.current([1], round=t)) for t in (4, 5)] == [[1], []]


def test_stale_sender_does_not_fall_back_to_the_default() -> None:
    box = mailbox(9)
    box.put(1, frame(1, 4), latest_round=4)
    assert box.current([1], round=3, default=masks(99, 0)) == {}


def test_decoded_masks_are_the_readers_own() -> None:
    box = mailbox()
    data = bytearray(frame(1, 4))
    box.put(1, data, latest_round=4)
    data[:] = bytes(len(data))
    box.current([1], round=4)[1]["fc"].fill_(True)
    assert_holds(box, 1, 4)
    box.frames().clear()
    box.rounds().clear()
    assert_holds(box, 1, 4)


def test_save_and_restore() -> None:
    box, other = mailbox(), mailbox()
    for sender, round in ((3, 4), (1, 5)):
        box.put(sender, frame(sender, round), latest_round=5)
    other.put(2, frame(2, 2), latest_round=5)
    other.restore(box.frames())
    assert other.frames() == box.frames() == {1: frame(1, 5), 3: frame(3, 4)}
    assert list(box.frames()) == list(box.rounds()) == [1, 3]
    with pytest.raises(errors.ReplayedFrameError):
        other.put(1, frame(1, 4), latest_round=5)


@pytest.mark.parametrize("bad", [{2: frame(2, 5)[:-3]}, {2: frame(1, 5)}, {OWNER: frame(OWNER, 5)}, {2: OTHER_LAYERS}])
def test_damaged_state_is_refused_whole(bad: dict[int, bytes]) -> None:
    box = mailbox()
    box.put(1, frame(1, 4), latest_round=4)
    before = box.frames()
    with pytest.raises(errors.StateError, match="one good frame of each sender"):
        box.restore({3: frame(3, 5), **bad})
    assert box.frames() == before


@quick
@given(sent=st.integers(0, 9), now=st.integers(0, 12), later=st.integers(0, 4), max_staleness=st.integers(0, 3))
def test_forgetting_is_never_noticed(sent: int, now: int, later: int, max_staleness: int) -> None:
    full, lean = mailbox(max_staleness), mailbox(max_staleness)
    for box in (full, lean):
        box.put(1, frame(1, sent), latest_round=9)
    lean.forget(now)
    default = masks(99, 0)
    asked = now + later
    assert (
        full.current([1], round=asked, default=default).keys() == lean.current([1], round=asked, default=default).keys()
    )
    assert bool(lean.frames()) == (now - sent <= max_staleness)


def test_settings_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="at least 0; got -1"):
        mailbox(-1)
    with pytest.raises(errors.ConfigError, match="hex"):
        Mailbox(owner=0, fingerprint="none", layers=LAYERS, max_staleness=0)
