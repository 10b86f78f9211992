"""Who sent how many bytes to whom."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shipment:
    """One frame on its way, and what it stands for."""

    num_bytes: int
    header_bytes: int  # of ``num_bytes``
    is_key: bool  # it can be decoded without an earlier frame
    num_weights: int = 0
    kept_weights: int = 0


@dataclass
class Count:
    """Totals of one link or uplink since the start of the run."""

    frames: int = 0
    keys: int = 0  # of the frames
    bytes: int = 0
    header_bytes: int = 0  # of the bytes
    bits_per_weight: float = 0.0  # summed over the frames

    def add(self, shipments: Sequence[Shipment]) -> None:
        """Count frames that went out together."""
        for frame in shipments:
            self.frames += 1
            self.keys += frame.is_key
            self.bytes += frame.num_bytes
            self.header_bytes += frame.header_bytes
            if frame.num_weights:
                self.bits_per_weight += 8 * frame.num_bytes / frame.num_weights


class Ledger:
    """Byte counts per directed link and per uplink, totals since the start of the run.

    A frame goes up to the relay once (uplink) and down once per neighbor (link). Both
    are told, never added, but for what one node or the relay handles. Beside the real
    bytes stand two figures for comparison, over the same deliveries: what fp32 weights
    would have cost, and the paper's own convention, one bit per *kept* weight.
    """

    def __init__(self) -> None:
        # by (sender, receiver)
        self.links: defaultdict[tuple[int, int], Count] = defaultdict(Count)
        self.uplinks: defaultdict[int, Count] = defaultdict(Count)  # by agent
        self._sent: defaultdict[int, int] = defaultdict(int)  # bytes over an agent's outgoing links
        self._received: defaultdict[int, int] = defaultdict(int)  # and over its incoming ones
        self.deliveries = 0  # payloads handed out: one or several frames over one link in one round
        self.fp32_bytes = 0
        self.paper_convention_bits = 0
        self.initial_bytes = 0  # of initial arrays, from the server to nodes; over no link
        # running sums of `links` and `uplinks`, but for the bits per weight
        self._over_links, self._up = Count(), Count()
        self._told: dict[tuple[int, ...], list[int]] = {}  # as of the last `changes`
        # links and uplinks that may have changed since
        self._used: set[tuple[int, ...]] = set()

    def add_uplink(self, agent: int, frames: Sequence[Shipment]) -> None:
        """Count frames that came up to the relay."""
        self.uplinks[agent].add(frames)
        self._up.add(frames)
        self._used.add((agent,))

    def add_delivery(self, sender: int, receiver: int, frames: Sequence[Shipment]) -> None:
        """Count frames handed out for one link in one round.

        A node that goes away may never fetch them.
        """
        self.links[sender, receiver].add(frames)
        self._over_links.add(frames)
        self._used.add((sender, receiver))
        num_bytes = sum(frame.num_bytes for frame in frames)
        self._sent[sender] += num_bytes
        self._received[receiver] += num_bytes
        self.deliveries += 1
        self.fp32_bytes += 4 * frames[-1].num_weights
        self.paper_convention_bits += frames[-1].kept_weights

    def add_initial(self, num_bytes: int) -> None:
        """Count initial arrays handed to one node; they are in no other total."""
        self.initial_bytes += num_bytes

    def sent(self, agent: int) -> int:
        """Return the bytes over the agent's outgoing links."""
        return self._sent[agent]

    def received(self, agent: int) -> int:
        """Return the bytes over the agent's incoming links."""
        return self._received[agent]

    def so_far(self) -> tuple[int, int]:
        """Bytes over all links, and up to the relay."""
        return self._over_links.bytes, self._up.bytes

    def totals(self) -> dict[str, Any]:
        """Totals of the run in bytes, and mean bits per weight on links and uplinks."""
        links = _with_bits(self._over_links, self.links.values())
        uplinks = _with_bits(self._up, self.uplinks.values())
        both = _sum([links, uplinks])
        handled = {
            agent: count.bytes + self.received(agent) for agent, count in self.uplinks.items()
        }
        busiest = max(handled, key=lambda agent: handled[agent], default=None)
        return {
            "links_total": links.bytes,
            "uplink_total": uplinks.bytes,
            "relay_total": both.bytes,
            "header_total": both.header_bytes,
            "deliveries": self.deliveries,
            "link_frames": links.frames,
            "link_keys": links.keys,
            "uplink_frames": uplinks.frames,
            "uplink_keys": uplinks.keys,
            "bits_per_weight": _mean_bits(both),
            "link_bits_per_weight": _mean_bits(links),
            "uplink_bits_per_weight": _mean_bits(uplinks),
            "busiest_agent": busiest,
            "busiest_agent_total": handled.get(busiest, 0) if busiest is not None else 0,
            "fp32_total": self.fp32_bytes,
            "paper_convention_bytes": self.paper_convention_bits / 8,
            **({"initial_total": self.initial_bytes} if self.initial_bytes else {}),
        }

    def link_rows(self) -> list[dict[str, Any]]:
        """Return one row per directed link that carried anything."""
        return [
            {"sender": sender, "receiver": receiver, **_shown(count)}
            for (sender, receiver), count in sorted(self.links.items())
        ]

    def changes(self) -> dict[str, list[list[int]]]:
        """Counts since the last call, in rows that `TRAFFIC_COLUMNS` names."""
        used = sorted(self._used)
        self._used = set()
        return {
            "links": self._rows((ends, self.links[ends]) for ends in used if len(ends) == 2),
            "uplinks": self._rows((ends, self.uplinks[ends[0]]) for ends in used if len(ends) == 1),
        }

    def state(self) -> dict[str, Any]:
        """All counts, JSON-able, in their order: sums of floats depend on it."""
        return {
            "links": [[*ends, *asdict(count).values()] for ends, count in self.links.items()],
            "uplinks": [[agent, *asdict(count).values()] for agent, count in self.uplinks.items()],
            "sent": [[agent, count] for agent, count in self._sent.items()],
            "received": [[agent, count] for agent, count in self._received.items()],
            "told": [[list(ends), counts] for ends, counts in self._told.items()],
            "deliveries": self.deliveries,
            "fp32-bytes": self.fp32_bytes,
            "paper-convention-bits": self.paper_convention_bits,
            "initial-bytes": self.initial_bytes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Count on from where `state` was taken."""
        self.links = defaultdict(
            Count, {(row[0], row[1]): Count(*row[2:]) for row in state["links"]}
        )
        self.uplinks = defaultdict(Count, {row[0]: Count(*row[1:]) for row in state["uplinks"]})
        self._sent = defaultdict(int, dict(state["sent"]))
        self._received = defaultdict(int, dict(state["received"]))
        self._over_links, self._up = _sum(self.links.values()), _sum(self.uplinks.values())
        self._told = {tuple(ends): list(counts) for ends, counts in state["told"]}
        self._used = {*self.links, *((agent,) for agent in self.uplinks)}
        self.deliveries = state["deliveries"]
        self.fp32_bytes = state["fp32-bytes"]
        self.paper_convention_bits = state["paper-convention-bits"]
        self.initial_bytes = state["initial-bytes"]

    def _rows(self, counts: Iterable[tuple[tuple[int, ...], Count]]) -> list[list[int]]:
        rows = []
        for ends, count in counts:
            now = [count.frames, count.keys, count.bytes, count.header_bytes]
            before = self._told.get(ends, [0, 0, 0, 0])
            if now != before:
                rows.append([*ends, *(new - old for new, old in zip(now, before, strict=True))])
                self._told[ends] = now
        return rows


TRAFFIC_COLUMNS = {
    "links": ["sender", "receiver", "frames", "keys", "bytes", "header_bytes"],
    "uplinks": ["agent", "frames", "keys", "bytes", "header_bytes"],
}


def _shown(count: Count) -> dict[str, int]:
    return {key: getattr(count, key) for key in ("frames", "keys", "bytes", "header_bytes")}


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for key, value in vars(count).items():
            setattr(total, key, getattr(total, key) + value)
    return total


def _with_bits(total: Count, counts: Iterable[Count]) -> Count:
    """The total with the bits per weight of all counts."""
    # Added up anew in the order of the counts: a running sum would round otherwise, and
    # a record's last digit would depend on how often it was asked for. `sum` rounds
    # otherwise, too, from Python 3.12 on.
    bits = 0.0
    for count in counts:
        bits += count.bits_per_weight
    return replace(total, bits_per_weight=bits)


def _mean_bits(count: Count) -> float | None:
    return count.bits_per_weight / count.frames if count.frames and count.bits_per_weight else None
