"""Several agents on one node: each plays its part of the message, and fails alone."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from logging import getLogger

from flwr.app import ConfigRecord, Context, RecordDict

from flower_mcepl.clients.naming import agent_index, naming_the_agent
from flower_mcepl.messages.bundle import NodeBundle
from flower_mcepl.messages.identity import identity

Finish = Callable[[], None]
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
    kept: list[tuple[Context, Finish]] = []
    for seat, part in bundle.parts.items():
        own = seat_context(context, seat=seat, per_node=bundle.per_node)
        try:
            with naming_the_agent(own):
                answers[seat], finish = begin(RecordDict(dict(part)), own, opened)
                kept.append((own, finish))
        except Exception as error:
            logger.exception("%s", error)
            failures[seat] = str(error)

    def keep() -> None:
        for own, finish in kept:
            finish()
            prefix = _prefix(agent_index(own))
            context.state.update({prefix + name: record for name, record in own.state.items()})

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
