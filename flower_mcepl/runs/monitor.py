"""What is told of a run while it goes on: the record on disk, and one line a round for a person."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic

from flower_mcepl.exchange.exchange import Exchange
from flower_mcepl.exchange.parcels import Answer, FrameT
from flower_mcepl.record.accuracy import accuracy_summary
from flower_mcepl.record.reading import Run
from flower_mcepl.record.values import human_bytes
from flower_mcepl.record.writing import RunRecord


@dataclass
class RunMonitor(Generic[FrameT]):
    """Takes the answers of each round into the relay, the record and the log.

    Parameters
    ----------
    relay : Relay or Center
        Gets the frames; its ledger is what the record's byte counts come from.
    num_rounds : int
        For the time left.
    record : RunRecord or None
        Where to write; None writes nothing.
    log : callable
        Gets each line.
    """

    relay: Exchange[FrameT]
    num_rounds: int
    record: RunRecord | None = None
    log: Callable[[str], None] = lambda line: None
    rows: list[dict[str, Any]] = field(default_factory=list)  # as in rounds.jsonl
    train_loss: dict[int, float] = field(default_factory=dict)  # mean over the agents, by round

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        # first round closed, and when: it includes the start-up
        self._warm: tuple[int, float] = (0, self._start)
        self._agent_seconds: dict[int, float] = {}
        self._introduced: dict[int, Mapping[str, Any]] = {}

    def close_round(
        self,
        round: int,
        answers: Mapping[int, Answer[FrameT]],
        *,
        failed: Mapping[str, str] | None = None,
        missing: Sequence[int] = (),
        states: Mapping[str, str] | None = None,
    ) -> None:
        """Take in the answers of ``round``; number ``num_rounds + 1`` is the closing exchange.

        ``failed`` holds a reason by agent or node, ``missing`` the agents that did not
        answer at all, and ``states`` what has changed about agents or nodes since the
        round before.
        """
        answers = dict(sorted(answers.items()))
        for agent, answer in answers.items():
            spent = answer.metrics.get("seconds", 0.0)
            self._agent_seconds[agent] = self._agent_seconds.get(agent, 0.0) + spent
        # Before the new frames count: a row's bytes are those that led to the model it
        # speaks of.
        evaluated = [
            self._row(agent, (a.late_of or round) - 1, a)
            for agent, a in answers.items()
            if "accuracy" in a.metrics
        ]
        self.rows += evaluated
        refused = {
            agent: list(answer.refused) for agent, answer in answers.items() if answer.refused
        }
        for agent, answer in answers.items():
            self.relay.answered(agent, answer.facts, answer.held, answer.lacking)
            for reason in self.relay.post(agent, answer.posts, round=answer.late_of or round) or ():
                # the server's number
                refused.setdefault(self.relay.topology.num_agents, []).append(reason)
                self.log(f"round {round}: the server refused a frame. {reason}")
            for reason in answer.refused:
                self.log(f"round {round}: agent {agent} refused a frame. {reason}")
            if answer.lacking:
                self.log(
                    f"round {round}: agent {agent} lacks what the frames of these agents build "
                    f"on, and gets it next: {', '.join(map(str, answer.lacking))}"
                )
        timely = [a for a in answers.values() if a.late_of is None]
        losses = [a.metrics["train-loss"] for a in timely if "train-loss" in a.metrics]
        if losses:
            self.train_loss[round] = fmean(losses)
        closed = _ClosedRound(
            round,
            answers,
            dict(failed or {}),
            list(missing),
            refused,
            evaluated,
            dict(states or {}),
        )
        if self.record is not None:
            self._write(self.record, closed)
        self.log(self._line(closed))
        if self._warm[0] == 0:
            self._warm = (round, time.perf_counter())

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Return mean, spread and extremes of the personal accuracies by evaluated round."""
        by_round: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows:
            by_round.setdefault(row["round"], []).append(row)
        result = {}
        for round, rows in sorted(by_round.items()):
            s = accuracy_summary(rows)
            result[round] = {
                "accuracy": s["mean"],
                "accuracy-std": s["std"],
                "accuracy-worst": s["worst"],
                "accuracy-best": s["best"],
                "num-agents": len(rows),
            }
        return result

    def finish(self, status: str, **more: Any) -> dict[str, Any]:
        """Write the summary and return it."""
        summary = {
            "num_rounds": self.num_rounds,
            "accuracy": accuracy_summary(self.rows),
            "bytes": self.relay.ledger.totals(),
            "links": self.relay.ledger.link_rows(),
            "seconds": time.perf_counter() - self._start,
            **more,
        }
        if self.record is not None:
            self.record.finish(status, **summary)
        return {"status": status, **summary}

    def state(self) -> dict[str, Any]:
        """Return what must survive beside the record's lines, JSON-able."""
        return {"agent-seconds": self._agent_seconds, "seconds": time.perf_counter() - self._start}

    def restore(self, state: Mapping[str, Any], run: Run) -> None:
        """Go on from where `state` was taken and ``run``, the record, ended."""
        self._agent_seconds = {
            int(agent): seconds for agent, seconds in state["agent-seconds"].items()
        }
        self._start = time.perf_counter() - state["seconds"]
        self._introduced = {facts["agent"]: facts for facts in run.config.get("agents", [])}
        self.rows = list(run.rounds)
        self.train_loss = {
            row["round"]: row["train_loss"] for row in run.relay if row["train_loss"] is not None
        }

    def _row(self, agent: int, round: int, answer: Answer[FrameT]) -> dict[str, Any]:
        ledger, metrics = self.relay.ledger, answer.metrics
        return {
            "round": round,
            "agent": agent,
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "num_examples": int(metrics["num-examples"]),
            "density": metrics["density"],
            "sent_bytes": ledger.sent(agent),
            "received_bytes": ledger.received(agent),
            "uplink_bytes": ledger.uplinks[agent].bytes,
            "seconds": self._agent_seconds[agent],
        }

    def _write(self, record: RunRecord, closed: "_ClosedRound[FrameT]") -> None:
        answers = closed.answers
        told = {
            agent: {key.replace("-", "_"): value for key, value in a.facts.items()}
            for agent, a in answers.items()
            if a.introduces or agent not in self._introduced
        }
        if any(self._introduced.get(agent) != facts for agent, facts in told.items()):
            self._introduced.update(told)
            record.amend_config(
                agents=[self._introduced[agent] for agent in sorted(self._introduced)]
            )
        record.log_agents(closed.evaluated)
        record.log_traffic({"round": closed.round, **self.relay.ledger.changes()})
        for agent, answer in answers.items():
            record.keep_frames(answer.late_of or closed.round, agent, answer.raw)
        totals = self.relay.ledger.totals()
        record.log_round(
            {
                "round": closed.round,
                "answered": len(answers),
                "agents": self.relay.topology.num_agents,
                "failed": closed.failed,
                "missing": closed.missing,
                "states": closed.states,
                "late": {agent: a.late_of for agent, a in answers.items() if a.late_of is not None},
                "refused": closed.refused,
                "fresh": [agent for agent, a in answers.items() if a.fresh],
                "lacking": {agent: list(a.lacking) for agent, a in answers.items() if a.lacking},
                "frames": {
                    agent: a.content for agent, a in answers.items() if a.content and not a.late_of
                },
                "train_loss": self.train_loss.get(closed.round),
                "link_bytes": totals["links_total"],
                "uplink_bytes": totals["uplink_total"],
                "agent_seconds": sum(a.metrics.get("seconds", 0.0) for a in answers.values()),
                "seconds": time.perf_counter() - self._start,
            }
        )

    def _line(self, closed: "_ClosedRound[FrameT]") -> str:
        if closed.round > self.num_rounds:
            parts = ["closing"]
        else:
            parts = [
                f"round {closed.round}/{self.num_rounds}",
                f"{self._time_left(closed.round)} left",
            ]
        parts.append(f"{len(closed.answers)}/{self.relay.topology.num_agents} answered")
        late = sum(answer.late_of is not None for answer in closed.answers.values())
        parts[-1] += f" ({late} late)" if late else ""
        parts += [f"{len(closed.failed)} failed"] if closed.failed else []
        parts += [f"no answer from {', '.join(map(str, closed.missing))}"] if closed.missing else []
        if closed.round in self.train_loss:
            parts.append(f"train loss {self.train_loss[closed.round]:.3f}")
        if closed.evaluated:
            s = accuracy_summary(closed.evaluated)
            parts.append(
                f"accuracy after round {s['round']}: {s['mean']:.3f} ± {s['std']:.3f} "
                f"(worst {s['worst']:.3f}, agent {s['worst_agent']})"
            )
        totals = self.relay.ledger.totals()
        parts.append(f"{human_bytes(totals['links_total'])} over the links")
        if totals["link_bits_per_weight"]:
            parts[-1] += f" ({totals['link_bits_per_weight']:.2g} bit per weight)"
        return " | ".join(parts)

    def _time_left(self, round: int) -> str:
        known, since = self._warm
        if known == 0:  # the first round says little of the others
            return "?"
        per_round = (time.perf_counter() - since) / (round - known)
        minutes, seconds = divmod(int(per_round * (self.num_rounds - round) + 0.5), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


@dataclass(frozen=True)
class _ClosedRound(Generic[FrameT]):
    round: int
    answers: dict[int, Answer[FrameT]]
    failed: dict[str, str]
    missing: list[int]
    refused: dict[int, list[str]]  # by who refused
    evaluated: list[dict[str, Any]]  # rows of rounds.jsonl, of the round before
    states: dict[str, str]  # of agents and nodes, where they changed
