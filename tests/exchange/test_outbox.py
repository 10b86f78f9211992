"""What an agent sends: deltas against what the relay has, whole frames where there is
nothing or one is asked for.
"""

from collections.abc import Callable
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
from flower_mcepl.exchange.outbox import Outbox
from flower_mcepl.wire import PRECISIONS, Prior, WrittenFrame, read_header

FINGERPRINT = "0123456789abcdef" * 2
LAYERS = {"conv": (20, 3), "fc": (500,)}
OWNER = 4
PRIOR = Prior(
    {
        name: torch.arange(np.prod(shape)).reshape(shape).to(torch.uint8) % 3
        for name, shape in LAYERS.items()
    }
)


@cache
def masks(round: int) -> dict[str, Tensor]:
    """Masks of which a part flips each round, always among the same few weights."""
    generator = torch.Generator().manual_seed(7)
    found = {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in LAYERS.items()}
    hot = {name: torch.rand(shape, generator=generator) < 0.04 for name, shape in LAYERS.items()}
    for _ in range(round):
        found = {
            name: m ^ (hot[name] & (torch.rand(m.shape, generator=generator) < 0.7))
            for name, m in found.items()
        }
    return found


FIRST = masks(0)


def outbox(**options: Any) -> Outbox:
    given_all: dict[str, Any] = {
        "owner": OWNER,
        "fingerprint": FINGERPRINT,
        "layers": LAYERS,
        "first": FIRST,
    }
    return Outbox(**{**given_all, **options})


def mailbox(**options: Any) -> Mailbox:
    given_all: dict[str, Any] = {
        "owner": 0,
        "fingerprint": FINGERPRINT,
        "layers": LAYERS,
        "max_staleness": 99,
        "first": FIRST,
        "dtype": None,
    }
    return Mailbox(**{**given_all, **options})


def assert_arrives(box: Mailbox, frames: list[bytes], tensors: dict[str, Tensor]) -> None:
    box.put(OWNER, frames, latest_round=99)
    round = read_header(frames[-1]).round
    found = box.current([OWNER], round=round)[OWNER]
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name].to_dense(), tensor.to_dense()) for name, tensor in tensors.items()
    )


def built_on(frames: list[WrittenFrame]) -> list[int | None]:
    return [frame.reference for frame in frames]


def test_each_frame_builds_on_the_one_before() -> None:
    out, box = outbox(), mailbox()
    acknowledged = None
    for round in range(1, 8):
        frames = out.write(masks(round), round=round, acknowledged=acknowledged)
        assert built_on(frames) == [round - 1]  # 0 is the common first payload
        assert_arrives(box, [frames[0].data], masks(round))
        acknowledged = round


def test_without_a_first_payload_the_first_frame_is_whole() -> None:
    out, box = outbox(first=None), mailbox(first=None)
    assert built_on(out.write(masks(1), round=1)) == [None]
    frames = out.write(masks(2), round=2, acknowledged=1)
    assert built_on(frames) == [1]
    assert_arrives(
        box, [outbox(first=None).write(masks(1), round=1)[0].data, frames[0].data], masks(2)
    )


def test_frames_say_who_when_and_how_long() -> None:
    (frame,) = outbox().write(masks(3), round=3)
    header = read_header(frame.data)
    assert (header.sender, header.round, header.reference) == (OWNER, 3, frame.reference)
    assert (header.total, header.header_bytes) == (len(frame.data), frame.header_bytes)


def test_equal_masks_have_equal_content_whatever_they_build_on() -> None:
    out = outbox(prior=PRIOR)
    out.write(masks(1), round=1)
    delta, key = out.write(masks(2), round=2, acknowledged=1, key=True)
    (alone,) = outbox(first=None).write(masks(2), round=9)
    assert (
        delta.content
        == key.content
        == alone.content
        != outbox().write(masks(1), round=2)[0].content
    )
    assert len({delta.data, key.data, alone.data}) == 3


# --- answers that are lost, memory that is lost ---


def test_after_a_lost_answer_the_next_frame_builds_on_what_the_relay_has() -> None:
    out, box = outbox(), mailbox()
    came = [out.write(masks(1), round=1)[0].data]
    for round in (2, 3, 4):  # none of these arrives
        assert built_on(out.write(masks(round), round=round, acknowledged=1)) == [1]
    frames = out.write(masks(5), round=5, acknowledged=1)
    assert built_on(frames) == [1]
    assert_arrives(box, [*came, frames[0].data], masks(5))


def test_an_answer_that_did_come_is_built_on_though_others_were_lost_before() -> None:
    out = outbox()
    out.write(masks(1), round=1)
    out.write(masks(2), round=2, acknowledged=1)
    assert built_on(out.write(masks(3), round=3, acknowledged=2)) == [2]
    assert built_on(out.write(masks(4), round=4, acknowledged=2)) == [2]


