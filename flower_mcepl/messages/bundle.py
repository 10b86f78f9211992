"""Bundle: what one node gets and answers for all of its agents, in one message.

A node's agents sit on seats 0..k-1; the agent of seat i of the node with partition-id p
is ``p * k + i``. A record of seat i bears its own name behind ``i/``.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

from flower_mcepl.errors import ConfigError
from flower_mcepl.messages import keys
from flower_mcepl.messages.limits import LIMITS, Fields, MakeRecord, Records


@final
class NodeBundle:
    """Records of several agents of one node, by seat.

    Parameters
    ----------
    per_node : int
        Number k of agents of every node.
    parts : mapping
        Each seat's records by name.
    failures : mapping (default: none)
        In an answer: why an agent gives none, by seat.
    """

    def __init__(
        self,
        per_node: int,
        parts: Mapping[int, Mapping[str, Any]],
        failures: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.per_node, self.parts, self.failures = per_node, dict(parts), dict(failures)

    def to_records(self, configs: MakeRecord = dict) -> dict[str, Any]:
        """All records, and one that says what they are."""
        records = seat_records(self.parts)
        failed = {
            f"{seat}/{keys.FAILED}": configs({keys.REASON: reason[-LIMITS.error :]})
            for seat, reason in self.failures.items()
        }
        seats = sorted({*self.parts, *self.failures})
        about = {keys.PER_NODE: self.per_node, keys.SEATS: seats}
        return {keys.BUNDLE: configs(about), **records, **failed}

    @classmethod
    def from_records(cls, records: Records) -> "NodeBundle":
        """Read `to_records`.

        Raises
        ------
        ConfigError
            If it is no bundle, or one of other seats than it says.
        """
        fields = Fields(
            records.get(keys.BUNDLE),
            keys.BUNDLE,
            error=ConfigError,
            limits=LIMITS,
            way_out=". Use the same release of flower-mcepl on server and devices.",
        )
        per_node = fields.number(keys.PER_NODE, least=1, most=LIMITS.agent)
        seats = fields.agents(keys.SEATS)
        below = all(seat < per_node for seat in seats)
        fields.check(below, f"{keys.SEATS} must be below {keys.PER_NODE}, {per_node}", seats)
        parts: dict[int, dict[str, Any]] = {seat: {} for seat in seats}
        by_name = {str(seat): part for seat, part in parts.items()}
        for name, record in records.items():
            seat, _, own = name.partition("/")
            if own and seat in by_name:
                by_name[seat][own] = record
        failed = {seat for seat, part in parts.items() if keys.FAILED in part}
        reasons = {
            seat: fields.of(parts.pop(seat)[keys.FAILED], keys.FAILED).text(
                keys.REASON, most=LIMITS.error
            )
            for seat in failed
        }
        return cls(per_node, parts, {s: text or "no reason given" for s, text in reasons.items()})


def seat_records(parts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Records of several seats under the names that they have in a bundle."""
    return {
        f"{seat}/{name}": record for seat, part in parts.items() for name, record in part.items()
    }


def is_bundle(records: Records) -> bool:
    """Whether a message is to, or of, several agents of one node."""
    return keys.BUNDLE in records
