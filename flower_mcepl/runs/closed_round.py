"""What a round of a run came to, for its line in the record and for a person."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from flower_mcepl.errors import first_line
from flower_mcepl.exchange.ledger import Ledger
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.record.layout import Row


@dataclass(frozen=True)
class ClosedRound(Generic[FrameT]):
    """A round whose answers were taken in."""

    round: int
    answers: Mapping[int, Answer[FrameT]]
    rows: Sequence[Row]  # of rounds.jsonl, of the round before
    refused: Mapping[int, Sequence[str]]  # by who refused
    failed: Mapping[str, str]
    missing: Sequence[int]
    states: Mapping[str, str]  # of agents and nodes, where they changed
    introduces: bool  # somebody with facts that are new
    clock: float | None = None  # when it ended, where the run has a clock
    # bytes over links and uplinks up to its end, where the line comes later
    so_far: tuple[int, int] | None = None

    def whole_texts(self) -> Iterator[tuple[str, str]]:
        """Whole text of every failure, with the name that it is of."""
        yield from self.failed.items()
        for agent, answer in self.answers.items():
            if answer.evaluation_error:
                yield f"agent {agent}, evaluation", answer.evaluation_error

    def byte_counts(self, ledger: Ledger) -> Row:
        """Entries of ``relay.jsonl`` on bytes; ``local_bytes`` where there are any."""
        links, uplinks = self.so_far or ledger.so_far()
        local = {"local_bytes": ledger.local_bytes} if ledger.local else {}
        return {"link_bytes": links, "uplink_bytes": uplinks, **local}

    def evaluation_errors(self) -> Row:
        """Entry of ``relay.jsonl`` on evaluations that failed; none where none did."""
        errors = {
            agent: first_line(answer.evaluation_error)
            for agent, answer in self.answers.items()
            if answer.evaluation_error
        }
        return {"evaluation_errors": errors} if errors else {}