@pytest.mark.parametrize("acknowledged", [None, 1, 2, 9])
def test_who_has_lost_its_memory_starts_from_the_first_payload(acknowledged: int | None) -> None:
    frames = outbox().write(masks(5), round=5, acknowledged=acknowledged, key=True)
    assert built_on(frames) == [0]
    assert_arrives(mailbox(), [frames[0].data], masks(5))


def test_a_relay_that_has_nothing_gets_what_stands_alone() -> None:
    out = outbox()
    out.write(masks(1), round=1)
    assert built_on(out.write(masks(2), round=2, acknowledged=None)) == [0]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=40)
def test_whatever_is_lost_all_that_comes_can_be_read(rounds: list[tuple[bool, bool, bool]]) -> None:
    """Answers are lost, the sender restarts, whole frames are asked for; a reader takes
    deltas, another one keys.
    """
    out, follower, chosen = outbox(prior=PRIOR), mailbox(prior=PRIOR), mailbox(prior=PRIOR)
    acknowledged = None
    for round, (lost, restarted, key) in enumerate(rounds, start=1):
        out = outbox(prior=PRIOR) if restarted else out
        frames = out.write(masks(round), round=round, acknowledged=acknowledged, key=key)
        assert len(frames) <= 1 + key
        assert all(not frame.reference for frame in frames[1:])
        if not lost:
            acknowledged = round
            assert_arrives(follower, [frames[0].data], masks(round))
            assert_arrives(chosen, [frames[-1].data], masks(round))


# --- a key beside a delta ---


def test_a_key_beside_a_delta() -> None:
    out = outbox()
    out.write(masks(1), round=1)
    frames = out.write(masks(2), round=2, acknowledged=1, key=True)
    assert built_on(frames) == [1, 0]
    assert_arrives(mailbox(), [frames[1].data], masks(2))
    known = mailbox()
    known.put(OWNER, [outbox().write(masks(1), round=1)[0].data], latest_round=1)
    assert_arrives(known, [frames[0].data], masks(2))


def test_a_frame_that_stands_alone_is_not_written_twice() -> None:
    assert len(outbox().write(masks(1), round=1, key=True)) == 1
    assert len(outbox(first=None).write(masks(1), round=1, key=True)) == 1


def flips_presumed(frame: WrittenFrame) -> bool:
    return any(layer.with_recent for layer in read_header(frame.data, LAYERS).layers)


@pytest.mark.parametrize(("key", "presumed"), [(False, True), (True, False)])
def test_what_flipped_is_never_presumed_after_a_key(key: bool, presumed: bool) -> None:
    """Who got the key does not know what flipped between the two frames before."""
    out = outbox()
    out.write(masks(1), round=1)
    frames = out.write(masks(2), round=2, acknowledged=1, key=key)
    (after,) = out.write(masks(3), round=3, acknowledged=2)
    assert flips_presumed(after) == presumed
    if key:
        assert_arrives(mailbox(), [frames[1].data, after.data], masks(3))
    (later,) = out.write(masks(4), round=4, acknowledged=3)
    assert flips_presumed(later)


def test_what_flipped_against_the_first_payload_is_not_presumed() -> None:
    """Who is new may get a whole frame of the same round that an outbox of another
    memory wrote.
    """
    out = outbox()
    out.write(masks(1), round=1)
    assert not flips_presumed(out.write(masks(2), round=2, acknowledged=1)[0])


# --- state ---


def saved(out: Outbox) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in out.arrays().items()}


def test_it_goes_on_after_a_restore() -> None:
    through, renewed = outbox(), outbox()
    acknowledged = None
    for round in range(1, 7):
        frames = [
            out.write(masks(round), round=round, acknowledged=acknowledged, key=round == 4)
            for out in (through, renewed)
        ]
        assert [frame.data for frame in frames[0]] == [frame.data for frame in frames[1]]
        assert saved(through) == saved(renewed)
        kept, renewed = renewed, outbox()
        renewed.restore({name: array.copy() for name, array in kept.arrays().items()})
        acknowledged = round if round != 3 else acknowledged


def test_it_keeps_what_the_relay_has_and_what_is_on_its_way() -> None:
    out = outbox()
    acknowledged = None
    for round in range(1, 9):
        out.write(masks(round), round=round, acknowledged=acknowledged)
        assert {name.partition("/")[0] for name in out.arrays()} == {
            str(r) for r in {acknowledged or round, round}
        }
        acknowledged = round if round not in (3, 4) else acknowledged


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("2/bits"),
        lambda arrays: arrays.update({"2/bits": arrays["2/bits"][1:]}),
        lambda arrays: arrays.update({"2/flips": np.array([9999], np.uint32)}),
        lambda arrays: arrays.update({"x/bits": arrays["2/bits"]}),
    ],
)
def test_damaged_state_is_refused_whole(damage: Callable[[Any], Any]) -> None:
    out, good = outbox(), outbox()
    out.write(masks(1), round=1)
    good.write(masks(2), round=2)
    before, arrays = saved(out), {name: array.copy() for name, array in good.arrays().items()}
    damage(arrays)
    with pytest.raises(errors.StateError, match="the outbox of agent 4, number"):
        out.restore(arrays)
    assert saved(out) == before


