"""Who sent how many bytes to whom."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, final


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


# of a count: an agent, or the ends of a link
Place = TypeVar("Place", bound=int | tuple[int, int])


@final
class Tally(Mapping[Place, Count]):
    """Counts by place, their running total, and which of them changed of late."""

    def __init__(self) -> None:
        self.total = Count()  # but for the bits per weight
        self._counts: defaultdict[Place, Count] = defaultdict(Count)
        self._reported: dict[Place, list[int]] = {}  # as of the last `changes`
        self._used: set[Place] = set()  # places that may have changed since

    def __getitem__(self, place: Place) -> Count:
        """Count of a place; of one where nothing passed, too."""
        return self._counts[place]

    def __contains__(self, place: object) -> bool:
        """Whether anything passed a place, or was asked of it."""
        return place in self._counts

    def __iter__(self) -> Iterator[Place]:
        """Places in the order in which they were first used."""
        return iter(self._counts)

    def __len__(self) -> int:
        """Number of places."""
        return len(self._counts)

    def add(self, place: Place, frames: Sequence[Shipment]) -> None:
        """Count frames that passed a place together."""
        self._counts[place].add(frames)
        self.total.add(frames)
        self._used.add(place)

    def sum(self) -> Count:
        """The total with the bits per weight of all counts."""
        # Added up anew in the order of the counts: a running sum would round otherwise,
        # and a record's last digit would depend on how often it was asked for. `sum`
        # rounds otherwise, too, from Python 3.12 on.
        bits = 0.0
        for count in self._counts.values():
            bits += count.bits_per_weight
        return replace(self.total, bits_per_weight=bits)

    def changes(self) -> list[list[int]]:
        """Counts since the last call, in rows that `TRAFFIC_COLUMNS` names."""
        rows: list[list[int]] = []
        used, self._used = self._used, set()
        for place in sorted(used, key=_ends):
            count = self[place]
            now = [count.frames, count.keys, count.bytes, count.header_bytes]
            before = self._reported.get(place, [0, 0, 0, 0])
            if now != before:
                new = [after - earlier for after, earlier in zip(now, before, strict=True)]
                rows.append([*_ends(place), *new])
                self._reported[place] = now
        return rows

    def state(self) -> list[list[float]]:
        """All counts, JSON-able, in their order: sums of floats depend on it."""
        return [[*_ends(place), *asdict(count).values()] for place, count in self._counts.items()]

    def reported(self) -> list[list[list[int]]]:
        """Counts as of the last `changes`, JSON-able."""
        return [[_ends(place), counts] for place, counts in self._reported.items()]

    def restore(
        self, counts: Mapping[Place, Sequence[Any]], reported: Mapping[Place, Sequence[int]]
    ) -> None:
        """Count on from where `state` and `reported` were taken."""
        self._counts = defaultdict(
            Count, {place: Count(*fields) for place, fields in counts.items()}
        )
        self.total = _sum(self._counts.values())
        self._reported = {place: list(fields) for place, fields in reported.items()}
        self._used = set(self._counts)


class Ledger:
    """Byte counts per directed link and per uplink, totals since the start of the run.

    A frame goes up to the relay once (uplink) and down once per neighbor (link). Both
    are told, never added, but for what one node or the relay handles. A delivery
    between two agents of one node is over no link, and counted apart: the relay hands
    it back to the node that it came from. Beside the real bytes stand two figures for
    comparison, over the deliveries of links: what fp32 weights would have cost, and the
    paper's own convention, one bit per *kept* weight.

    Parameters
    ----------
    agents_per_node : int (default: 1)
        Number k of agents of each node: node p plays ``p * k`` to ``p * k + k - 1``.
    """

    def __init__(self, *, agents_per_node: int = 1) -> None:
        self.links: Tally[tuple[int, int]] = Tally()  # by (sender, receiver)
        self.local: Tally[tuple[int, int]] = Tally()  # the same, of two agents of one node
        self.uplinks: Tally[int] = Tally()  # by agent
        self._per_node = agents_per_node
        self._sent: defaultdict[int, int] = defaultdict(int)  # bytes over an agent's outgoing links
        self._received: defaultdict[int, int] = defaultdict(int)  # and over its incoming ones
        # payloads handed out: one or several frames over one link in one round
        self.deliveries = 0
        self.local_deliveries = 0  # the same between agents of one node
        self.fp32_bytes = 0
        self.paper_convention_bits = 0
        self.initial_bytes = 0  # of initial arrays, from the server to nodes; over no link

    def add_uplink(self, agent: int, frames: Sequence[Shipment]) -> None:
        """Count frames that came up to the relay."""
        self.uplinks.add(agent, frames)

    def add_delivery(self, sender: int, receiver: int, frames: Sequence[Shipment]) -> None:
        """Count frames handed out from one agent to another in one round.

        A node that goes away may never fetch them.
        """
        if self._on_one_node(sender, receiver):
            self.local.add((sender, receiver), frames)
            self.local_deliveries += 1
            return
        self.links.add((sender, receiver), frames)
        num_bytes = sum(frame.num_bytes for frame in frames)
        self._sent[sender] += num_bytes
        self._received[receiver] += num_bytes
        self.deliveries += 1
        self.fp32_bytes += 4 * frames[-1].num_weights
        self.paper_convention_bits += frames[-1].kept_weights

    def _on_one_node(self, sender: int, receiver: int) -> bool:
        k = self._per_node
        return k > 1 and sender // k == receiver // k

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
        return self.links.total.bytes, self.uplinks.total.bytes

    @property
    def local_bytes(self) -> int:
        """Bytes between agents of one node; 0 where each has one of its own."""
        return self.local.total.bytes

    def totals(self) -> dict[str, Any]:
        """Totals of the run in bytes, and mean bits per weight on links and uplinks."""
        links, uplinks, local = self.links.sum(), self.uplinks.sum(), self.local.total
        both = _sum([links, uplinks])
        handled = {
            agent: count.bytes + self.received(agent) for agent, count in self.uplinks.items()
        }
        busiest = max(handled, key=lambda agent: handled[agent], default=None)
        return {
            "links_total": links.bytes,
            "uplink_total": uplinks.bytes,
            "relay_total": both.bytes + local.bytes,
            "header_total": both.header_bytes + local.header_bytes,
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
            **self._local_totals(),
        }

    def _local_totals(self) -> dict[str, int]:
        """Totals between agents of one node, where there are any."""
        if not self.local:
            return {}
        return {"local_total": self.local_bytes, "local_deliveries": self.local_deliveries}

    def link_rows(self) -> list[dict[str, Any]]:
        """Return one row per directed link that carried anything."""
        return _rows(self.links)

    def local_rows(self) -> list[dict[str, Any]]:
        """Return such rows for each two agents of one node."""
        return _rows(self.local)

    def changes(self) -> dict[str, list[list[int]]]:
        """Counts since the last call, in rows that `TRAFFIC_COLUMNS` names.

        Those between agents of one node, where there are any, are as those of links.
        """
        local = self.local.changes()
        return {
            "links": self.links.changes(),
            "uplinks": self.uplinks.changes(),
            **({"local": local} if local else {}),
        }

    def state(self) -> dict[str, Any]:
        """All counts, JSON-able."""
        return {
            "links": self.links.state(),
            "uplinks": self.uplinks.state(),
            "sent": [[agent, count] for agent, count in self._sent.items()],
            "received": [[agent, count] for agent, count in self._received.items()],
            "told": [*self.links.reported(), *self.uplinks.reported()],
            "deliveries": self.deliveries,
            "fp32-bytes": self.fp32_bytes,
            "paper-convention-bits": self.paper_convention_bits,
            "initial-bytes": self.initial_bytes,
            **(
                {
                    "local": self.local.state(),
                    "local-told": self.local.reported(),
                    "local-deliveries": self.local_deliveries,
                }
                if self.local
                else {}
            ),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Count on from where `state` was taken."""
        reported = state["told"]
        self.links.restore(_by_link(state["links"]), _reported_by_link(reported))
        self.uplinks.restore(
            {row[0]: row[1:] for row in state["uplinks"]},
            {ends[0]: counts for ends, counts in reported if len(ends) == 1},
        )
        # not in a checkpoint where nothing went from an agent to another of its node
        self.local.restore(
            _by_link(state.get("local", [])), _reported_by_link(state.get("local-told", []))
        )
        self.local_deliveries = state.get("local-deliveries", 0)
        self._sent = defaultdict(int, dict(state["sent"]))
        self._received = defaultdict(int, dict(state["received"]))
        self.deliveries = state["deliveries"]
        self.fp32_bytes = state["fp32-bytes"]
        self.paper_convention_bits = state["paper-convention-bits"]
        self.initial_bytes = state["initial-bytes"]


