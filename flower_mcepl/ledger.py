"""Who sent how many bytes to whom."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any


@dataclass
class LinkCount:
    """Totals of one directed link since the start of the run."""

    frames: int = 0
    num_bytes: int = 0


class Ledger:
    """Counts payload bytes per directed link, and per uplink; all counts are totals since the start of the run.

    A frame goes up to the relay once (uplink) and down once per neighbor (link). Both are told, never added.
    Beside the real bytes stand two figures for comparison, over the same deliveries: what fp32 weights would have
    cost, and the paper's own convention, one bit per *kept* weight.
    """

    def __init__(self) -> None:
        self.links: defaultdict[tuple[int, int], LinkCount] = defaultdict(LinkCount)
        self.uplink: defaultdict[int, int] = defaultdict(int)  # bytes by agent
        self.sent: defaultdict[int, int] = defaultdict(int)  # bytes over the agent's outgoing links
        self.received: defaultdict[int, int] = defaultdict(int)  # bytes over the agent's incoming links
        self.fp32_bytes = 0
        self.paper_convention_bits = 0

    def add_uplink(self, agent: int, num_bytes: int) -> None:
        """Count a frame that came up to the relay."""
        self.uplink[agent] += num_bytes

    def add_delivery(
        self, sender: int, receiver: int, num_bytes: int, *, num_weights: int = 0, kept_weights: int = 0
    ) -> None:
        """Count a frame handed out for one link, and what it stands for (a node that goes away may never fetch it)."""
        link = self.links[sender, receiver]
        link.frames += 1
        link.num_bytes += num_bytes
        self.sent[sender] += num_bytes
        self.received[receiver] += num_bytes
        self.fp32_bytes += 4 * num_weights
        self.paper_convention_bits += kept_weights

    def totals(self) -> dict[str, Any]:
        """Return the run's totals in bytes."""
        handled = {agent: self.uplink[agent] + self.received[agent] for agent in list(self.uplink)}
        busiest = max(handled, key=lambda agent: handled[agent], default=None)
        return {
            "links_total": sum(self.sent.values()),
            "uplink_total": sum(self.uplink.values()),
            "deliveries": sum(link.frames for link in self.links.values()),
            "busiest_agent": busiest,
            "busiest_agent_total": handled.get(busiest, 0) if busiest is not None else 0,
            "fp32_total": self.fp32_bytes,
            "paper_convention_bytes": self.paper_convention_bits / 8,
        }

    def link_rows(self) -> list[dict[str, int]]:
        """Return one row per directed link that carried anything."""
        return [
            {"sender": sender, "receiver": receiver, "frames": link.frames, "bytes": link.num_bytes}
            for (sender, receiver), link in sorted(self.links.items())
        ]


def human_bytes(count: float | None) -> str:
    """Write a number of bytes in decimal units: ``1_234_567`` is ``"1.23 MB"``; ``None`` is ``"-"``."""
    if count is None:
        return "-"
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if abs(count) < 999.5:  # three digits would round more than this up to 1000
            return f"{count:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:.0f} PB"
