"""The ledger against a slow recount."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl.exchange.ledger import TRAFFIC_COLUMNS, Count, Ledger, Shipment

shipments = st.builds(
    lambda size, header, key, weights, kept: Shipment(size + header, header, key, weights, kept),
    st.integers(0, 99),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 9),
    st.integers(0, 9),
)


@dataclass(frozen=True)
class Event:
    """What happened: frames over a link, or up where there is no receiver."""

    sender: int
    receiver: int | None
    frames: Sequence[Shipment]


events = st.lists(
    st.builds(
        Event,
        st.integers(0, 4),
        st.none() | st.integers(0, 4),
        st.lists(shipments, min_size=1, max_size=3),
    ),
    max_size=30,
)


def told(ledger: Ledger, event: Event) -> None:
    if event.receiver is None:
        ledger.add_uplink(event.sender, event.frames)
    else:
        ledger.add_delivery(event.sender, event.receiver, event.frames)


def frames_of(history: Sequence[Event]) -> list[Shipment]:
    return [frame for event in history for frame in event.frames]


def num_bytes(history: Sequence[Event]) -> int:
    return sum(frame.num_bytes for frame in frames_of(history))


def mean_bits(history: Sequence[Event]) -> object:
    """Over all frames; a frame of nobody knows how many weights counts as none."""
    frames = frames_of(history)
    bits = sum(8 * frame.num_bytes / frame.num_weights for frame in frames if frame.num_weights)
    return pytest.approx(bits / len(frames)) if bits else None


@given(history=events)
def test_the_ledger_adds_up(history: list[Event]) -> None:
    ledger = Ledger()
    for event in history:
        told(ledger, event)
    up = [event for event in history if event.receiver is None]
    down = [event for event in history if event.receiver is not None]
    totals = ledger.totals()
    assert not ledger.local
    handled = {
        agent: num_bytes(
            [e for e in history if agent in ((e.sender,) if e.receiver is None else (e.receiver,))]
        )
        for agent in range(5)
        if any(event.sender == agent for event in up)
    }
    busiest = totals.pop("busiest_agent")
    assert totals == {
        "links_total": num_bytes(down),
        "uplink_total": num_bytes(up),
        "relay_total": num_bytes(history),
        "header_total": sum(frame.header_bytes for frame in frames_of(history)),
        "deliveries": len(down),
        "link_frames": len(frames_of(down)),
        "link_keys": sum(frame.is_key for frame in frames_of(down)),
        "uplink_frames": len(frames_of(up)),
        "uplink_keys": sum(frame.is_key for frame in frames_of(up)),
        "bits_per_weight": mean_bits(history),
        "link_bits_per_weight": mean_bits(down),
        "uplink_bits_per_weight": mean_bits(up),
        "busiest_agent_total": max(handled.values(), default=0),
        # Of a chain the last frame alone counts: fp32 weights and the paper's masks go
        # over a link once.
        "fp32_total": sum(4 * event.frames[-1].num_weights for event in down),
        "paper_convention_bytes": sum(event.frames[-1].kept_weights for event in down) / 8,
    }
    assert handled.get(busiest, 0) == totals["busiest_agent_total"]
    assert (busiest is None) == (not handled)
    for agent in range(5):
        assert ledger.sent(agent) == num_bytes([e for e in down if e.sender == agent])
        assert ledger.received(agent) == num_bytes([e for e in down if e.receiver == agent])
        assert ledger.uplinks[agent].bytes == num_bytes([e for e in up if e.sender == agent])
    rows = ledger.link_rows()
    assert [(row["sender"], row["receiver"]) for row in rows] == sorted(
        {(e.sender, e.receiver) for e in down}
    )
    for row in rows:
        over = frames_of(
            [e for e in down if (e.sender, e.receiver) == (row["sender"], row["receiver"])]
        )
        assert row == {
            "sender": row["sender"],
            "receiver": row["receiver"],
            "frames": len(over),
            "keys": sum(frame.is_key for frame in over),
            "bytes": sum(frame.num_bytes for frame in over),
            "header_bytes": sum(frame.header_bytes for frame in over),
        }


@given(rounds=st.lists(events, max_size=5))
def test_changes_are_those_since_the_last_call_and_sum_to_the_totals(
    rounds: list[list[Event]],
) -> None:
    ledger = Ledger()
    sums: dict[str, dict[tuple[int, ...], list[int]]] = {"links": {}, "uplinks": {}}
    for history in rounds:
        for event in history:
            told(ledger, event)
        changes = ledger.changes()
        for kind, ends in (("links", 2), ("uplinks", 1)):
            rows = changes[kind]
            assert all(len(row) == len(TRAFFIC_COLUMNS[kind]) for row in rows)
            of_round = [e for e in history if (e.receiver is None) == (kind == "uplinks")]
            places = {(e.sender, e.receiver)[:ends] for e in of_round}
            assert [tuple(row[:ends]) for row in rows] == sorted(places)
            for *place, frames, keys, size, headers in rows:
                mine = frames_of([e for e in of_round if [e.sender, e.receiver][:ends] == place])
                expected = len(mine), sum(f.is_key for f in mine), sum(f.num_bytes for f in mine)
                assert (frames, keys, size) == expected
                assert headers == sum(f.header_bytes for f in mine)
                total = sums[kind].setdefault(tuple(place), [0] * 4)
                sums[kind][tuple(place)] = [
                    a + b for a, b in zip(total, (frames, keys, size, headers), strict=True)
                ]
    assert ledger.changes() == {"links": [], "uplinks": []}
    totals = ledger.totals()
    for kind, prefix in (("links", "links"), ("uplinks", "uplink")):
        assert sum(row[2] for row in sums[kind].values()) == totals[f"{prefix}_total"]
    assert [[*place, *row] for place, row in sorted(sums["links"].items())] == [
        list(row.values()) for row in ledger.link_rows()
    ]


@given(history=events, per_node=st.integers(2, 6))
def test_between_agents_of_a_node_nothing_is_over_a_link(
    history: list[Event], per_node: int
) -> None:
    """Links and local deliveries are the links of one agent a node, together."""
    alone, shared = Ledger(), Ledger(agents_per_node=per_node)
    for event in history:
        told(alone, event)
        told(shared, event)
    down = [event for event in history if event.receiver is not None]
    local = [e for e in down if e.sender // per_node == (e.receiver or 0) // per_node]
    over = [event for event in down if event not in local]
    totals, before = shared.totals(), alone.totals()
    assert totals["links_total"] == num_bytes(over)
    assert totals.get("local_total", 0) == num_bytes(local)
    assert totals.get("local_deliveries", 0) == len(local)
    assert totals["link_bits_per_weight"] == mean_bits(over)
    assert totals["fp32_total"] == sum(4 * event.frames[-1].num_weights for event in over)
    for key in ("relay_total", "header_total", "uplink_total", "uplink_bits_per_weight"):
        assert totals[key] == before[key]
    for agent in range(5):
        assert shared.sent(agent) == num_bytes([e for e in over if e.sender == agent])
        assert shared.received(agent) == num_bytes([e for e in over if e.receiver == agent])
    both = sorted((r["sender"], r["receiver"]) for r in shared.link_rows() + shared.local_rows())
    assert both == [(row["sender"], row["receiver"]) for row in alone.link_rows()]
    changes, all_changes = shared.changes(), alone.changes()
    assert sorted(changes["links"] + changes.get("local", [])) == all_changes["links"]
    assert ("local" in changes) == bool(local)


def test_nodes_of_one_agent_have_the_books_of_before() -> None:
    ledger = Ledger()
    ledger.add_delivery(1, 0, [Shipment(10, 2, True)])
    assert not {
        key for key in (*ledger.totals(), *ledger.state(), *ledger.changes()) if "local" in key
    }


def test_a_checkpoint_from_before_there_were_local_counts_is_restored() -> None:
    before, after = Ledger(), Ledger(agents_per_node=2)
    before.add_delivery(0, 1, [Shipment(10, 2, True)])
    after.restore(before.state())
    after.add_delivery(0, 1, [Shipment(30, 2, True)])
    assert (after.totals()["links_total"], after.totals()["local_total"]) == (10, 30)


def slow_sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for name, value in asdict(count).items():
            setattr(total, name, getattr(total, name) + value)
    return total


@given(rounds=st.lists(st.tuples(events, st.booleans()), max_size=5), per_node=st.integers(1, 3))
def test_running_totals_equal_the_slow_sums_of_all_links(
    rounds: list[tuple[list[Event], bool]], per_node: int
) -> None:
    ledger, kept = Ledger(agents_per_node=per_node), Ledger(agents_per_node=per_node)
    for history, restored in rounds:
        for event in history:
            told(ledger, event)
            told(kept, event)
        if restored:
            ledger, before = Ledger(agents_per_node=per_node), ledger
            ledger.restore(json.loads(json.dumps(before.state())))
        links, uplinks = slow_sum(ledger.links.values()), slow_sum(ledger.uplinks.values())
        both = slow_sum([links, uplinks])
        totals = ledger.totals()
        for prefix, count in (("link_", links), ("uplink_", uplinks)):
            assert totals[f"{prefix}frames"] == count.frames
            assert totals[f"{prefix}keys"] == count.keys
        for prefix, count in (("link_", links), ("uplink_", uplinks), ("", both)):
            bits = count.bits_per_weight
            # the same bits, not only about the same number
            assert totals[f"{prefix}bits_per_weight"] == (bits / count.frames if bits else None)
        local = slow_sum(ledger.local.values())
        of_bytes = totals["links_total"], totals["uplink_total"], totals.get("local_total", 0)
        assert of_bytes == (links.bytes, uplinks.bytes, local.bytes)
        assert totals["header_total"] == both.header_bytes + local.header_bytes
        assert (totals, ledger.changes()) == (kept.totals(), kept.changes())
        assert ledger.state() == kept.state()


def test_what_was_used_before_is_not_walked_again() -> None:
    ledger = Ledger()
    for receiver in range(1, 500):
        ledger.add_delivery(0, receiver, [Shipment(10, 0, True)])
    ledger.changes()
    ledger.add_delivery(0, 3, [Shipment(10, 0, True)])
    asked: list[tuple[int, int]] = []

    class Watched(defaultdict[tuple[int, int], Count]):
        def __getitem__(self, ends: tuple[int, int]) -> Count:
            asked.append(ends)
            return super().__getitem__(ends)

    ledger.links._counts = Watched(Count, ledger.links._counts)
    assert ledger.changes()["links"] == [[0, 3, 1, 1, 10, 0]]
    assert asked == [(0, 3)]


def test_the_columns_are_named() -> None:
    ledger = Ledger()
    ledger.add_delivery(1, 2, [Shipment(30, 7, True), Shipment(10, 3, False)])
    ledger.add_uplink(1, [Shipment(30, 7, True)])
    (link,), (uplink,) = ledger.changes().values()
    assert dict(zip(TRAFFIC_COLUMNS["links"], link, strict=True)) == {
        "sender": 1, "receiver": 2, "frames": 2, "keys": 1, "bytes": 40, "header_bytes": 10,
    }  # fmt: skip
    assert dict(zip(TRAFFIC_COLUMNS["uplinks"], uplink, strict=True)) == {
        "agent": 1, "frames": 1, "keys": 1, "bytes": 30, "header_bytes": 7,
    }  # fmt: skip


def test_bits_per_weight_is_the_mean_over_frames() -> None:
    ledger = Ledger()
    ledger.add_uplink(
        0, [Shipment(100, 0, True, num_weights=800), Shipment(10, 0, False, num_weights=800)]
    )
    ledger.add_delivery(0, 1, [Shipment(10, 0, False, num_weights=800)])
    totals = ledger.totals()
    assert totals["uplink_bits_per_weight"] == pytest.approx((1.0 + 0.1) / 2)
    assert totals["link_bits_per_weight"] == pytest.approx(0.1)
    assert totals["bits_per_weight"] == pytest.approx((1.0 + 0.1 + 0.1) / 3)


def test_the_busiest_agent_counts_what_goes_up_and_comes_down() -> None:
    ledger = Ledger()
    assert (ledger.totals()["busiest_agent"], ledger.totals()["busiest_agent_total"]) == (None, 0)
    for agent in (0, 1, 2):
        ledger.add_uplink(agent, [Shipment(10, 0, True)])
    for receiver in (0, 1, 1):
        ledger.add_delivery(2, receiver, [Shipment(10, 0, True)])
    assert (ledger.totals()["busiest_agent"], ledger.totals()["busiest_agent_total"]) == (1, 30)


def test_nothing_sent_has_no_bits_per_weight() -> None:
    totals = Ledger().totals()
    assert [
        totals[key] for key in ("bits_per_weight", "link_bits_per_weight", "uplink_bits_per_weight")
    ] == [None] * 3