# --- floats ---


@pytest.mark.parametrize(
    "precision", [name for name, found in PRECISIONS.items() if not found.of_differences]
)
def test_floats_alone_are_always_whole_and_keep_nothing(precision: str) -> None:
    out = outbox(first=None, precision=precision)
    for round in (1, 2, 3):
        tensors = {name: torch.full(shape, float(round)) for name, shape in LAYERS.items()}
        frames = out.write(tensors, round=round, acknowledged=round - 1 or None, key=True)
        assert built_on(frames) == [None]
        assert out.arrays() == {}
        assert_arrives(mailbox(first=None), [frames[0].data], tensors)


def test_of_sparse_tensors_the_masks_are_kept_and_told_as_changes() -> None:
    out, box = outbox(first=None), mailbox(first=None)
    sizes = []
    for round in (1, 2, 3):
        values = torch.linspace(1, 2, 500) * round
        sent = {
            "conv": torch.full((20, 3), float(round)),
            "fc": (masks(round)["fc"] * values).to_sparse_coo().coalesce(),
        }
        (frame,) = out.write(sent, round=round, acknowledged=round - 1 or None)
        assert frame.reference == (None if round == 1 else round - 1)
        assert_arrives(box, [frame.data], sent)
        sizes.append(len(frame.data) - 4 * (60 + sent["fc"].values().numel()))
    assert max(sizes[1:]) < sizes[0]  # without the values; names and shapes are told once
    assert not any(array.size for name, array in out.arrays().items() if name.endswith("/values"))


def test_a_key_of_sparse_tensors() -> None:
    out = outbox(first=None)
    sent = [
        {"fc": (m["fc"] * 2.0).to_sparse_coo().coalesce(), "conv": m["conv"]}
        for m in (masks(1), masks(2))
    ]
    out.write(sent[0], round=1)
    frames = out.write(sent[1], round=2, acknowledged=1, key=True)
    assert built_on(frames) == [1, None]
    assert_arrives(mailbox(first=None), [frames[1].data], sent[1])


# --- differences of floats ---


@cache
def weights(round: int) -> dict[str, Tensor]:
    """Weights that move by about a hundredth each round."""
    generator = torch.Generator().manual_seed(9)
    found = {name: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}
    for _ in range(round):
        found = {
            name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in found.items()
        }
    return found


def differences(**options: Any) -> Outbox:
    return outbox(**{"first": weights(0), "precision": "int8-differences", **options})


