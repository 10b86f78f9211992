"""Agents of one node that calculate as stacks (engine "batched")."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict

from flower_mcepl.agents.stack import AgentStack
from flower_mcepl.agents.stacking import check_stack, stacks_of
from flower_mcepl.clients.seats import Finish, Seats
from flower_mcepl.exchange.turn import Reply, alike, play_together
from flower_mcepl.messages.bundle import is_bundle

if TYPE_CHECKING:
    from flower_mcepl.clients.app import OpenSeat

OpenFn = Callable[[RecordDict, Context, contextlib.ExitStack], "OpenSeat"]


def begin_stacked(
    open_seat: OpenFn, content: RecordDict, context: Context, opened: contextlib.ExitStack
) -> tuple[RecordDict, Finish]:
    """Play the rounds of all agents of a node, those that are equal at once.

    An agent that cannot be opened or answered for fails alone; what fails in a stack
    fails for all agents in it. An agent that is a node's only one is a stack, too.
    """
    if not is_bundle(content):
        seat = open_seat(content, context, opened)
        (stack,) = stacks_of([seat.agent])
        return seat.answer(*_played(stack, [seat]))
    seats = Seats(content, context)
    open_seats: dict[int, OpenSeat] = {}
    for number, (part, own) in seats.orders.items():
        with seats.failing_alone(number):
            seat = open_seat(part, own, opened)
            stacks_of([seat.agent])  # refused here, where it fails alone
            open_seats[number] = seat
    for stack, numbers in _groups(open_seats):
        group = [open_seats[number] for number in numbers]
        try:
            replies = _played(stack, group)
        except Exception as error:
            for number in numbers:
                with seats.failing_alone(number):
                    raise error
            continue
        for number, seat, reply in zip(numbers, group, replies, strict=True):
            with seats.failing_alone(number):
                seats.answer(number, *seat.answer(reply))
    return seats.result()


def _groups(seats: "dict[int, OpenSeat]") -> Iterator[tuple[AgentStack, list[int]]]:
    """Stacks of agents that are to do the same in this round, with their seats."""
    for numbers in alike({number: seat.parcel for number, seat in seats.items()}):
        of_agent = {seats[number].agent.index: number for number in numbers}
        for stack in stacks_of([seats[number].agent for number in numbers]):
            yield stack, [of_agent[agent.index] for agent in stack.agents]


def _played(stack: AgentStack, seats: "Sequence[OpenSeat]") -> list[Reply]:
    """Play one round of a stack; before the first one it is tried."""
    if any(seat.fresh for seat in seats):
        check_stack(stack)
    return play_together(stack, [seat.mail for seat in seats], [seat.parcel for seat in seats])
