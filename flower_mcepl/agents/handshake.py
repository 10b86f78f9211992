"""Handshake: what an agent says of itself at first, and what all agents share."""

from collections.abc import Mapping
from typing import Any

from flower_mcepl.agents.agent import CLASS_FACTS, Agent
from flower_mcepl.errors import FingerprintError

PARAMETERS = "parameters"  # key of `Agent.parameters`, which makes facts a handshake
# Numbers of weights that each mask keeps, always: `Agent.layers` sorted by name. An
# algorithm whose masks vary in size leaves it out.
KEPT_BY_LAYER = "kept-by-layer"


def introduction(agent: Agent, *, tell_classes: bool) -> dict[str, Any]:
    """Facts of an agent for the others and the record, with its parameters.

    Without ``tell_classes`` it keeps to itself which classes it holds, and how many
    examples of each.
    """
    secret = () if tell_classes else CLASS_FACTS
    facts = {key: fact for key, fact in agent.describe().items() if key not in secret}
    return {**facts, PARAMETERS: agent.parameters()}


def common_ground(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Facts of a handshake in which all agents must agree, in an order."""
    return (*(repr(facts.get(key)) for key, _, _ in _MUST_AGREE), _layers_of(facts))


def check_common_ground(
    mine: str, my_facts: Mapping[str, Any], other: str, other_facts: Mapping[str, Any]
) -> None:
    """Refuse two agents whose handshakes (`Agent.describe`) do not fit together.

    Parameters
    ----------
    mine, other : str
        How to call the two in an error, such as ``"agent 3 (node 17)"``.
    my_facts, other_facts : mapping
        Their handshakes.

    Raises
    ------
    FingerprintError
        If model, frozen weights or common first mask differ.
    """
    both = f"{mine} and {other}"
    for key, what, way_out in _MUST_AGREE:
        one, two = my_facts.get(key), other_facts.get(key)
        if one != two and not (key in _OF_TASKS and None in (one, two)):  # a server has none
            raise FingerprintError(f"{both} have different {what}: {one} and {two}. {way_out}")
    one, two = _layers_of(my_facts), _layers_of(other_facts)
    if one != two:
        raise FingerprintError(
            f"{both} must both tell the sizes of as many masks ({KEPT_BY_LAYER}), or none; got "
            f"{one} and {two}. Run the same release on all devices."
        )


def _layers_of(facts: Mapping[str, Any]) -> int | None:
    """Number of masks whose sizes the handshake tells; None where it tells none."""
    return len(facts[KEPT_BY_LAYER]) if KEPT_BY_LAYER in facts else None


_OF_TASKS = ("task", "main-metric")
_MUST_AGREE = (
    ("algorithm", "algorithms", "Run the same algorithm on all devices."),
    ("task", "tasks", "Set the same task on all devices."),
    ("main-metric", "main metrics", "Use the same task, with the same main, on all devices."),
    (
        "num-weights",
        "models (numbers of maskable weights)",
        "Use the same model function and settings on all devices.",
    ),
    (
        "fingerprint",
        "frozen weights (fingerprints)",
        "Use the same seed, model function and torch release on all devices; every random draw of "
        "the model function must come from torch, NumPy or Python's random module.",
    ),
    (
        "first-mask",
        "common first masks (digests)",
        "Use the same seed on all devices, and where retention differs from agent to agent, the "
        "same first_retention.",
    ),
    (
        "prior",
        "classes of weights for the wire (digests)",
        "Use the same score_init and torch release on all devices.",
    ),
)
