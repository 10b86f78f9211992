"""The book of a run: record, checkpoints, progress and status, until its summary."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, final

from flower_mcepl.errors import ConfigError, FlowerMceplError, IncompleteRunError, first_line
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.record.layout import Row
from flower_mcepl.record.selection import find_stall
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.checkpoint import ROUND
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.runs.resumption import (
    RUN,
    RunCheckpoints,
    how_to_resume,
    new_run_id,
    only_writer,
    reopen,
    run_id_of,
)


class Taken(NamedTuple):
    """What the record says of answers that were taken in."""

    rows: list[Row]  # of rounds.jsonl
    refused: dict[int, list[str]]  # why frames were, by who refused them


@final
class RunBook(Generic[FrameT]):
    """Rounds of a run, taken into exchange, record and log; made by `open_book`.

    Attributes
    ----------
    monitor : RunMonitor
        Rows, losses and evaluations so far.
    record : RunRecord or None
        Where it is written; None: nowhere.
    checkpoints : RunCheckpoints or None
        Those in the record.
    run : str
        Id of the run, the same when it is resumed.
    resumed : Bundle or None
        The checkpoint that the run goes on from; None: it begins.
    answered : int
        Agents that took part in the last round before the run broke off; 0: none.
    unanswered : tuple of int, optional
        Agents that did not answer the closing exchange, those that had left before it
        not counted; None until it is over.
    summary : dict
        As in ``summary.json``, once the run has ended.
    """

    def __init__(
        self,
        exchange: Exchange[FrameT],
        monitor: RunMonitor[FrameT],
        run: str,
        *,
        patience: int = 0,
    ) -> None:
        self.monitor, self.run = monitor, run
        self.record: RunRecord | None = None
        self.checkpoints: RunCheckpoints[FrameT] | None = None
        self.resumed: Bundle | None = None
        self.answered = 0
        self.unanswered: tuple[int, ...] | None = None
        self.summary: dict[str, Any] = {}
        self._exchange = exchange
        self._patience = patience

    @property
    def first(self) -> int:
        """The first round that is still to be played."""
        return 1 if self.resumed is None else int(self.resumed.facts[ROUND]) + 1

    def rounds(self) -> Iterator[int]:
        """Rounds still to be played; early stopping brings the last one nearer."""
        round = self.first
        while round <= self.monitor.num_rounds:
            yield round
            round += 1

    def close_round(
        self,
        round: int,
        answers: Mapping[int, Answer[FrameT]],
        *,
        failed: Mapping[str, str] | None = None,
        missing: Sequence[int] = (),
        states: Mapping[str, str] | None = None,
        left: Collection[int] = (),
        clock: float | None = None,
        clocks: Mapping[int, float] | None = None,
    ) -> None:
        """Take in the answers of a round; ``num_rounds + 1`` is the closing exchange.

        Parameters
        ----------
        round : int
            The round that ends.
        answers : mapping
            Answer by agent, those that came late included.
        failed : mapping, optional
            Reason by name of agent or node.
        missing : sequence of int
            Agents that did not answer at all.
        states : mapping, optional
            What changed about agents or nodes since the round before.
        left : collection of int, optional
            Agents that were gone when the closing exchange began.
        clock : float, optional
            When the round ended, where the run has a clock.
        clocks : mapping, optional
            When it began, by agent: a late answer is of an earlier round.
        """
        answers = dict(sorted(answers.items()))
        taken = self.take(round, answers, clocks)
        self.monitor.add_rows(taken.rows)
        self.monitor.close_round(
            round,
            answers,
            taken.rows,
            refused=taken.refused,
            failed=dict(failed or {}),
            missing=list(missing),
            states=dict(states or {}),
            clock=clock,
        )
        if round > self.monitor.num_rounds:
            self.note_end([i for i, answer in answers.items() if answer.late_of is None], left)
        elif taken.rows and self._patience:
            self._look_for_stall(round)

    def take(
        self,
        round: int,
        answers: Mapping[int, Answer[FrameT]],
        clocks: Mapping[int, float] | None = None,
    ) -> "Taken":
        """Take in answers to parcels of a round; what the record says of them."""
        # Before the new frames count: a row's bytes are those that led to the model
        # that it speaks of.
        rows = self.monitor.rows_of(round, answers, clocks)
        refused = {agent: list(answer.refused) for agent, answer in answers.items()}
        server = self._exchange.topology.num_agents  # its number; a relay refuses nothing
        for agent, answer in answers.items():
            reasons = self._exchange.take(agent, answer, round=answer.late_of or round)
            refused.setdefault(server, []).extend(reasons)
        return Taken(rows, {number: reasons for number, reasons in refused.items() if reasons})

    def note_end(self, answered: Collection[int], left: Collection[int]) -> None:
        """Note who owes an answer to the closing exchange, now that it is over."""
        agents = range(self._exchange.topology.num_agents)
        self.unanswered = tuple(i for i in agents if i not in answered and i not in left)

    def _look_for_stall(self, round: int) -> None:
        """Let the next round be the last if the agents have learned no more for long.

        Not this one: agents that are late would be left out of the closing exchange,
        and no checkpoint would hold the last round.
        """
        metric = self.monitor.metric
        stall = find_stall(self.monitor.rows, metric)
        if stall is None or stall.evaluations < self._patience:
            return
        if round + 1 < self.monitor.num_rounds:
            self.monitor.log(
                f"stopping early: {metric.name} was best after round {stall.best_round} "
                f"({stall.best:.4f}), and not better in {stall.evaluations} evaluations since "
                f"(patience = {self._patience}). Round {round + 1} is the last."
            )
            self.monitor.stop_after(
                round + 1,
                patience=self._patience,
                best_round=stall.best_round,
                best=stall.best,
            )

    def ending(self) -> tuple[str, FlowerMceplError | None]:
        """Status of a run whose rounds went by without an error, and what is to raise.

        Nothing else says that a run is ``finished``: every agent that had not left
        answered the closing exchange.
        """
        if self.unanswered == ():
            return "finished", None
        agents = ", ".join(map(str, self.unanswered or ())) or "all"
        goes_on = self.checkpoints is not None and self.checkpoints.rounds()
        way_out = "resume the run" if goes_on else "start the run anew (it has no checkpoint)"
        return "incomplete", IncompleteRunError(
            f"the closing exchange has no answer from these agents: {agents}. Their final "
            "evaluations are missing, and so may be their final states. Look at the failures "
            f"above, and {way_out}."
        )

    def due(self, round: int) -> bool:
        """Whether a checkpoint follows ``round``.

        The agents must store their states in that round, too.
        """
        return self.checkpoints is not None and self.checkpoints.due(round)

    def keep(self, round: int, more: Bundle | None = None) -> None:
        """Write the checkpoint of ``round``, if one is due."""
        if self.checkpoints is not None and self.checkpoints.due(round):
            self.checkpoints.save(round, more or Bundle())


@contextlib.contextmanager
def open_book(
    exchange: Exchange[FrameT],
    config: Mapping[str, Any],
    *,
    num_rounds: int,
    record: Callable[[Mapping[str, Any]], RunRecord] | None = None,
    resume: Path | None = None,
    agents: Iterable[Mapping[str, Any]] = (),
    checkpoint_every: int = 0,
    keep_best: bool = False,
    patience: int = 0,
    keep_frames: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[RunBook[FrameT]]:
    """Hold the book of a run while it goes on; the summary says how the block ended.

    Without an exception it is what `RunBook.ending` says: ``finished``, and its
    checkpoints go, or ``incomplete``. A KeyboardInterrupt makes it ``interrupted``,
    anything else ``failed``. All but a finished run can be resumed, and the log says
    how.

    Parameters
    ----------
    exchange : Relay or Center
        Takes in the answers; where the run is resumed it is set back to the checkpoint.
    config : mapping
        What is needed to repeat the run beside the exchange, for ``config.json``.
    num_rounds : int
        Rounds, without the closing exchange.
    record : callable, optional
        Gives the record of a new run, whose config it gets; None writes nothing.
    resume : Path, optional
        The record of a run that broke off, in place of ``record``.
    agents : iterable of mapping
        Where the run is resumed: introductions of the agents, if known by now.
    checkpoint_every : int (default: 0)
        Rounds between checkpoints; 0 writes none.
    keep_best, patience : bool, int (default: False, 0)
        As in `RoundOptions`.
    keep_frames : bool (default: False)
        Where the run is resumed: keep every frame, as in `RunRecord.create`.
    log : callable
        Gets each line.

    Raises
    ------
    RecordError
        If the record cannot be written, or the run not be resumed.
    ConfigError
        If the run that is resumed had other settings, or its agents had.
    TopologyError
        If the graph cannot be recorded.
    IncompleteRunError
        If agents did not answer the closing exchange.
    """
    monitor = RunMonitor(exchange, num_rounds, log=log)
    book = RunBook(exchange, monitor, new_run_id(), patience=patience)
    config = {**config, "keep_best": keep_best, "patience": patience}
    with contextlib.ExitStack() as held:
        if resume is not None:
            settings = _settings(exchange, config, num_rounds)
            book.record, book.resumed, book.answered = reopen(
                resume.absolute(),
                settings,
                held=held,
                agents=agents,
                with_frames=keep_frames,
                log=log,
            )
            book.run = run_id_of(book.record)
        elif record is not None:
            settings = {RUN: book.run, **_settings(exchange, config, num_rounds)}
            book.record = record(settings)
            held.enter_context(only_writer(book.record.path))
            book.record.refuse_used()
            book.record.amend_config(**settings)
        if book.record is not None:
            book.monitor.record = book.record
            book.checkpoints = RunCheckpoints(
                book.record, exchange, book.monitor, every=checkpoint_every
            )
            if book.resumed is not None:
                book.checkpoints.restore(book.resumed)
        status = "failed"
        error: Exception | None = None
        try:
            yield book
            status, error = book.ending()
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as raised:
            error = raised
            raise
        finally:
            has_finished = False
            try:
                book.summary = book.monitor.finish(status, **_about(error))
                has_finished = status == "finished"
            finally:  # a full disk has no room for a summary, either
                if not has_finished and book.record is not None:
                    log(how_to_resume(book.record.path))
        if error is not None:
            raise error
        if book.checkpoints is not None:
            book.checkpoints.clear()


def check_selection(handshakes: Iterable[Mapping[str, Any]]) -> None:
    """Refuse agents whose best states, or last round, would be chosen by test examples.

    An agent that does not say on which split it is evaluated, as that of an app of
    one's own, has to be believed.

    Raises
    ------
    ConfigError
        If one is evaluated on its test split.
    """
    for facts in handshakes:
        if "num-test-examples" in facts:
            raise ConfigError(
                "keep-best and patience choose by the evaluation, which must not be that of the "
                f"test split; agent {facts.get('agent')} is evaluated on its test split. Let the "
                'data function give a validation split, set evaluate-on = "validation" '
                '(AgentData.of(..., evaluate_on="validation")), and test the chosen states '
                "afterwards (docs/data.md)."
            )


def _about(error: Exception | None) -> dict[str, Any]:
    """What the summary says of an error: its class, and why in a line."""
    if error is None:
        return {}
    return {"error": {"type": type(error).__name__, "reason": first_line(str(error))}}


def _settings(
    exchange: Exchange[FrameT], config: Mapping[str, Any], num_rounds: int
) -> dict[str, Any]:
    return {
        **config,
        "num_rounds": num_rounds,
        "evaluate_every": exchange.evaluate_every,
        "max_staleness": exchange.max_staleness,
        "key_interval": exchange.key_interval,
        "age_decay": exchange.age_decay,
        "schedule": exchange.schedule,
        "topology": exchange.topology.to_config(),
    }
