"""What a process decodes once for all its agents: the same payloads, the same refusals,
bounded memory.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flower_mcepl import Topology, errors, simulate
from flower_mcepl.exchange import mailbox
from flower_mcepl.exchange.decoded import DecodedFrames, common_reference
from flower_mcepl.exchange.held import Held
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.wire import FrameHeader, Reference, read_header, unpack_frame, write_frame
from tests.fleet.agents import make_fleet, same_tensors

FINGERPRINT = "0123456789abcdef" * 2
LAYERS = {"conv": (20, 3), "fc": (500,)}


def mask(seed: int, density: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draw) < density for name, shape in LAYERS.items()}


WHOLE = mask(1)
CHANGED = {name: bits ^ mask(2, 0.03)[name] for name, bits in WHOLE.items()}
AGAIN = {name: bits ^ mask(3, 0.03)[name] for name, bits in CHANGED.items()}


def chain() -> list[bytes]:
    """Frames of agent 5 in rounds 3, 4 and 5, each on the one before."""
    frames, reference = [], None
    for round, tensors in ((3, WHOLE), (4, CHANGED), (5, AGAIN)):
        written = write_frame(
            tensors, sender=5, round=round, fingerprint=FINGERPRINT, reference=reference
        )
        reference = Reference(round, tensors, written.flips)
        frames.append(written.data)
    assert all(read_header(frame, LAYERS).coded_bytes for frame in frames[1:])
    return frames


def box(owner: int = 0, **options: Any) -> Mailbox:
    told = {
        "owner": owner,
        "fingerprint": FINGERPRINT,
        "layers": LAYERS,
        "max_staleness": 9,
        **options,
    }
    return Mailbox(**told)


@pytest.fixture(autouse=True)
def decodings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rounds of the frames that were really decoded; nothing is kept from test to
    test.
    """
    rounds = []

    def counted(payload: memoryview, header: FrameHeader, **options: Any) -> Any:
        frame = unpack_frame(payload, header, **options)
        rounds.append(header.round)
        return frame

    monkeypatch.setattr(mailbox, "_decoded", DecodedFrames())
    monkeypatch.setattr(mailbox, "unpack_frame", counted)
    return rounds


def test_a_frame_is_decoded_once_for_all_and_each_has_tensors_of_its_own(
    decodings: list[int],
) -> None:
    boxes = [box(owner) for owner in range(3)]
    for one in boxes:
        one.put(5, chain(), latest_round=6)
        held = one.current([5], round=6)[5]
        assert all(torch.equal(held[name], bits) for name, bits in AGAIN.items())
        held["fc"].logical_not_()  # whoever writes into what it was given disturbs nobody
    coded = [
        read_header(frame, LAYERS).round
        for frame in chain()
        if read_header(frame, LAYERS).coded_bytes
    ]
    packed = [round for round in (3, 4, 5) if round not in coded]
    assert sorted(decodings) == sorted(coded + 3 * packed)


def test_a_state_that_was_saved_and_restored_is_known_again(decodings: list[int]) -> None:
    first, second = box(1), box(2)
    first.put(5, chain(), latest_round=6)
    before = len(decodings)
    second.put(5, chain()[:2], latest_round=6)
    restored = box(2)
    restored.restore({name: np.array(array) for name, array in second.arrays().items()})
    restored.put(5, chain()[2:], latest_round=6)
    assert 5 not in decodings[before:]
    assert {name: array.tobytes() for name, array in restored.arrays().items()} == {
        name: array.tobytes() for name, array in first.arrays().items()
    }


@pytest.mark.parametrize(
    ("options", "sender", "latest_round", "error"),
    [
        ({}, 6, 6, errors.ForeignFrameError),
        ({}, 5, 4, errors.FutureFrameError),
        ({"fingerprint": "f" * 32}, 5, 6, errors.ForeignFrameError),
        ({"layers": {"conv": (3, 20), "fc": (500,)}}, 5, 6, errors.ForeignFrameError),
        ({"dtype": torch.float32}, 5, 6, errors.ForeignFrameError),
    ],
)
def test_what_is_refused_is_refused_however_often_it_was_decoded(
    options: dict[str, Any], sender: int, latest_round: int, error: type[Exception]
) -> None:
    box(1).put(5, chain(), latest_round=6)
    with pytest.raises(error):
        box(2, **options).put(sender, chain(), latest_round=latest_round)


