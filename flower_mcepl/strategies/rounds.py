"""Rounds of every strategy: one message per agent and round, by relay or center.

One class, and longer than others: Flower asks one object for all these methods. What it
is made of has files of its own: who is there (`attendance`, `roster`), sending and
waiting (`dispatch`, `waiting`), reading replies (`intake`, `answers`).
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from logging import INFO, getLogger
from pathlib import Path
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flower_mcepl.config.schedules import ASYNC
from flower_mcepl.errors import ConfigError, RosterError
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.messages.order import Order
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.book import RunBook, check_selection, open_book
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.runs.options import RoundOptions, check_nodes
from flower_mcepl.runs.own_rounds import OwnRounds
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.strategies.answers import array_record
from flower_mcepl.strategies.attendance import Attendance
from flower_mcepl.strategies.dispatch import Dispatch
from flower_mcepl.strategies.handover import Handover, check_handed
from flower_mcepl.strategies.identities import Identities, read_agent_keys
from flower_mcepl.strategies.initial import InitialArrays
from flower_mcepl.strategies.intake import Intake, Replies
from flower_mcepl.strategies.launcher import announce_record, confirm_stop
from flower_mcepl.strategies.no_arrays import CentralEvaluation, NoArrays, place_of_models
from flower_mcepl.strategies.older_api import NotOfTheOlderApi
from flower_mcepl.strategies.own_checkpoints import OwnCheckpoints
from flower_mcepl.strategies.own_rounds import OwnRoundsLoop
from flower_mcepl.strategies.reporting import report
from flower_mcepl.strategies.roster import Roster
from flower_mcepl.strategies.shared_nodes import SharedNodes
from flower_mcepl.strategies.waiting import Arrival

logger = getLogger("flwr")
WITHOUT_EVALUATE = "No evaluate function registered"  # what Flower says of such an app
INITIAL = "initial"  # group of arrays in a checkpoint


class ExchangeStrategy(NotOfTheOlderApi, Strategy):
    """Strategy that sends each agent its parcel and takes its answer.

    Parameters
    ----------
    exchange : Exchange
        A `Relay` or a `Center` of Flower's arrays.
    options : RoundOptions
        How the rounds go.
    record, name, config
        See `GossipStrategy`.
    """

    def __init__(
        self,
        exchange: Exchange[Array],
        options: RoundOptions,
        *,
        record: str | Path | None,
        name: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.topology, self.exchange, self.options = exchange.topology, exchange, options
        num_agents = self.topology.num_agents
        if options.min_agents > num_agents:
            raise ConfigError(f"min_agents must be in 0..{num_agents}; got {options.min_agents}.")
        self.record_root, self.name = record, name
        self.config = dict(config or {})
        check_nodes(num_agents, options.agents_per_node)
        per_node = options.agents_per_node
        keys = read_agent_keys(options.agents, per_key=per_node) if options.agents else None
        self.roster = Roster(num_agents, Identities(keys, takeover=options.takeover))
        self.attendance = Attendance(
            self.roster,
            min_agents=options.min_agents,
            wait_timeout=options.wait_timeout,
            agents_per_node=per_node,
        )
        # Flower's defaults, unless the run config says otherwise
        self._num_rounds, self._timeout = 3, 3600.0
        self._intake = Intake(self.attendance, self._check_agent)
        self._dispatch = self._new_dispatch()
        # all until `start`
        self._book: RunBook[Array] | None = None
        self._initial: InitialArrays | None = None
        self._handover: Handover | None = None  # only where there is a record
        self._loop: OwnRoundsLoop | None = None  # where there is no barrier

    @property
    def book(self) -> RunBook[Array]:
        """Book of the run that `start` began."""
        if self._book is None:
            raise ConfigError(
                f"{type(self).__name__} runs its rounds itself, and was not started. Call its own "
                "start(grid=grid, ...); a strategy that wraps another to clip or add noise to the "
                "aggregate has nothing to work on here, as nothing is aggregated. Use Flower's "
                "mods on the devices instead (docs/existing-apps.md)."
            )
        return self._book

    @property
    def monitor(self) -> RunMonitor[Array]:
        """Progress of the run: each agent's evaluations, and the training losses."""
        return self.book.monitor

    @property
    def record(self) -> RunRecord | None:
        """Record of the run; None where none is written."""
        return self.book.record

    def begin_from(self, settings: RunSettings) -> None:
        """Take rounds and timeout from the run config, for a `start` without them."""
        self._num_rounds, self._timeout = settings.num_rounds, settings.round_timeout

    def describe(self) -> str:
        """Say in one line who hears whom."""
        return self.topology.describe()

    def summary(self) -> None:
        """Log what is about to run."""
        _log(f"\t|-- {self.describe()}")
        if self.book.resumed is not None:
            _log(f"\t|-- resumed after round {self.book.first - 1}")
        if self.record is not None:
            _log(f"\t`-- Run record: {self.record.path}")

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds and the closing exchange, as `Strategy.start`.

        ``initial_arrays`` may be left out.

        ``num_rounds`` and ``timeout`` (seconds for a round) are by default those of the
        run config after `from_run_config`, else 3 and 3600.

        ``initial_arrays`` are for apps with `neighbor_average_mod`: every node gets
        them with its first message; a run that is resumed takes those it began with
        from its checkpoint, and these need the same names, types and shapes.
        ``train_config`` and ``evaluate_config`` are what such an app is told. Agents of
        `make_client_app` make their own weights from the run's seed, and refuse initial
        arrays; of the configs they read nothing, and a warning says so.

        There is no global model: the result has no arrays, and ``evaluate_fn`` is no
        longer called, with a warning, once it asks for them. Both say where the
        agents' models are. ``evaluate_metrics_clientapp`` holds, per evaluated round,
        the mean, spread and worst of the main metric; `monitor` and the run record
        hold each agent's.

        Raises
        ------
        RosterError, FingerprintError
            If the nodes do not fit the graph in the first round, or too few take part
            in a round (`min_agents`), or several fail for the same reason, round after
            round.
        LostWorkerError
            If a process of Flower's simulation died.
        IncompleteRunError
            If an agent that had not left did not answer the closing exchange.
        RecordError, ConfigError
            If a run cannot be resumed, or not with these settings.
        """
        if self.options.agents_per_node > 1:
            grid = SharedNodes(grid, per_node=self.options.agents_per_node)
        num_rounds = self._num_rounds if num_rounds is None else num_rounds
        self._timeout = timeout = self._timeout if timeout is None else timeout
        if num_rounds < 1:
            raise ConfigError(f"num_rounds must be >= 1; got {num_rounds}.")
        self._initial = InitialArrays(
            initial_arrays or ArrayRecord(),
            train_config=train_config or ConfigRecord(),
            evaluate_config=evaluate_config or ConfigRecord(),
            ledger=self.exchange.ledger,
        )
        if (train_config or evaluate_config) and not initial_arrays:
            logger.warning(
                "train_config and evaluate_config reach mods alone: agents that draw their own "
                "weights, as those of make_client_app, take their settings from the run config."
            )
        self._dispatch = self._new_dispatch()
        try:
            with self._opened(num_rounds, timeout) as self._book:
                self.exchange.begin(self._book.run)
                if self.record is not None:
                    self._handover = Handover(self.record.agents_dir, run=self._book.run)
                if self.record is not None:
                    announce_record(self.record.path)
                result = self._run(
                    grid,
                    train_config or ConfigRecord(),
                    evaluate_config or ConfigRecord(),
                    evaluate_fn,
                )
                self._finish()
        finally:
            confirm_stop()
            # of a run whose rounds are all over, complete or not
            book = self._book
            if book is not None and book.record and book.unanswered is not None:
                report(book.record)
        result.train_metrics_clientapp.update(
            {
                round: MetricRecord({"train-loss": loss})
                for round, loss in self.monitor.train_loss.items()
            }
        )
        result.evaluate_metrics_clientapp.update(
            {round: MetricRecord(metrics) for round, metrics in self.monitor.evaluations().items()}
        )
        return result

    def _run(
        self,
        grid: Grid,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> Result:
        """Go through the rounds as Flower's own loop does.

        That one begins with round 1 and asks its grid to wait for all answers of a
        round; this one may begin later, and takes late answers into the next round.
        """
        arrays = NoArrays(place_of_models(self.record))
        result, evaluation = Result(arrays=arrays), CentralEvaluation(evaluate_fn, arrays)
        first = self.book.first
        _log(f"Starting {type(self).__name__} strategy: {self.monitor.num_rounds} rounds")
        self.summary()

        def look(round: int) -> None:
            if (metrics := evaluation(round)) is not None:
                result.evaluate_metrics_serverapp[round] = metrics

        if first == 1:
            look(0)
        else:
            self.attendance.wait_for_nodes(grid, first=True)
            self.attendance.identify(grid, timeout=self._timeout)
        if self.options.schedule == ASYNC:
            self._play_own_rounds(grid, train_config)
        else:
            for round in self.book.rounds():
                self._play_round(grid, round, arrays, train_config)
                if round < self.monitor.num_rounds:
                    look(round)
        num_rounds = self.monitor.num_rounds  # fewer than planned if the run stopped early
        messages = self.configure_evaluate(num_rounds, arrays, evaluate_config, grid)
        replies = self._play(grid, messages, num_rounds + 1)
        replies = self._close_without_evaluate(grid, replies, evaluate_config)
        self.aggregate_evaluate(num_rounds, replies)
        look(num_rounds)
        return result

    def _play_round(
        self, grid: Grid, round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> None:
        """Play a round of all agents."""
        messages = self.configure_train(round, arrays, config, grid)
        replies = self._play(grid, messages, round)
        if round == self.book.first:
            self._take_in(round, replies, partial(self._newcomers, grid, config))
        else:
            self.aggregate_train(round, replies)
        if self._loop is None and self.book.due(round):
            self.book.keep(round, self._own_state())

    def _play_own_rounds(self, grid: Grid, config: ConfigRecord) -> None:
        """Play each agent's own rounds, after the first one of all."""
        own = OwnRounds(self.book, self.exchange, num_agents=self.topology.num_agents)
        self.monitor.time_budget = self.options.time_budget
        num_rounds = self.monitor.num_rounds
        loop = self._loop = OwnRoundsLoop(
            grid,
            self.attendance,
            self._intake,
            self._dispatch,
            own,
            message=lambda node, p: self._message(node, p, config, MessageType.TRAIN),
            read=self._read_arrival,
            keep=self._keep_handed,
            num_rounds=num_rounds,
            time_budget=self.options.time_budget,
            checkpoints=OwnCheckpoints(
                own,
                num_rounds=num_rounds,
                handed=in_simulation,
                state=self._own_state,
            ),
        )
        if self.book.resumed is not None:
            loop.resume(self.book.resumed)
        else:
            self._play_round(grid, 1, NoArrays(place_of_models(self.record)), config)
        loop.play()

    def _keep_handed(self, answers: Mapping[int, Answer[Array]], *, closing: bool = False) -> None:
        """Keep what agents handed over with their answers."""
        if self._handover is not None:
            done_by = (lambda agent: ()) if self._loop is None else self._loop.own.done_by
            self._handover.keep(answers, closing=closing, done_by=done_by)

    def _read_arrival(self, arrival: Arrival, now: int) -> Replies:
        """What an answer says, as of a round that the fastest agent plays."""
        sent, reply = arrival.sent, arrival.reply
        assert self._initial is not None
        self._initial.note(sent.node, sound=not reply.has_error())
        return self._intake.take([(sent.round, sent.node, reply)], [], round=sent.round, now=now)

    def _closing_parcel(self, agent: int) -> Parcel[Array]:
        if self._loop is not None:
            return self._loop.own.closing_parcel(agent)
        return self.exchange.parcel(agent, round=self.monitor.num_rounds + 1, closing=True)

    def _newcomers(self, grid: Grid, config: ConfigRecord, until: float) -> list[Message]:
        """Replies of nodes that come in the first round while some are missing."""
        if not self._intake.refused:
            return []  # nobody took a place that was another's
        round = self.book.first
        nodes = self.attendance.newcomers(grid, until=until)
        return self._play(grid, self._train_messages(nodes, round, config), round) if nodes else []

    def _own_state(self) -> Bundle:
        """State of this side: who is who, and the initial arrays."""
        assert self._initial is not None
        facts, arrays = self._initial.state()
        return Bundle.joined({"roster": self.roster.state(), **facts}, {INITIAL: arrays})

    def _play(self, grid: Grid, messages: Iterable[Message], round: int) -> list[Message]:
        """Answers to the messages of a round, and late ones to earlier messages."""
        return self._dispatch.play(
            grid,
            list(messages),
            round=round,
            evaluating=self._evaluates(round),
            first=round == self.book.first,
            last=round == self.monitor.num_rounds,
            closing=round > self.monitor.num_rounds,
        )

    def _evaluates(self, round: int) -> bool:
        """Whether agents evaluate in ``round``, which takes longer."""
        closing, previous = round > self.monitor.num_rounds, round - 1
        return closing or (previous > 0 and previous % self.exchange.evaluate_every == 0)

    def _new_dispatch(self) -> Dispatch:
        factor = self.options.timeout_factor
        return Dispatch(timeout=self._timeout, timeout_factor=factor)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of a round, one per node that is online and owes no answer."""
        before = self.attendance.online
        online = self.attendance.wait_for_nodes(grid, first=server_round == self.book.first)
        if left := set(before) - set(online):
            self._intake.refused.clear()
            self.roster.doubt(left)
        self._dispatch.lose(online)
        unwanted = self._intake.refused | self._dispatch.busy()
        unwanted |= self._intake.quarantined(server_round)
        return self._train_messages([n for n in online if n not in unwanted], server_round, config)

    def _train_messages(
        self, nodes: Iterable[int], round: int, config: ConfigRecord
    ) -> list[Message]:
        messages = []
        for node in nodes:
            agent = self.roster.agent_of(node)
            parcel = (
                Parcel[Array](round, None)
                if agent is None
                else self.exchange.parcel(agent, round=round)
            )
            messages.append(self._message(node, parcel, config, MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in the answers; there is no global model to hand back."""
        self._take_in(server_round, replies)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Closing messages after the last round, which evaluate once more."""
        if server_round != self.monitor.num_rounds:
            return []
        self.attendance.online = sorted(grid.get_node_ids())
        self._dispatch.lose(self.attendance.online)
        reachable = set(self.attendance.online) - self._dispatch.busy()
        reachable -= self._intake.quarantined(server_round + 1)
        messages = []
        for agent, node in sorted(self.roster.node_of.items()):
            if node in reachable:
                parcel = self._closing_parcel(agent)
                messages.append(self._message(node, parcel, config, MessageType.EVALUATE))
        return messages

    def _close_without_evaluate(
        self, grid: Grid, replies: list[Message], config: ConfigRecord
    ) -> list[Message]:
        """Replies to the closing, those of apps without an evaluate function mended.

        Flower answers for them without calling their mod. They get the same parcel in a
        message for which they have a function.
        """
        closing = self.monitor.num_rounds + 1
        nodes = {
            self._dispatch.origin(reply, closing)[1]: reply
            for reply in replies
            if reply.has_error() and WITHOUT_EVALUATE in (reply.error.reason or "")
        }
        messages = []
        for node in nodes:
            agent = self.roster.agent_of(node)
            assert agent is not None
            parcel = self._closing_parcel(agent)
            messages.append(self._message(node, parcel, config, MessageType.TRAIN))
        if not messages:
            return replies
        others = [reply for reply in replies if reply not in nodes.values()]
        return others + self._play(grid, messages, closing)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Take in the closing answers and return the final accuracy over the agents."""
        if server_round != self.monitor.num_rounds:
            return None
        self._take_in(server_round + 1, replies)
        final = self.monitor.evaluations().get(server_round)
        return MetricRecord(final) if final else None

    def _finish(self) -> None:
        """Do what remains after the closing exchange."""

    def _message(
        self, node: int, parcel: Parcel[Array], config: ConfigRecord, message_type: str
    ) -> Message:
        of = self.roster if self._loop is None else self._loop
        agent = of.agent_of(node)
        resumed = self.book.resumed is not None and not self.roster.has_met(node)
        assert self._initial is not None
        order = Order(
            parcel=parcel,
            run=self.book.run,
            max_staleness=self.exchange.max_staleness,
            age_decay=self.exchange.age_decay,
            keep_best=self.options.keep_best,
            introduce=not self.roster.has_met(node) or agent is None,
            checkpoints=self._rounds_to_keep(agent),
            store=self._handover is not None and self._wants_state(parcel),
            state=self._handover.state_before(parcel.round, agent)
            if self._handover and resumed and agent is not None
            else None,
            config=config,
            app=self._initial.input_for(node),
        )
        return Message(
            RecordDict(order.to_records(array_record, ConfigRecord)),
            dst_node_id=node,
            message_type=message_type,
            group_id=str(parcel.round),
            ttl=self._timeout
            if self._loop is not None
            else self._dispatch.time_to_live(evaluating=self._evaluates(parcel.round)),
        )

    def _rounds_to_keep(self, agent: int | None) -> tuple[int, ...]:
        """Rounds after which an agent must keep its state, for the checkpoints."""
        if self._loop is not None and agent is not None:
            return self._loop.own.done_by(agent)
        checkpoints = self.book.checkpoints
        return () if checkpoints is None else tuple(checkpoints.rounds())

    def _wants_state(self, parcel: Parcel[Array]) -> bool:
        if self._loop is not None:
            return self._loop.checkpoints.wants_state(parcel)
        return not parcel.train or self.book.due(parcel.round)

    def _read(self, round: int, replies: Iterable[Message]) -> Replies:
        origins = [(*self._dispatch.origin(reply, round), reply) for reply in replies]
        if self._initial is not None:
            for _, node, reply in origins:
                self._initial.note(node, sound=not reply.has_error())
        return self._intake.take(origins, self._dispatch.expire(), round=round)

    def _take_in(
        self,
        round: int,
        replies: Iterable[Message],
        newcomers: Callable[[float], list[Message]] = lambda until: [],
    ) -> None:
        first = round == self.book.first
        taken = self._read(round, replies)
        until = time.monotonic() + self.attendance.wait_timeout
        while len(taken.answers) < self.attendance.at_first and (more := newcomers(until)):
            taken = taken.merged(self._read(round, more))
        answers, failed = taken.answers, taken.failed
        busy = self._dispatch.busy()
        closing = round > self.monitor.num_rounds
        self.attendance.check(round, answers, failed, busy, first=first, closing=closing)
        # no other answer is owed
        prompt = [agent for agent in answers if self.roster.node_of[agent] not in busy]
        missing = [agent for agent in self.roster.absent(prompt) if f"agent {agent}" not in failed]
        left = self.attendance.gone()  # as of the round before
        barred = self._intake.quarantined(round)
        states = self.attendance.changes(round, answers, failed, busy, barred)
        self._keep_handed(answers, closing=closing)
        if self._loop is None:
            self.book.close_round(
                round, answers, failed=failed, missing=missing, states=states, left=left
            )
        elif closing:
            self._loop.close(answers, failed=failed, left=left)
        else:
            self._loop.begin(answers, failed=failed, states=states)

    def _check_agent(self, agent: int, answer: Answer[Array]) -> None:
        """Raise RosterError, FingerprintError or AnswerError for what does not fit."""
        check_handed(answer, agent=agent, run=self.book.run)
        if self.options.keep_best or self.options.patience:
            try:
                check_selection([answer.facts])
            except ConfigError as error:
                raise RosterError(str(error)) from error

    def _about(self) -> dict[str, Any]:
        """What else belongs into the record's config."""
        return {}

    @contextlib.contextmanager
    def _opened(self, num_rounds: int, timeout: float) -> Iterator[RunBook[Array]]:
        """Book of the run; where it is resumed, this side goes back, too."""
        assert self._initial is not None
        config = {
            **self.config,
            "timeout": timeout,
            "min_agents": self.attendance.at_first,
            **({"time_budget": self.options.time_budget} if self.options.schedule == ASYNC else {}),
            **self._about(),
            **self._initial.about(),
        }
        options = self.options
        with open_book(
            self.exchange,
            config,
            num_rounds=num_rounds,
            record=None if self.record_root is None else self._new_record,
            resume=Path(options.resume) if options.resume else None,
            checkpoint_every=options.checkpoint_every,
            keep_best=options.keep_best,
            patience=options.patience,
            keep_frames=options.keep_frames,
            log=_log,
        ) as book:
            if book.resumed is not None:
                self._go_back(book.resumed, book.answered)
            yield book

    def _new_record(self, config: Mapping[str, Any]) -> RunRecord:
        assert self.record_root is not None
        return RunRecord.create(
            self.record_root,
            name=self.name,
            config=config,
            with_frames=self.options.keep_frames,
        )

    def _go_back(self, checkpoint: Bundle, answered: int) -> None:
        """Know the agents again, and begin from the arrays that the run began with."""
        if self.options.min_agents == 0:
            # an agent that died earlier holds up nothing, as it held up nothing then
            self.attendance.at_first = max(self.attendance.later, answered)
        self.roster.restore(checkpoint.facts["roster"])
        assert self._initial is not None
        if not self._initial.restore(checkpoint.facts, checkpoint.group(INITIAL)):
            _log(
                "The initial arrays are those that the run began with; the ones given now have "
                "other bits."
            )


def _log(line: str) -> None:
    logger.log(INFO, "%s", line)
