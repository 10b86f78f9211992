"""Several agents on one node: each plays its part of the message, and fails alone."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from logging import getLogger
from typing import final

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
    seats = Seats(content, context)
    for seat, (part, own) in seats.orders.items():
        with seats.failing_alone(seat):
            seats.answer(seat, *begin(part, own, opened))
    return seats.result()


@final
class Seats:
    """Several agents of one node, and what each answers to its part of a message.

    Attributes
    ----------
    orders : dict
        By seat: the content of its part, and its context.
    """

    def __init__(self, content: RecordDict, context: Context) -> None:
        bundle = NodeBundle.from_records(content)
        self._context, self._per_node = context, bundle.per_node
        self.orders = {
            seat: (
                RecordDict(dict(part)),
                seat_context(context, seat=seat, per_node=bundle.per_node),
            )
            for seat, part in bundle.parts.items()
        }
        self._answers: dict[int, RecordDict] = {}
        self._failures: dict[int, str] = {}
        self._kept: dict[int, Finish] = {}

    @contextlib.contextmanager
    def failing_alone(self, seat: int) -> Iterator[None]:
        """Take note of an error as that of one seat, and go on."""
        try:
            with naming_the_agent(self.orders[seat][1]):
                yield
        except Exception as error:
            logger.exception("%s", error)
            self._failures[seat] = str(error)

    def answer(self, seat: int, answer: RecordDict, finish: Finish) -> None:
        """Take note of a seat's answer, and of what keeps its new state."""
        self._answers[seat] = answer
        self._kept[seat] = finish

    def result(self) -> tuple[RecordDict, Finish]:
        """The content of the answer, and what keeps all new states."""
        answer = NodeBundle(self._per_node, self._answers, self._failures)
        return RecordDict(answer.to_records(ConfigRecord)), self._keep

    def _keep(self) -> dict[str, ArrayRecord]:
        handed: dict[int, dict[str, ArrayRecord]] = {}
        for seat, finish in self._kept.items():
            own = self.orders[seat][1]
            handed[seat] = finish()
            prefix = _prefix(agent_index(own))
            records = {prefix + name: record for name, record in own.state.items()}
            self._context.state.update(records)
        return seat_records(handed)


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