def test_who_holds_something_else_finds_nothing() -> None:
    box(1).put(5, chain(), latest_round=6)
    with pytest.raises(errors.MissingReferenceError):  # holds nothing
        box(2).put(5, chain()[1:], latest_round=6)
    other = box(3)
    other.put(
        5, [write_frame(AGAIN, sender=5, round=3, fingerprint=FINGERPRINT).data], latest_round=6
    )
    with pytest.raises(errors.MissingReferenceError):  # holds another payload of the same round
        other.put(5, chain()[1:], latest_round=6)
    damaged = bytearray(chain()[2])
    damaged[-20] ^= 1
    with pytest.raises(errors.CorruptFrameError):
        box(4).put(5, [*chain()[:2], bytes(damaged)], latest_round=6)


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    held = Held.of(Reference(1, WHOLE), LAYERS)
    each = 8 + sum(array.nbytes for array in held.arrays().values())
    kept = DecodedFrames(most_bytes=3 * each)
    keys = [(bytes([i]) * 8, "") for i in range(5)]
    for key in keys[:3]:
        kept.put(key, held)
    assert kept.get(keys[0]) is held
    kept.put(keys[0], held)  # once more counts once
    kept.put(keys[3], held)
    assert [kept.get(key) is held for key in keys] == [True, False, True, True, False]
    # larger than all
    kept.put(keys[4], Held.of(Reference(1, {"fc": torch.zeros(500)}), {"fc": (500,)}))
    assert [kept.get(key) for key in keys] == [None] * 5
    kept.put(None, held)
    assert kept.get(None) is None


def test_a_simulation_has_the_same_bits_without_it(
    monkeypatch: pytest.MonkeyPatch, decodings: list[int]
) -> None:
    def played() -> list[dict[str, torch.Tensor]]:
        agents = make_fleet(5)
        simulate(agents, Topology.complete(5), num_rounds=6)
        return [agent.state().tensors for agent in agents]

    shared = played()
    once = len(decodings)
    monkeypatch.setattr(mailbox, "_decoded", DecodedFrames(most_bytes=0))
    decodings.clear()
    assert all(same_tensors(one, other) for one, other in zip(played(), shared, strict=True))
    assert once < len(decodings)


def wide_net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 200), torch.nn.Linear(200, 3)
    )


def test_the_first_exchange_is_decoded_once_for_all(decodings: list[int]) -> None:
    built_on = []

    def look(round: int, agent: int, reply: Reply) -> None:
        built_on.extend(frame.reference for frame in reply.frames)

    simulate(
        make_fleet(6, model_fn=wide_net, retention=0.3),
        Topology.complete(6),
        num_rounds=1,
        on_reply=look,
    )
    assert built_on == [0] * 6  # all on the common first payload
    assert decodings == [1] * 6


def test_another_first_payload_is_another_reference(decodings: list[int]) -> None:
    other = {**WHOLE, "fc": WHOLE["fc"].logical_not()}
    frame = write_frame(
        CHANGED, sender=5, round=1, fingerprint=FINGERPRINT, reference=Reference(0, WHOLE)
    )
    assert frame.reference == 0
    for owner in (1, 2):  # each with a first payload of its own, equal to the other's
        one = box(owner, first={name: bits.clone() for name, bits in WHOLE.items()})
        one.put(5, [frame.data], latest_round=1)
        assert same_tensors(dict(one.current([5], round=1)[5]), CHANGED)
    assert decodings == [1]
    for first in (None, other):
        with pytest.raises(errors.MissingReferenceError):
            box(3, first=first).put(5, [frame.data], latest_round=1)


def test_a_common_payload_is_known_by_all_that_it_holds() -> None:
    sparse = torch.tensor([[0.0, 2.0]]).to_sparse().coalesce()
    payloads = [
        {},
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(1, 2)},
        {"a": torch.zeros(2, dtype=torch.bool)},
        {"a": torch.tensor([0.0, 1.0])},
        {"a": sparse},
        {"a": 2 * sparse},
        {"a": sparse.to_dense()},
    ]
    contents = [common_reference(payload).content for payload in payloads]
    assert len(set(contents)) == len(payloads)
    assert contents == [common_reference(payload).content for payload in payloads]
