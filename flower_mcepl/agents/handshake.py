"""Handshake: what an agent says of itself at first, and what all agents share."""

from collections.abc import Mapping
from typing import Any

from flower_mcepl.agents.agent import CLASS_FACTS, Agent
from flower_mcepl.config.checks import check
from flower_mcepl.errors import FingerprintError

PARAMETERS = "parameters"  # key of `Agent.parameters`, which makes facts a handshake
# Numbers of weights that each mask keeps, always: `Agent.layers` sorted by name. An
# algorithm whose masks vary in size leaves it out.
KEPT_BY_LAYER = "kept-by-layer"
# Numbers of filters that stay on in the end, of each layer that has gates, sorted by
# name; the metric of this name is how many filters of the network keep any weight.
LIVE_FILTERS = "live-filters"
FINGERPRINT, WEIGHTS_FROM = "fingerprint", "weights-from"
SHARE = "share"  # patterns of the layers that agents send, where those are not all
# Of a network in stages: how many of them the agent holds, and numbers of weights and
# of masks or arrays that agents of each depth send, the shallowest first.
DEPTH = "depth"
WEIGHTS_BY_DEPTH, LAYERS_BY_DEPTH = "weights-by-depth", "layers-by-depth"


def introduction(agent: Agent, *, tell_classes: bool) -> dict[str, Any]:
    """Facts of an agent for the others and the record, with its parameters.

    Without ``tell_classes`` it keeps to itself which classes it holds, and how many
    examples of each.

    Raises
    ------
    ConfigError
        If the agent calls a fact as the record would call another one.
    """
    secret = () if tell_classes else CLASS_FACTS
    facts = {key: fact for key, fact in agent.describe().items() if key not in secret}
    wrong = [key for key in facts if "_" in key]
    check(
        not wrong,
        "names of an agent's facts must be in kebab-case, without _",
        wrong,
        "Rename them in Agent.describe.",
    )
    return {**facts, PARAMETERS: agent.parameters()}


def common_ground(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Facts of a handshake in which all agents must agree, in an order."""
    return tuple(repr(_compared(key, facts)) for key, _, _ in _MUST_AGREE)


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
        one, two = _compared(key, my_facts), _compared(key, other_facts)
        # a server, which is no agent, has no task, and none of what goes with it
        if one != two and not (key in _OF_TASK and "agent" not in other_facts):
            origin = _origins(my_facts, other_facts) if key == FINGERPRINT else ""
            raise FingerprintError(
                f"{both} have different {what}: {one} and {two}. {origin}{way_out}"
            )


def _origins(*both: Mapping[str, Any]) -> str:
    """Sentence about pretrained weights, where one of two agents has any.

    Their digests are not compared by themselves: the same weights may lie in files of
    two formats.
    """
    one, two = (facts.get(WEIGHTS_FROM, "the model function") for facts in both)
    if one == two:
        return ""
    return f"They come from {one} and {two}: set weights to the same ones. "


def _compared(key: str, facts: Mapping[str, Any]) -> Any:
    """Fact as it is compared: of counts by layer, how many layers there are.

    Where agents differ in depth, what goes with an agent's own depth is compared with
    what all agree on; that it fits is all that counts.
    """
    fact = facts.get(key)
    if key in _BY_LAYER and isinstance(fact, list):
        fact = len(fact)
    return _OF_ITS_DEPTH if _fits_depth(key, fact, facts) else fact


def _fits_depth(key: str, fact: Any, facts: Mapping[str, Any]) -> bool:
    """Whether a fact is what all agents of such a depth say."""
    depth, by_depth = facts.get(DEPTH), facts.get(_BY_DEPTH.get(key, ""))
    if not isinstance(depth, int) or not isinstance(by_depth, list):
        return False
    due = by_depth[depth - 1] if 1 <= depth <= len(by_depth) else None
    if key == LIVE_FILTERS:  # of fewer layers than are sent, or of none
        some = isinstance(fact, int) and isinstance(due, int) and 0 < fact < due
        return fact is None or some
    return due is not None and bool(fact == due)


_OF_ITS_DEPTH = "as of its depth"
_BY_DEPTH = {
    "num-weights": WEIGHTS_BY_DEPTH,
    KEPT_BY_LAYER: LAYERS_BY_DEPTH,
    LIVE_FILTERS: LAYERS_BY_DEPTH,
}
_BY_LAYER = (KEPT_BY_LAYER, LIVE_FILTERS)
# What a run is judged by is the same for all: else the first agent would choose it.
_OF_TASK = ("task", "main-metric", "higher-is-better", "metric-unit", KEPT_BY_LAYER)
_MUST_AGREE = (
    ("algorithm", "algorithms", "Run the same algorithm on all devices."),
    ("task", "tasks", "Set the same task on all devices."),
    *(
        (key, f"tasks ({key})", "Set the same task on all devices.")
        for key in ("main-metric", "higher-is-better", "metric-unit")
    ),
    (SHARE, "layers that they share (None: all)", "Set the same share on all devices."),
    *(
        (key, f"networks in stages ({key})", "Use the same model function and settings.")
        for key in (WEIGHTS_BY_DEPTH, LAYERS_BY_DEPTH)
    ),
    (
        "num-weights",
        "models (numbers of maskable weights)",
        "Use the same model function and settings on all devices.",
    ),
    (
        LIVE_FILTERS,
        "masks (numbers of layers with gates; None: none)",
        "Set the same filters and filters-layers on all devices; one that keeps all filters among "
        'others that do not has a share of 1, as in "1.0, 0.5".',
    ),
    (
        KEPT_BY_LAYER,
        "models (numbers of layers)",
        "Use the same model function and settings on all devices.",
    ),
    (
        FINGERPRINT,
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