def arrived(box: Mailbox, frames: list[bytes]) -> dict[str, Tensor]:
    box.put(OWNER, frames, latest_round=99)
    return dict(box.current([OWNER], round=read_header(frames[-1]).round)[OWNER])


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_near(came: dict[str, Tensor], sent: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Within half a step of the largest change."""
    for name, tensor in sent.items():
        step = (tensor - base[name]).abs().max() / 127
        assert (came[name] - tensor).abs().max() <= 0.51 * step, name


def test_each_difference_is_from_what_the_receivers_hold() -> None:
    out, box = differences(), mailbox(first=weights(0))
    held, acknowledged = weights(0), None
    for round in range(1, 8):
        (frame,) = out.write(weights(round), round=round, acknowledged=acknowledged)
        assert frame.reference == round - 1
        came = arrived(box, [frame.data])
        assert_equal(came, frame.decoded)
        # though the errors of all earlier rounds are in what is held
        assert_near(came, weights(round), held)
        held, acknowledged = came, round
    assert len(frame.data) == 560 + 2 * (4 + 1) + 1 + 48


def test_the_key_beside_a_difference_decodes_to_the_same_bits() -> None:
    out = differences()
    (begun,) = out.write(weights(1), round=1)
    delta, key = out.write(weights(2), round=2, acknowledged=1, key=True)
    assert (delta.reference, key.reference, key.content) == (1, None, delta.content)
    assert {layer.precision.name for layer in read_header(key.data).layers if layer.precision} == {
        "float32"
    }
    follower, late = mailbox(first=weights(0)), mailbox(first=weights(0))
    assert_equal(arrived(follower, [begun.data, delta.data]), arrived(late, [key.data]))
    (after,) = out.write(weights(3), round=3, acknowledged=2)
    assert_equal(arrived(follower, [after.data]), arrived(late, [after.data]))


def test_after_a_lost_answer_the_difference_is_from_what_the_relay_has() -> None:
    out, box = differences(), mailbox(first=weights(0))
    held = arrived(box, [out.write(weights(1), round=1)[0].data])
    for round in (2, 3):  # neither arrives
        assert built_on(out.write(weights(round), round=round, acknowledged=1)) == [1]
    (frame,) = out.write(weights(4), round=4, acknowledged=1)
    came = arrived(box, [frame.data])
    assert_near(came, weights(4), held)


def test_who_missed_frames_goes_on_from_the_key() -> None:
    out, box = differences(), mailbox(first=weights(0))
    arrived(box, [out.write(weights(1), round=1)[0].data])
    out.write(weights(2), round=2, acknowledged=1)  # the relay has it, the receiver does not
    delta, key = out.write(weights(3), round=3, acknowledged=2, key=True)
    with pytest.raises(errors.MissingReferenceError, match="builds on round 2"):
        box.put(OWNER, [delta.data], latest_round=99)
    assert_equal(arrived(box, [key.data]), delta.decoded)
    (after,) = out.write(weights(4), round=4, acknowledged=3)
    assert_near(arrived(box, [after.data]), weights(4), delta.decoded)


@pytest.mark.parametrize("acknowledged", [None, 3])
def test_who_has_lost_its_memory_starts_from_the_initial_weights(acknowledged: int | None) -> None:
    (frame,) = differences().write(weights(5), round=5, acknowledged=acknowledged, key=True)
    assert frame.reference == 0
    assert_near(arrived(mailbox(first=weights(0)), [frame.data]), weights(5), weights(0))


def test_without_initial_weights_the_first_frame_is_exact() -> None:
    out, box = differences(first=None), mailbox(first=None)
    assert_equal(arrived(box, [out.write(weights(1), round=1)[0].data]), weights(1))
    (frame,) = out.write(weights(2), round=2, acknowledged=1)
    assert frame.reference == 1
    assert_near(arrived(box, [frame.data]), weights(2), weights(1))


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=40)
def test_whatever_is_lost_differences_give_all_readers_the_same_bits(
    rounds: list[tuple[bool, bool, bool, bool]],
) -> None:
    out, follower, chosen = differences(), mailbox(first=weights(0)), mailbox(first=weights(0))
    acknowledged, held = None, weights(0)
    for round, (lost, forgotten, restored, key) in enumerate(rounds, start=1):
        if forgotten or restored:
            kept, out = out.arrays(), differences()
            if restored:
                out.restore({name: array.copy() for name, array in kept.items()})
            else:
                held = weights(0)
        frames = out.write(weights(round), round=round, acknowledged=acknowledged, key=key)
        assert len({frame.content for frame in frames}) == 1
        if not lost:
            came = arrived(follower, [frames[0].data])
            assert_equal(came, arrived(chosen, [frames[-1].data]))
            assert_near(came, weights(round), held)
            acknowledged, held = round, came


def test_what_is_kept_of_differences_survives_a_restore() -> None:
    out, renewed = differences(), differences()
    out.write(weights(1), round=1)
    out.write(weights(2), round=2, acknowledged=1)
    assert {name for name in out.arrays() if name.endswith("/values")} == {"1/values", "2/values"}
    assert all(
        array.nbytes == 4 * 560 for name, array in out.arrays().items() if name.endswith("/values")
    )
    renewed.restore({name: array.copy() for name, array in out.arrays().items()})
    frames = [box.write(weights(3), round=3, acknowledged=1, key=True) for box in (out, renewed)]
    assert [frame.data for frame in frames[0]] == [frame.data for frame in frames[1]]
    assert saved(out) == saved(renewed)


def test_masks_beside_differences() -> None:
    """One reference serves both; the key tells either from its own."""
    out = differences(first={"conv": masks(0)["conv"], "fc": weights(0)["fc"]})
    both = [{"conv": masks(round)["conv"], "fc": weights(round)["fc"]} for round in range(4)]
    box, late = (mailbox(first=both[0]) for _ in range(2))
    arrived(box, [out.write(both[1], round=1)[0].data])
    delta, key = out.write(both[2], round=2, acknowledged=1, key=True)
    assert (delta.reference, key.content) == (1, delta.content)
    came = arrived(box, [delta.data])
    assert torch.equal(came["conv"], both[2]["conv"])
    assert_equal(came, arrived(late, [key.data]))
    (after,) = out.write(both[3], round=3, acknowledged=2)
    assert_equal(arrived(box, [after.data]), arrived(late, [after.data]))


def test_settings_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="hex"):
        outbox(fingerprint="none")
    with pytest.raises(errors.ConfigError, match="precision must be one of"):
        outbox(precision="float8").write(
            {"fc": torch.zeros(500), "conv": torch.zeros(20, 3)}, round=1
        )
