"""Several agents on one node: each plays its part of the message, and fails alone."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from logging import getLogger

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from flower_mcepl.clients.naming import agent_index, naming_the_agent
from flower_mcepl.messages.bundle import NodeBundle, seat_records
from flower_mcepl.messages.identity import identity

# Keeps an agent's new state, and gives the records that go on top of its answer.
Finish = Callable[[], dict[str, ArrayRecord]]
Begin = Callable[[RecordDict, Context, contextlib.ExitStack], tuple[RecordDict, Finish]]
logger = getLogger("flwr")


def begin_all(
    begin: Begin, content: RecordDict, context: Context, opened: contextlib.ExitStack
) -> tuple[RecordDict, Finish]:
    """Play the rounds of all agents that a message is to, one after the other.

    Returns the content of the answer, and what keeps the new states.
    """
    bundle = NodeBundle.from_records(content)
    answers: dict[int, RecordDict] = {}
    failures: dict[int, str] = {}
    kept: dict[int, tuple[Context, Finish]] = {}
    for seat, part in bundle.parts.items():
        own = seat_context(context, seat=seat, per_node=bundle.per_node)
        try:
            with naming_the_agent(own):
                answers[seat], finish = begin(RecordDict(dict(part)), own, opened)
                kept[seat] = own, finish
        except Exception as error:
            logger.exception("%s", error)
            failures[seat] = str(error)

    def keep() -> dict[str, ArrayRecord]:
        handed: dict[int, dict[str, ArrayRecord]] = {}
        for seat, (own, finish) in kept.items():
            handed[seat] = finish()
            prefix = _prefix(agent_index(own))
            context.state.update({prefix + name: record for name, record in own.state.items()})
        return seat_records(handed)

    answer = NodeBundle(bundle.per_node, answers, failures)
    return RecordDict(answer.to_records(ConfigRecord)), keep


def introduce_all(content: RecordDict, context: Context) -> RecordDict:
    """Answer to the question which agents this node plays."""
    bundle = NodeBundle.from_records(content)
    parts = {
        seat: identity(
            agent_index(seat_context(context, seat=seat, per_node=bundle.per_node)), ConfigRecord
        )
        for seat in bundle.parts
    }
    return RecordDict(NodeBundle(bundle.per_node, parts).to_records(ConfigRecord))


def seat_context(context: Context, *, seat: int, per_node: int) -> Context:
    """Context of one agent of a node, as that of a node that plays it alone."""
    agent = agent_index(context) * per_node + seat
    node = {**context.node_config, "partition-id": agent}
    nodes = node.get("num-partitions")
    if isinstance(nodes, int):
        node["num-partitions"] = nodes * per_node
    prefix = _prefix(agent)
    state = {
        name.removeprefix(prefix): record
        for name, record in context.state.items()
        if name.startswith(prefix)
    }
    return replace(context, node_config=node, state=RecordDict(state))


def _prefix(agent: int) -> str:
    return f"agent-{agent}/"
