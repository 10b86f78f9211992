"""Identity of a node: the question which agent it is, and the answer."""

from typing import Any

from flower_mcepl.messages import keys
from flower_mcepl.messages.limits import LIMITS, MakeRecord, Records


def question(configs: MakeRecord = dict) -> dict[str, Any]:
    """Records of a message that asks a node which agent it is, and nothing else."""
    return {keys.IDENTIFY: configs({})}


def is_question(records: Records) -> bool:
    """Whether a message is that question."""
    return keys.IDENTIFY in records


def identity(agent: int, configs: MakeRecord = dict) -> dict[str, Any]:
    """Records that answer it."""
    return {keys.AGENT: configs({keys.NUMBER: agent})}


def read_identity(records: Records) -> int | None:
    """Number of the agent that a node says it is; None where it says no number."""
    number = records.get(keys.AGENT, {}).get(keys.NUMBER)
    return number if type(number) is int and 0 <= number <= LIMITS.agent else None