TRAFFIC_COLUMNS = {
    "links": ["sender", "receiver", "frames", "keys", "bytes", "header_bytes"],
    "uplinks": ["agent", "frames", "keys", "bytes", "header_bytes"],
}


def _ends(place: int | tuple[int, int]) -> list[int]:
    return [*place] if isinstance(place, tuple) else [place]


def _rows(tally: Tally[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"sender": sender, "receiver": receiver, **_shown(count)}
        for (sender, receiver), count in sorted(tally.items())
    ]


def _by_link(rows: Iterable[Sequence[Any]]) -> dict[tuple[int, int], Sequence[Any]]:
    return {(sender, receiver): counts for sender, receiver, *counts in rows}


def _reported_by_link(rows: Iterable[tuple[Any, Any]]) -> dict[tuple[int, int], Sequence[int]]:
    return {(ends[0], ends[1]): counts for ends, counts in rows if len(ends) == 2}


def _shown(count: Count) -> dict[str, int]:
    return {key: getattr(count, key) for key in ("frames", "keys", "bytes", "header_bytes")}


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        for key, value in vars(count).items():
            setattr(total, key, getattr(total, key) + value)
    return total


def _mean_bits(count: Count) -> float | None:
    return count.bits_per_weight / count.frames if count.frames and count.bits_per_weight else None
