"""Progress of a run: lines in its record, and one line a round for a person."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic

from flower_mcepl.errors import first_line, same_reason
from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.record.layout import Row
from flower_mcepl.record.metric import (
    MainMetric,
    final_rows,
    metric_summary,
    of_agents,
    rows_by_round,
)
from flower_mcepl.record.reading import Run
from flower_mcepl.record.selection import BEST_ROUND, BEST_VALUE, best_columns, best_states
from flower_mcepl.record.values import human_bytes
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.runs.closed_round import ClosedRound
from flower_mcepl.runs.decisions import decisions_of
from flower_mcepl.runs.introductions import Introductions

_LOGGED = 20  # refusals of an agent in a round, or agents that it lacks, that are logged


@dataclass
class RunMonitor(Generic[FrameT]):
    """Writes each round of a run to its record and to the log; it moves no frame.

    Parameters
    ----------
    exchange : Relay or Center
        Its ledger is what the record's byte counts come from.
    num_rounds : int
        For the time left; `stop_after` lowers it.
    record : RunRecord or None
        Where to write; None writes nothing.
    log : callable
        Gets each line.
    """

    exchange: Exchange[FrameT]
    num_rounds: int
    record: RunRecord | None = None
    log: Callable[[str], None] = lambda line: None
    rows: list[Row] = field(default_factory=list)  # as in rounds.jsonl
    train_loss: dict[int, float] = field(default_factory=dict)  # mean over the agents, by round
    # why the run stops before its planned end, as in the summary; empty: it does not
    stopped_early: Row = field(default_factory=dict)
    time_budget: float = 0.0  # of the run's clock, after which no round begins; 0: none
    is_over: bool = False  # nobody plays a round any more; of some the lines are still to come

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        # first round closed, and when: it includes the start-up
        self._warm: tuple[int, float] = (0, self._start)
        self._agent_seconds: dict[int, float] = {}
        self._introductions = Introductions()
        self._logged: set[str] = set()  # reasons of failures, in `same_reason`

    def rows_of(
        self,
        round: int,
        answers: Mapping[int, Answer[FrameT]],
        clocks: Mapping[int, float] | None = None,
    ) -> list[Row]:
        """Rows of ``rounds.jsonl`` from a round's answers, of the round before.

        ``clocks`` say when each agent's round began, where the run has a clock.
        """
        for agent, answer in answers.items():
            spent = answer.metrics.get("seconds", 0.0)
            self._agent_seconds[agent] = self._agent_seconds.get(agent, 0.0) + spent
        return [
            {
                **self._row(agent, (answer.late_of or round) - 1, answer),
                **({"clock": clocks[agent]} if clocks else {}),
            }
            for agent, answer in answers.items()
            if "num-examples" in answer.metrics and "density" in answer.metrics
        ]

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Keep rows of `rows_of`, and write them."""
        self.rows += rows
        if self.record is not None:
            self.record.log_agents(rows)

    @property
    def metric(self) -> MainMetric:
        """Main metric of the run, as the agents tell it."""
        return MainMetric.of(self._introductions.rows(), self.rows)

    def close_round(
        self,
        round: int,
        answers: Mapping[int, Answer[FrameT]],
        rows: Sequence[Row],
        *,
        refused: Mapping[int, Sequence[str]],
        failed: Mapping[str, str],
        missing: Sequence[int],
        states: Mapping[str, str],
        clock: float | None = None,
        so_far: tuple[int, int] | None = None,
    ) -> None:
        """Write and log a round whose answers were taken in; see `RunBook.close_round`.

        ``rows`` are those of `add_rows`, ``refused`` the reasons by who refused any.
        """
        losses = [
            answer.metrics["train-loss"]
            for answer in answers.values()
            if answer.late_of is None and "train-loss" in answer.metrics
        ]
        if losses:
            self.train_loss[round] = fmean(losses)
        new = self._introductions.take(answers)
        closed = ClosedRound(
            round, answers, rows, refused, failed, missing, states, bool(new), clock, so_far
        )
        others = [
            f"agent {n} has other settings or data: {text}" for n, text in new.items() if text
        ]
        for line in (*others, *self._troubles(closed), *self._evaluation_errors(closed)):
            self.log(f"round {round}: {line}")
        for name, text in closed.whole_texts():
            self._keep_text(round, name, text)
        if self.record is not None:
            self._write(self.record, closed)
        self.log(self._line(closed))
        if self._warm[0] == 0:
            self._warm = (round, time.perf_counter())

    def _troubles(self, closed: ClosedRound[FrameT]) -> Iterator[str]:
        for number, reasons in closed.refused.items():
            who = "the server" if number == self.exchange.topology.num_agents else f"agent {number}"
            yield from (f"{who} refused a frame. {reason}" for reason in reasons[:_LOGGED])
            if len(reasons) > _LOGGED:
                yield f"{who} refused {len(reasons) - _LOGGED} more frames; relay.jsonl has why"
        for agent, answer in closed.answers.items():
            if answer.lacking:
                yield (
                    f"agent {agent} lacks what the frames of these agents build on, and gets it "
                    f"next: {', '.join(map(str, answer.lacking[:_LOGGED]))}"
                    + (" ..." if len(answer.lacking) > _LOGGED else "")
                )

    def _evaluation_errors(self, closed: ClosedRound[FrameT]) -> Iterator[str]:
        """Lines about evaluations that failed, each reason in its first round."""
        agents: dict[str, list[int]] = {}
        for agent, answer in closed.answers.items():
            if answer.evaluation_error:
                agents.setdefault(same_reason(answer.evaluation_error), []).append(agent)
        for reason, numbers in agents.items():
            if reason not in self._logged:
                who = of_agents(len(numbers), len(closed.answers))
                text = first_line(closed.answers[numbers[0]].evaluation_error)
                yield f"{who} could not evaluate, and went on; agent {numbers[0]}: {text}"

    def _keep_text(self, round: int, name: str, text: str) -> None:
        """Write the whole text of a failure to the record, once."""
        reason = same_reason(text)
        if reason not in self._logged and self.record is not None:
            self.record.log_failure(f"round {round}, {name}: {text}")
        self._logged.add(reason)

    def stop_after(self, round: int, **why: Any) -> None:
        """Let ``round`` be the last one before the closing exchange."""
        self.stopped_early = {"round": round, "planned": self.num_rounds, **why}
        self.num_rounds = round

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Mean, spread and extremes of the main metric by evaluated round.

        Without a barrier the last one is that of the closing exchange, of all agents.
        """
        metric = self.metric
        result = {}
        for round, rows in rows_by_round(self.rows).items():
            s = metric_summary(rows, metric)
            if s["mean"] is not None:
                result[round] = {
                    metric.name: s["mean"],
                    f"{metric.name}-std": s["std"],
                    f"{metric.name}-worst": s["worst"],
                    f"{metric.name}-best": s["best"],
                    "num-agents": s["agents"],
                }
        return result

    def finish(self, status: str, **more: Any) -> dict[str, Any]:
        """Write the summary and return it."""
        of = {"of": self.exchange.topology.num_agents}
        last = final_rows(self.rows)
        summary = {
            "num_rounds": self.num_rounds,
            "metric": self.metric.facts(),
            "result": {**metric_summary(last, self.metric), **of},
            "accuracy": {**metric_summary(last), **of},
            "bytes": self.exchange.ledger.totals(),
            "links": self.exchange.ledger.link_rows(),
            **({"local": local} if (local := self.exchange.ledger.local_rows()) else {}),
            "seconds": time.perf_counter() - self._start,
            **({"best": best} if (best := best_states(self.rows)) else {}),
            **({"stopped_early": self.stopped_early} if self.stopped_early else {}),
            **more,
        }
        if self.record is not None:
            self.record.finish(status, **summary)
        return {"status": status, **summary}

    def state(self) -> dict[str, Any]:
        """Return what must survive beside the record's lines, JSON-able."""
        return {
            "agent-seconds": self._agent_seconds,
            "seconds": time.perf_counter() - self._start,
            **({"stopped-early": self.stopped_early} if self.stopped_early else {}),
        }

    def restore(self, state: Mapping[str, Any], run: Run) -> None:
        """Go on from where `state` was taken and ``run``, the record, ended."""
        self._agent_seconds = {
            int(agent): seconds for agent, seconds in state["agent-seconds"].items()
        }
        self._start = time.perf_counter() - state["seconds"]
        if stopped := state.get("stopped-early"):  # a decision stands, even with more rounds
            self.stopped_early, self.num_rounds = dict(stopped), int(stopped["round"])
        self._introductions.restore(run)
        written = [] if self.record is None else self.record.failures()
        self._logged = {same_reason(text) for text in written}
        self.rows = list(run.rounds)
        losses = {row["round"]: row.get("train_loss") for row in run.relay}
        self.train_loss = {round: loss for round, loss in losses.items() if loss is not None}

    def _row(self, agent: int, round: int, answer: Answer[FrameT]) -> Row:
        ledger, metrics = self.exchange.ledger, answer.metrics
        return {
            "round": round,
            "agent": agent,
            "accuracy": metrics.get("accuracy"),
            "loss": metrics.get("loss"),
            "metrics": {name: value for name, value in metrics.items() if _is_further(name)},
            "num_examples": int(metrics["num-examples"]),
            "density": metrics["density"],
            "sent_bytes": ledger.sent(agent),
            "received_bytes": ledger.received(agent),
            "uplink_bytes": ledger.uplinks[agent].bytes,
            "seconds": self._agent_seconds[agent],
            **best_columns(metrics),
        }

    def _write(self, record: RunRecord, closed: ClosedRound[FrameT]) -> None:
        answers = closed.answers
        if closed.introduces:
            record.amend_config(agents=self._introductions.rows())
        record.log_traffic({"round": closed.round, **self.exchange.ledger.changes()})
        for agent, answer in answers.items():
            record.keep_frames(answer.late_of or closed.round, agent, answer.raw)
        record.log_round(
            {
                "round": closed.round,
                "answered": len(answers),
                "agents": self.exchange.topology.num_agents,
                "failed": {name: first_line(reason) for name, reason in closed.failed.items()},
                "missing": closed.missing,
                "states": closed.states,
                "late": {agent: a.late_of for agent, a in answers.items() if a.late_of is not None},
                "refused": closed.refused,
                "fresh": [agent for agent, a in answers.items() if a.fresh],
                "lacking": {agent: list(a.lacking) for agent, a in answers.items() if a.lacking},
                "frames": {
                    agent: a.content for agent, a in answers.items() if a.content and not a.late_of
                },
                **closed.evaluation_errors(),
                **decisions_of(answers, round=closed.round),
                "train_loss": self.train_loss.get(closed.round),
                **closed.byte_counts(self.exchange.ledger),
                "agent_seconds": sum(a.metrics.get("seconds", 0.0) for a in answers.values()),
                "seconds": time.perf_counter() - self._start,
                **({} if closed.clock is None else {"clock": closed.clock}),
            }
        )

    def _line(self, closed: ClosedRound[FrameT]) -> str:
        if closed.round > self.num_rounds:
            parts = ["closing"]
        else:
            parts = [f"round {closed.round}/{self.num_rounds}"]
            parts += [] if self.is_over else [f"{self._time_left(closed)} left"]
        parts.append(f"{len(closed.answers)}/{self.exchange.topology.num_agents} answered")
        late = sum(answer.late_of is not None for answer in closed.answers.values())
        parts[-1] += f" ({late} late)" if late else ""
        parts += [f"{len(closed.failed)} failed"] if closed.failed else []
        parts += [f"no answer from {', '.join(map(str, closed.missing))}"] if closed.missing else []
        if closed.round in self.train_loss:
            parts.append(f"train loss {self.train_loss[closed.round]:.3f}")
        metric = self.metric
        s = metric_summary(final_rows(closed.rows), metric)
        if s["mean"] is not None:
            all_agents = self.exchange.topology.num_agents
            count = s["agents"] or 0
            fewer = "" if count == all_agents else f" of {of_agents(count, all_agents)}"
            parts.append(
                f"{metric.name}{fewer} after round {s['round']}: {s['mean']:.3f} +/- "
                f"{s['std']:.3f} (worst {s['worst']:.3f}, agent {s['worst_agent']})"
            )
        totals = self.exchange.ledger.totals()
        link_bytes, _ = closed.so_far or self.exchange.ledger.so_far()
        parts.append(f"{human_bytes(link_bytes)} over the links")
        if totals["link_bits_per_weight"]:
            parts[-1] += f" ({totals['link_bits_per_weight']:.2g} bit per weight)"
        if "local_total" in totals:
            parts[-1] += f", {human_bytes(totals['local_total'])} within nodes"
        return " | ".join(parts)

    def _time_left(self, closed: ClosedRound[FrameT]) -> str:
        known, since = self._warm
        if known == 0:  # the first round says little of the others
            return "?"
        now = time.perf_counter()
        left = (now - since) / (closed.round - known) * (self.num_rounds - closed.round)
        if self.time_budget and closed.clock:
            per_second = (now - self._start) / closed.clock
            left = min(left, per_second * max(0.0, self.time_budget - closed.clock))
        minutes, seconds = divmod(int(left + 0.5), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


# what an answer tells beside the metrics of a task; those of training are named train-*
_NO_METRICS = ("accuracy", "loss", "num-examples", "density", "seconds", BEST_ROUND, BEST_VALUE)


def _is_further(name: str) -> bool:
    """Whether a metric has no column of its own in ``rounds.jsonl``."""
    return name not in _NO_METRICS and not name.startswith("train-")
