"""What every strategy of this package does: one message per agent and round, through a relay or a center."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING, getLogger
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

from flower_mcepl.config.checks import check
from flower_mcepl.errors import AnswerError, ConfigError, FingerprintError, RosterError
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.messages import keys
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.checkpoint import Checkpoint
from flower_mcepl.runs.monitor import RunMonitor
from flower_mcepl.runs.resumption import (
    INITIAL,
    RUN,
    RunCheckpoints,
    new_run_id,
    only_writer,
    reopen,
    run_id_of,
)
from flower_mcepl.runs.settings import RunSettings
from flower_mcepl.strategies.answers import frame_array, frame_bytes, plain_reason, read_answer
from flower_mcepl.strategies.attendance import Attendance
from flower_mcepl.strategies.initial import InitialArrays
from flower_mcepl.strategies.orders import frames_of, order_of
from flower_mcepl.strategies.reporting import report
from flower_mcepl.strategies.roster import Roster
from flower_mcepl.strategies.waiting import Arrival, InFlight, Patience

logger = getLogger("flwr")


class ExchangeStrategy(Strategy):
    """Sends every agent its parcel and takes its answer; what is in the parcels decides the exchange.

    Parameters
    ----------
    exchange : Exchange
        A `Relay` or a `Center` of Flower's arrays.
    others : see `GossipStrategy`
    """

    def __init__(
        self,
        exchange: Exchange[Array],
        *,
        min_agents: int,
        wait_timeout: float,
        timeout_factor: float,
        record: str | Path | None,
        name: str,
        keep_frames: bool,
        checkpoint_every: int,
        resume: str | Path | None,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.topology, self.relay = exchange.topology, exchange
        if not 0 <= min_agents <= self.topology.num_agents:
            raise ConfigError(
                f"min_agents must be in 0..{self.topology.num_agents}; got {min_agents}."
            )
        check(timeout_factor >= 0, "timeout_factor must be >= 0 (0: off)", timeout_factor)
        check(checkpoint_every >= 0, "checkpoint_every must be >= 0 (0: none)", checkpoint_every)
        self.min_agents = min_agents or self.topology.num_agents
        # but where the run is resumed, for as many as took part last
        self._asks_for_all = min_agents == 0
        self.record_root, self.name = record, name
        self.keep_frames, self.checkpoint_every = keep_frames, checkpoint_every
        self.resume = Path(resume).absolute() if resume else None
        self.config = dict(config or {})
        self.run_id = new_run_id()  # stays the same when the run is resumed, unlike Flower's
        self.roster = Roster(self.topology.num_agents)
        self.attendance = Attendance(
            self.roster, min_agents=self.min_agents, wait_timeout=wait_timeout
        )
        self.monitor = RunMonitor(self.relay, num_rounds=0, log=_log)
        self.record: RunRecord | None = None
        self._checkpoints: RunCheckpoints[Array] | None = None
        # Flower's defaults, unless the run config says otherwise
        self._num_rounds, self._timeout = 3, 3600.0
        self._first = 1  # the first round of this process; a later one where the run is resumed
        self._timeout_factor = timeout_factor
        self._patience = Patience(self._timeout, timeout_factor)
        self._in_flight = InFlight()
        self._initial: InitialArrays | None = None  # until `start`
        # of the present exchange, by the id of the message answered
        self._arrivals: dict[str, Arrival] = {}
        # nodes that were turned away; they may try again when a node has left
        self._refused: set[int] = set()

    def begin_from(self, settings: RunSettings) -> None:
        """Take rounds and timeout from the run config, for a `start` that does not name them."""
        self._num_rounds, self._timeout = settings.num_rounds, settings.round_timeout

    def describe(self) -> str:
        """Say in one line who hears whom."""
        return self.topology.describe()

    def summary(self) -> None:
        """Log what is about to run."""
        _log(f"\t├── {self.describe()}")
        if self._first > 1:
            _log(f"\t├── resumed after round {self._first - 1}")
        if self.record is not None:
            _log(f"\t└── Run record: {self.record.path}")

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
        """Run the rounds and the closing exchange; as `Strategy.start`, but ``initial_arrays`` may be left out.

        ``num_rounds`` and ``timeout`` (seconds for a round) are by default those of the
        run config after `from_run_config`, else 3 and 3600.

        ``initial_arrays`` are for apps with `neighbor_average_mod`: every node gets
        them with its first message; a run that is resumed takes those it began with
        from its checkpoint, and these need the same names, types and shapes.
        ``train_config`` and ``evaluate_config`` are what such an app is told. Agents of
        `make_client_app` make their own weights from the run's seed and read none of
        these.

        ``evaluate_fn`` gets no arrays and the result has none: there is no global
        model. ``evaluate_metrics_clientapp`` holds, per evaluated round, the mean,
        spread and worst of the personal accuracies; `monitor` and the run record hold
        each agent's.

        Raises
        ------
        RosterError, FingerprintError
            If the nodes do not fit the graph in the first round, or if nobody answers
            for some rounds.
        RecordError, ConfigError
            If a run cannot be resumed, or not with these settings.
        """
        num_rounds = self._num_rounds if num_rounds is None else num_rounds
        self._timeout = timeout = self._timeout if timeout is None else timeout
        if num_rounds < 1:
            raise ConfigError(f"num_rounds must be >= 1; got {num_rounds}.")
        self.monitor.num_rounds = num_rounds
        self._initial = InitialArrays(
            initial_arrays or ArrayRecord(),
            train_config=train_config or ConfigRecord(),
            evaluate_config=evaluate_config or ConfigRecord(),
            ledger=self.relay.ledger,
        )
        self._patience = Patience(timeout, self._timeout_factor)
        with contextlib.ExitStack() as held:
            self._open_record(num_rounds, timeout, held)
            status = "failed"
            try:
                result = self._run(
                    grid,
                    ArrayRecord(),  # there is no global model
                    train_config or ConfigRecord(),
                    evaluate_config or ConfigRecord(),
                    evaluate_fn,
                )
                self._finish()
                status = "finished"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            finally:
                self.monitor.finish(status)
            if self._checkpoints is not None:
                self._checkpoints.clear()
        result.train_metrics_clientapp.update(
            {
                round: MetricRecord({"train-loss": loss})
                for round, loss in self.monitor.train_loss.items()
            }
        )
        result.evaluate_metrics_clientapp.update(
            {round: MetricRecord(metrics) for round, metrics in self.monitor.evaluations().items()}
        )
        if self.record is not None:
            report(self.record)
        return result

    def _run(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> Result:
        """Go through the rounds as Flower's own loop does.

        That one begins with round 1 and asks its grid to wait for all answers of a
        round; this one may begin later, and takes late answers into the next round.
        """
        result = Result()
        num_rounds = self.monitor.num_rounds
        _log(f"Starting {type(self).__name__} strategy: {num_rounds} rounds")
        self.summary()

        def look(round: int) -> None:
            if evaluate_fn and (metrics := evaluate_fn(round, arrays)) is not None:
                result.evaluate_metrics_serverapp[round] = metrics

        if self._first == 1:
            look(0)
        else:
            self.attendance.wait_for_nodes(grid, first=True)
            self.attendance.identify(grid, timeout=self._timeout)
        for round in range(self._first, num_rounds + 1):
            messages = self.configure_train(round, arrays, train_config, grid)
            self.aggregate_train(round, self._exchange(grid, messages, round))
            if self._checkpoints is not None and self._checkpoints.due(round):
                self._save_checkpoint(self._checkpoints, round)
            if round < num_rounds:
                look(round)
        messages = self.configure_evaluate(num_rounds, arrays, evaluate_config, grid)
        self.aggregate_evaluate(num_rounds, self._exchange(grid, messages, num_rounds + 1))
        look(num_rounds)
        return result

    def _save_checkpoint(self, checkpoints: RunCheckpoints[Array], round: int) -> None:
        assert self._initial is not None
        facts, arrays = self._initial.state()
        checkpoints.save(round, initial=arrays, roster=self.roster.state(), **facts)

    def _exchange(self, grid: Grid, messages: Iterable[Message], round: int) -> list[Message]:
        """Send the messages and return what was answered in time, late answers to earlier messages included.

        The last round waits for late answers, too: there is no later one that could
        take them.
        """
        evaluating = self._evaluates(round)
        wanted = self._in_flight.send(
            grid, list(messages), round=round, evaluating=evaluating, ttl=self._time_to_live(round)
        )
        arrivals = self._in_flight.wait(
            grid,
            wanted | self._in_flight.owed() if round == self.monitor.num_rounds else wanted,
            usual=self._patience.usual(evaluating=evaluating) or 0.0,
            deadline=self._patience.deadline(evaluating=evaluating),
            longest=self._timeout,
        )
        if round > self._first:  # the first one includes the start of processes
            for kind in (True, False):
                times = [
                    a.seconds
                    for a in arrivals
                    if a.sent.evaluating is kind and not a.reply.has_error()
                ]
                self._patience.learn(times, evaluating=kind)
        self._arrivals = {
            arrival.reply.metadata.reply_to_message_id: arrival for arrival in arrivals
        }
        return [arrival.reply for arrival in arrivals]

    def _evaluates(self, round: int) -> bool:
        """Tell whether agents evaluate in ``round``, which takes longer."""
        return round > self.monitor.num_rounds or (
            round > 1 and (round - 1) % self.relay.evaluate_every == 0
        )

    def _time_to_live(self, round: int) -> float:
        """Return for how many seconds a message of ``round`` may be answered: the longest round and two usual ones."""
        return self._timeout + 2 * self._patience.deadline(evaluating=self._evaluates(round))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message per node that is online and owes no answer: its parcel for the round."""
        if self._initial is None:
            raise ConfigError(
                f"{type(self).__name__} runs its rounds itself, and was not started. Call its own "
                "start(grid=grid, ...); a strategy that wraps another to clip or add noise to the "
                "aggregate has nothing to work on here, as nothing is aggregated. Use Flower's "
                "mods on the devices instead (docs/existing-apps.md)."
            )
        before = self.attendance.online
        online = self.attendance.wait_for_nodes(grid, first=server_round == self._first)
        if left := set(before) - set(online):
            self._refused.clear()
            self.roster.doubt(left)
        self._in_flight.lose(online)
        busy = self._in_flight.busy()
        messages = []
        for node in online:
            if node in self._refused or node in busy:
                continue
            agent = self.roster.agent_of(node)
            parcel = (
                Parcel[Array](server_round, None)
                if agent is None
                else self.relay.parcel(agent, round=server_round)
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
        """Return the closing messages after the last round; evaluations before that ride on the train messages."""
        if server_round != self.monitor.num_rounds:
            return []
        self.attendance.online = sorted(grid.get_node_ids())
        self._in_flight.lose(self.attendance.online)
        reachable = set(self.attendance.online) - self._in_flight.busy()
        messages = []
        for agent, node in sorted(self.roster.node_of.items()):
            if node in reachable:
                parcel = self.relay.parcel(agent, round=server_round + 1, closing=True)
                messages.append(self._message(node, parcel, config, MessageType.EVALUATE))
        return messages

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
        order = order_of(
            parcel,
            config,
            run=self.run_id,
            max_staleness=self.relay.max_staleness,
            introduce=not self.roster.has_met(node) or self.roster.agent_of(node) is None,
        )
        if self._checkpoints is not None and (kept := self._checkpoints.rounds()):
            order[keys.CHECKPOINTS] = kept
        store = (
            parcel.train and self._checkpoints is not None and self._checkpoints.due(parcel.round)
        )
        if store:
            order[keys.STORE] = True
        # a simulated agent finds its state in the record
        resumed = self._first > 1 and not self.roster.has_met(node)
        if self.record is not None and (store or resumed or not parcel.train):
            order[keys.AGENTS_DIR] = str(self.record.agents_dir)
        content = RecordDict({keys.FRAMES: frames_of(parcel), keys.ORDER: order})
        assert self._initial is not None
        self._initial.add_to(content, node=node)
        return Message(
            content,
            dst_node_id=node,
            message_type=message_type,
            group_id=str(parcel.round),
            ttl=self._time_to_live(parcel.round),
        )

    def _take_in(self, round: int, replies: Iterable[Message]) -> None:
        answers: dict[int, Answer[Array]] = {}
        failed: dict[str, str] = {}
        for reply in sorted(replies, key=lambda reply: self._origin(reply, round)):
            # Error replies of the SuperLink bear its own node id: the message answered
            # tells who was asked.
            of_round, node = self._origin(reply, round)
            if self._initial is not None:
                self._initial.note(node, sound=not reply.has_error())
            if reply.has_error():
                self.roster.doubt([node])
                failed[self._name(node)] = (
                    f"error {reply.error.code}: {plain_reason(reply.error.reason)}"
                )
                continue
            try:
                agent, answer = self._admit(node, reply.content, round=of_round)
            except AnswerError as error:
                failed[self._name(node)] = str(error)
                continue
            except (RosterError, FingerprintError) as error:
                if round == self._first:
                    raise
                self._refused.add(node)
                failed[f"node {node}"] = str(error)
                continue
            answers[agent] = replace(answer, late_of=None if of_round == round else of_round)
        for sent in self._in_flight.expire():
            self.roster.doubt([sent.node])
            failed.setdefault(
                self._name(sent.node),
                f"no answer to the message of round {sent.round} within its time",
            )
        failed = {
            name: reason
            for name, reason in failed.items()
            if name not in {f"agent {a}" for a in answers}
        }
        for name, reason in sorted(failed.items()):
            logger.log(WARNING, "round %d: %s failed. %s", round, name, reason)
        self.attendance.check(round, answers, failed, first=round == self._first)
        busy = self._in_flight.busy()
        # no other answer is owed
        prompt = [agent for agent in answers if self.roster.node_of[agent] not in busy]
        missing = [agent for agent in self.roster.absent(prompt) if f"agent {agent}" not in failed]
        states = self.attendance.changes(round, answers, failed, busy)
        self.monitor.close_round(round, answers, failed=failed, missing=missing, states=states)

    def _origin(self, reply: Message, round: int) -> tuple[int, int]:
        """Return round and node of the message that was answered."""
        arrival = self._arrivals.get(reply.metadata.reply_to_message_id)
        return (
            (round, reply.metadata.src_node_id)
            if arrival is None
            else (arrival.sent.round, arrival.sent.node)
        )

    def _admit(self, node: int, content: RecordDict, *, round: int) -> tuple[int, Answer[Array]]:
        played = self.roster.agent_of(node)
        known = {} if played is None else self.roster.facts(played)
        agent, answer = read_answer(self._name(node), content, known)
        self.roster.admit(node, answer.facts, online=self.attendance.online)
        self._check_agent(agent, answer.facts)
        if answer.fresh and round > 1:
            logger.log(
                WARNING,
                "round %d: agent %d started afresh: its node holds no state of it",
                round,
                agent,
            )
        return agent, answer

    def _check_agent(self, agent: int, facts: Mapping[str, Any]) -> None:
        """Raise FingerprintError for an agent that does not fit, beyond what the roster compares."""

    def _name(self, node: int) -> str:
        agent = self.roster.agent_of(node)
        return f"node {node}" if agent is None else f"agent {agent}"

    def _about(self) -> dict[str, Any]:
        """Return what else belongs into the record's config."""
        return {}

    def _open_record(self, num_rounds: int, timeout: float, held: contextlib.ExitStack) -> None:
        """Begin the record, or go back to the checkpoint of the run that is resumed; hold the record either way."""
        assert self._initial is not None
        config = {
            **self.config,
            "num_rounds": num_rounds,
            "timeout": timeout,
            "evaluate_every": self.relay.evaluate_every,
            "max_staleness": self.relay.max_staleness,
            "key_interval": self.relay.key_interval,
            "min_agents": self.min_agents,
            "topology": self.topology.to_config(),
            **self._about(),
            **self._initial.about(),
        }
        checkpoint: Checkpoint | None = None
        if self.resume is not None:
            self.record, checkpoint, answered = reopen(
                self.resume, config, held=held, with_frames=self.keep_frames, log=logger.warning
            )
            self.run_id = run_id_of(self.record)
            # an agent that died earlier holds up nothing, as it held up nothing then
            if self._asks_for_all:
                self.min_agents = self.attendance.min_agents = max(1, answered)
        elif self.record_root is not None:
            config[RUN] = self.run_id
            self.record = RunRecord.create(
                self.record_root, name=self.name, config=config, with_frames=self.keep_frames
            )
            held.enter_context(only_writer(self.record.path))
        if self.record is None:
            return
        self.monitor.record = self.record
        self._checkpoints = RunCheckpoints[Array](
            self.record,
            self.relay,
            self.monitor,
            every=self.checkpoint_every,
            pack=frame_bytes,
            unpack=frame_array,
        )
        if checkpoint is not None:
            self._first = checkpoint.round + 1
            self._checkpoints.restore(checkpoint)
            self.roster.restore(checkpoint.facts["roster"])
            if not self._initial.restore(checkpoint.facts, checkpoint.group(INITIAL)):
                _log(
                    "The initial arrays are those that the run began with; the ones given now "
                    "have other bits."
                )


def _log(line: str) -> None:
    logger.log(INFO, "%s", line)


def common_settings(
    settings: RunSettings, run_config: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Return what the run config says to every strategy, as arguments."""
    return {
        "evaluate_every": settings.evaluate_every,
        "min_agents": settings.min_agents,
        "wait_timeout": settings.wait_timeout,
        "timeout_factor": settings.timeout_factor,
        "checkpoint_every": settings.checkpoint_every,
        "resume": settings.resume or None,
        "record": settings.record_dir,
        "name": name,
        "keep_frames": settings.keep_frames,
        "config": {"run_config": dict(run_config), "seed": settings.seed},
    }
