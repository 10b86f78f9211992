"""Decisions of devices on their filters, for the run record."""

from collections.abc import Mapping

from flower_mcepl.agents.parts.pace import decision_of
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.record.layout import Row


def decisions_of(answers: Mapping[int, Answer[FrameT]], *, round: int) -> Row:
    """Entry of ``relay.jsonl`` on a round's answers; none where no device decides."""
    decisions = [
        {"agent": agent, "round": answer.late_of or round, **decision}
        for agent, answer in answers.items()
        if (decision := decision_of(answer.metrics)) is not None
    ]
    return {"decisions": decisions} if decisions else {}
