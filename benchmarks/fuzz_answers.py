"""Send damaged and forged answers through the real strategy, beside honest ones.

Only the hostile agent's own rounds may suffer.

python benchmarks/fuzz_answers.py --answers 100000 --seed 0

A fleet of three plays a short run over and over: two agents answer as they once did in
an honest run, and each answer of the third is a mutant of its honest one: records and
fields of other types, out of range, huge, renamed, missing; frames damaged, forged, of
others; error replies with forged texts. It ends with exit code 1 if

- a run raises anything, but that the hostile agent did not answer its closing message;
- the honest agents' rows are not those of the honest run;
- what honest agents get can no longer be read;
- a line of the record is no standard JSON, or what log, `show` and page make of it
  fails or holds a control character.

Each find names its run: ``--only RUN`` with the same seed repeats it.
"""

import argparse
import hashlib
import itertools
import json
import logging
import random
import re
import struct
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private, needed by Message()
from torch import nn

from flower_mcepl import AgentData, MceplAgent, MceplConfig, Topology, read_run, shared_module
from flower_mcepl.agents.handshake import introduction
from flower_mcepl.errors import FrameError, IncompleteRunError
from flower_mcepl.exchange.mailbox import Mailbox
from flower_mcepl.exchange.turn import Mail, open_mail, play_round
from flower_mcepl.messages.answer import to_records
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.messages.order import Order
from flower_mcepl.record.reading import Run
from flower_mcepl.record.sources import Source
from flower_mcepl.report.page.report_page import report_page
from flower_mcepl.report.table import agent_table
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.strategies.answers import frame_array
from flower_mcepl.wire import FrameBytes

# the hostile one is the first agent, from which one might take what holds for all
AGENTS, HOSTILE, ROUNDS, SEED = 3, 0, 6, 7
HOSTILE_FROM = 1  # the first round whose answer is twisted
RUN = "00c0ffee00c0ffee"
LISTEN, SHOW, PRINT = 16, 4, 400  # of so many runs one is looked at in this way
TRAFFIC = ("sent_bytes", "received_bytes", "uplink_bytes", "seconds")

_NAMES = (f"agent {HOSTILE}", f"node {1000 + HOSTILE}")

Records = dict[str, Any]
"""Records of an answer as plain dictionaries; frames are Flower's arrays."""


# ---- mutants -------------------------------------------------------------------------

ESCAPES = "ok\x1b]52;c;cm0gLXJm\x07\r\nINFO : Run record: /etc\x9b2J\u202eabc\u2028x\x00"
TEXTS = (
    *("", " ", "x" * 500, "é数", "accuracy", "metrics", "agent", "round", "loss", "regression"),
    *(ESCAPES, "x" * 20_001, "\ud800", "[/bold]", "[red]x", r"$\frac{$", "_hidden", "<script>"),
    *("../../outside", "/etc/passwd", "C:\\x", "0:5 1:7", "1:2 x", "-1:3", "0:" + "9" * 18),
    *("{", "[]", "{}", '{"a": NaN}', '{"a": 1e999}', '"\\ud800"', '{"a":' * 900 + "1" + "}" * 900),
    *("[" * 5000, '{"batch_size": 0, "local_steps": 1}', '{"batch_size": "x", "local_steps": []}'),
    *('{"batch_size": 1e-9, "local_steps": 9e99}', '{"retention": {"conv": []}}', "0" * 16),
    *("error 0: the worker died", "error 0: " * 400 + "actor " * 400, "KeyError: 'arrays'"),
    "<class 'x'>:<'" + "'>:<'" * 300,
    "ClientAppException occurred. Message: " * 20,
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 100, 10**6, 10**6 + 1, 10**9, 10**9 + 1, 2**31, 2**53 + 1),
    *(2**60, 2**60 + 1, 2**63 - 1, 2**63, -(2**63), 2**100, True, False),
    *(0.5, 1.0, 1.0000001, -0.0, 1e-320, 1e100, 1.1e100, -1e100, 1.7e308, 1e6),
    *(float("nan"), float("inf"), float("-inf")),
)
# of facts that a table or picture shows
WORDS = ("metrics", "round", "[/x]", r"$\frac{$", "../../x", "_x", "²", "0:5", "loss", "test")
SHOWN = (
    *("main-metric", "metric-unit", "higher-is-better", "task", "classes", "retention"),
    *("frozen-share", "frozen-weights", "num-examples", "num-validation-examples", "parameters"),
    *("train-counts", "kept-by-layer"),
)
FACTS = (
    *("main-metric", "higher-is-better", "metric-unit", "task", "algorithm", "seed"),
    *("fingerprint", "num-weights", "kept-weights", "kept-by-layer", "prior", "first-mask"),
    *("retention", "classes", "train-counts", "test-counts", "validation-counts"),
    *("num-examples", "num-test-examples", "num-validation-examples", "frozen-share"),
    *("frozen-weights", "frozen-examples", "parameters", "agent", "num_examples", "main_metric"),
    *("frozen_share", "train_counts", "content", "fresh", "refused", "lacking", "introduces"),
    *("held-agents", "held-rounds", "builds-on", "header-bytes", "evaluation-error"),
)
METRICS = (
    *("accuracy", "loss", "num-examples", "density", "seconds", "train-loss", "round", "agent"),
    *("keep-best-round", "keep-best-value", "metrics", "train-", "own", "sent_bytes", "best_round"),
)
NAMES = (*FACTS, *METRICS, "frame", "key-frame", "metrics", "agent")


@dataclass
class Mutants:
    """Makes mutants of an answer's records.

    Parameters
    ----------
    rng : random.Random
        Where all choices come from.
    others : sequence of bytes
        Frames of other agents, rounds and runs.
    """

    rng: random.Random
    others: Sequence[bytes] = ()

    def make(self, records: Records, *, frames: bool = True) -> Records:
        """Copy of the records, changed in one to three places.

        Without ``frames`` the record of frames, and what tells of them, stays as it is.
        """
        mutant = copied(records)
        ways: list[Callable[[Records], None]] = [
            *[self.change_record] * 1,
            *[self.change_field] * 4,
            *[self.change_fact] * 4,
            *[self.change_list] * 2,
            *([self.change_frame] * 3 if frames and records.get("frame") else []),
        ]
        kept = copied(_about_frames(records))
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            self.rng.choice(ways)(mutant)
        if not frames:
            _put_back(mutant, kept)
        return mutant

    def junk(self, depth: int = 2) -> Any:
        """Value of any type, and most often an odd one."""
        rng = self.rng
        kind = rng.choice(["text", "number", "number", "bytes", "none", "list", "numbers", "table"])
        if kind == "text":
            return rng.choice(TEXTS)
        if kind == "number":
            return rng.choice(NUMBERS)
        if kind == "bytes":
            return rng.choice([b"", b"\x00\xff", bytes(2000)])
        if kind == "numbers":
            length = rng.choice([0, 1, 2, 3, 10, 10_001])
            return [rng.choice(NUMBERS[:8])] * length
        if kind == "none" or not depth:
            return None
        items = [self.junk(depth - 1) for _ in range(rng.choice([0, 1, 2, 3]))]
        if kind == "list":
            return items if rng.random() < 0.5 else items[:1] * rng.choice([1, 3, 1001])
        return {rng.choice(TEXTS[:20]): item for item in items}

    def change_record(self, records: Records) -> None:
        """Take away, rename, double or replace a record."""
        rng = self.rng
        name = rng.choice([*records, "metrics"])
        way = rng.choice(["drop", "rename", "double", "replace", "add"])
        record = records.get(name)
        if way in ("drop", "rename"):
            records.pop(name, None)
        if way in ("rename", "double", "add"):
            records[rng.choice([*TEXTS, *NAMES])] = {} if way == "add" else record
        if way == "replace":
            records[name] = self.junk()

    def change_field(self, records: Records) -> None:
        """Take away, rename, replace or add a field of a record."""
        rng = self.rng
        record = records.get(rng.choice(["agent", "metrics", "metrics", "frame"]))
        if not isinstance(record, dict):
            return
        key = rng.choice([*record] or ["agent"])
        way = rng.choice(["drop", "rename", "replace", "replace", "add", "add", "swap"])
        value = record.get(key)
        if way in ("drop", "rename"):
            record.pop(key, None)
        if way == "rename":
            record[rng.choice([*TEXTS, *NAMES])] = value
        elif way == "replace":
            record[key] = self.junk()
        elif way == "add":
            record[rng.choice([*METRICS, *NAMES, *TEXTS])] = self.junk()
        elif way == "swap":
            other = rng.choice([*record] or [key])
            record[key], record[other] = record.get(other), value

    def change_fact(self, records: Records) -> None:
        """Say something else of oneself, or in a metric; its type may be right."""
        rng = self.rng
        if not isinstance(agent := records.get("agent"), dict):
            return
        metrics = records.get("metrics")
        if isinstance(metrics, dict) and rng.random() < 0.4:
            metrics[rng.choice(METRICS)] = rng.choice(NUMBERS)
            return
        value: Any = rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS)])
        if rng.random() < 0.3:
            value = [value] * rng.choice([0, 1, 2, 3, 50])
        if isinstance(value, str) and rng.random() < 0.5:
            value = rng.choice(WORDS)
        key = rng.choice([rng.choice(FACTS), rng.choice(SHOWN)])
        agent[key.replace("-", rng.choice("-_"))] = value

    def change_list(self, records: Records) -> None:
        """Say that one holds, lacks or refuses other things."""
        rng = self.rng
        if not isinstance(agent := records.get("agent"), dict):
            return
        numbers = [rng.choice([0, 1, 2, 3, 10**6]) for _ in range(rng.choice([1, 2, 3]))]
        key = rng.choice(["lacking", "held-agents", "builds-on", "header-bytes", "refused"])
        if key == "refused":
            agent[key] = [rng.choice([ESCAPES, rng.choice(TEXTS)])] * rng.choice([1, 3, 1001])
        elif key == "held-agents":
            agent[key] = numbers
            agent["held-rounds"] = [rng.choice([0, 1, 2, 5, 10**9]) for _ in numbers]
        elif key == "lacking":
            agent[key] = rng.choice([numbers, [*range(AGENTS)], [*range(10_000)]])
        elif isinstance(agent.get(key), list):
            agent[key] = [rng.choice([-1, 0, 1, 2, 9, 40, 10**9]) for _ in agent[key]]

    def change_frame(self, records: Records) -> None:
        """Damage a frame, forge one, or send that of another agent, round or run."""
        rng = self.rng
        record = records.get("frame")
        if not isinstance(record, dict):
            return
        names = [name for name in record if isinstance(record[name], Array)]
        if not names:
            return
        name = rng.choice(names)
        data, array = record[name].data, record[name]
        way = rng.choice(["frame", "frame", "frame", "envelope", "cut", "swap", "type"])
        if way == "frame":
            try:
                data = enveloped(self.forged(open_envelope(data)))
            except Exception:  # it was damaged before
                return
        elif way == "envelope":
            place = rng.randrange(min(128, len(data)))
            data = data[:place] + rng.randbytes(1) + data[place + 1 :]
        elif way == "cut":
            data = data[: rng.randrange(len(data) + 1)]
        elif way == "swap":
            record[name] = record[rng.choice(names)]
            return
        else:
            record[name] = rng.choice([None, b"", 3, "x", [array]])
            return
        record[name] = Array(array.dtype, array.shape, array.stype, data)

    def forged(self, frame: bytes) -> bytes:
        """Another frame in place of an honest one; often its checksum fits."""
        rng = self.rng
        place = rng.randrange(len(frame))
        piece = frame[place : place + rng.choice([1, 4, 40])]
        other = rng.choice([*self.others, rng.randbytes(rng.choice([0, 7, 60, 5000]))])
        frame = rng.choice(
            [
                frame[:place] + bytes([frame[place] ^ 1 << rng.randrange(8)]) + frame[place + 1 :],
                frame[:place] + rng.randbytes(len(piece)) + frame[place + len(piece) :],
                frame[:place],
                frame[:place] + frame[place + len(piece) :],
                frame + piece,
                other,
            ]
        )
        return sealed(frame) if rng.random() < 0.6 else frame


def copied(value: Any) -> Any:
    """Copy of tables and lists; arrays in them are the same."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _about_frames(records: Records) -> Records:
    """What tells of frames, by record and field."""
    keys = ("builds-on", "header-bytes", "content")
    agent = records.get("agent", {})
    return {"frame": records.get("frame"), "agent": {k: agent[k] for k in keys if k in agent}}


def _put_back(mutant: Records, kept: Records) -> None:
    mutant.pop("frame", None)
    if kept["frame"] is not None:
        mutant["frame"] = kept["frame"]
    if isinstance(mutant.get("agent"), dict):
        for key in ("builds-on", "header-bytes", "content"):
            mutant["agent"].pop(key, None)
        mutant["agent"] |= kept["agent"]


def sealed(frame: bytes) -> bytes:
    """Frame with a length and a checksum that fit."""
    if len(frame) < 60:
        return frame
    body = frame[:36] + struct.pack("<I", len(frame)) + frame[40:-8]
    return body + hashlib.blake2b(body, digest_size=8).digest()


def enveloped(frame: bytes) -> bytes:
    """Envelope around a frame, as Flower's arrays have it."""
    return Array(np.frombuffer(frame, np.uint8)).data


# ---- the fleet -----------------------------------------------------------------------


def small_net() -> nn.Module:
    """Network of two small layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))


def make_agent(index: int, *, seed: int = SEED) -> MceplAgent:
    """Agent of a few made-up examples."""
    draw = torch.Generator().manual_seed(index)
    inputs, labels = torch.randn(8, 12, generator=draw), torch.randint(3, (8,), generator=draw)
    data = AgentData.of((inputs, labels), (inputs, labels), agent=index)
    config = MceplConfig(batch_size=8, score_lr=1.0, finetune_lr=1.0)
    return MceplAgent(index, shared_module(small_net, seed=seed), data, config, seed=seed)


class ScriptedGrid(Grid):
    """Nodes 1000 + i that answer at once what a function says; it keeps no message."""

    def __init__(self, answer: Callable[[int, Order[Array]], Records | Error]) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._answer, self._replies = answer, dict[str, Message]()

    def set_run(self, run: Any) -> None:
        """Do nothing."""

    @property
    def run(self) -> Any:
        """No run."""
        raise NotImplementedError

    def create_message(self, *args: Any, **more: Any) -> Message:
        """No message; strategies make their own."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return range(1000, 1000 + AGENTS)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            answer = self._answer(
                message.metadata.dst_node_id - 1000, Order.from_records(message.content)
            )
            if isinstance(answer, Error):
                reply = Message(answer, reply_to=message)
            else:
                reply = Message(RecordDict(), reply_to=message)
                reply.__dict__["_content"] = answer  # Flower's own records refuse some junk
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the answers."""
        return [self._replies.pop(key) for key in [*message_ids] if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer the messages, and hand out the answers."""
        return self.pull_messages(self.push_messages(messages))


@dataclass
class Fleet:
    """What all agents answered in an honest run.

    Attributes
    ----------
    answers : dict
        Records by agent, round and whether they hold the handshake.
    others : list of bytes
        Frames to send in place of one's own.
    rows : list
        Rows of the honest agents.
    """

    answers: dict[tuple[int, int, bool], Records] = field(default_factory=dict)
    others: list[bytes] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    @classmethod
    def at_work(cls) -> "Fleet":
        """Fleet that has played its run."""
        fleet = cls()
        agents = [make_agent(index) for index in range(AGENTS)]
        mails = [open_mail(agent, max_staleness=5, run=RUN) for agent in agents]

        def answer(index: int, order: Order[Array]) -> Records:
            return fleet._play(agents[index], mails[index], order)

        strategy = start(ScriptedGrid(answer), None)
        fleet.rows = honest_rows(strategy)
        for round in range(1, ROUNDS + 1):
            for agent in range(AGENTS):
                frames = fleet.answers[agent, round, True]["frame"].values()
                fleet.others += [open_envelope(frame.data) for frame in frames]
        stranger = make_agent(HOSTILE)
        mail = open_mail(stranger, max_staleness=5, run="f" * 16)
        stranger.train(round=1)
        fleet.others += [
            written.data for written in mail.outbox.write(stranger.outgoing(), round=1, key=True)
        ]
        return fleet

    def _play(self, agent: MceplAgent, mail: Mail, order: Order[Array]) -> Records:
        frames = {
            sender: [open_envelope(array.data) for array in chain]
            for sender, chain in order.parcel.frames.items()
        }
        parcel = replace(order.parcel, frames=frames, evaluate=order.parcel.round > 1)
        reply = play_round(agent, mail, parcel)
        for introduces in (True, False):
            facts = introduction(agent, tell_classes=True) if introduces else {"agent": agent.index}
            answer = reply.answer(facts, frame_array, introduces=introduces)
            self.answers[agent.index, parcel.round, introduces] = to_records(answer)
        return self.answers[agent.index, parcel.round, True]


def start(grid: Grid, record: Path | None) -> GossipStrategy:
    """Run the strategy; the hostile agent may owe its closing answer."""
    strategy = GossipStrategy(
        Topology.ring(AGENTS),
        record=record,
        evaluate_every=2,
        key_interval=2,
        min_agents=AGENTS - 1,
        wait_timeout=0.01,
    )
    try:
        strategy.start(grid, num_rounds=ROUNDS, timeout=30.0)
    except IncompleteRunError:
        if strategy.book.unanswered != (HOSTILE,):
            raise
    return strategy


def honest_rows(strategy: GossipStrategy) -> list[Any]:
    """Rows of the honest agents, without what the hostile one's traffic is part of."""
    return [
        {key: value for key, value in row.items() if key not in TRAFFIC}
        for row in strategy.monitor.rows
        if row["agent"] != HOSTILE
    ]


# ---- one run -------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of all runs."""

    counts: Counter[str] = field(default_factory=Counter)  # of answers, by what became of them
    failures: list[str] = field(default_factory=list)
    shown: int = 0  # records that were shown
    slowest: float = 0.0  # seconds of processor time for one run


class Lines(logging.Handler):
    """Lines of the log that a terminal should not get."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line."""
        text = record.getMessage()
        if not text.replace("\t", "").isprintable():  # a line is one line
            self.bad.append(text)


def clean(text: str) -> bool:
    """Whether a text has no control character but the ends of its lines."""
    return text.replace("\n", "").isprintable()


def fuzz(
    answers: int, *, seed: int, seconds: float = float("inf"), only: int | None = None
) -> Outcome:
    """Play runs until there were so many mutants or so much time has passed."""
    outcome, end = Outcome(), time.monotonic() + seconds
    with quiet() as lines, tempfile.TemporaryDirectory() as folder:
        fleet = Fleet.at_work()
        for number in itertools.count() if only is None else [only]:
            if sum(outcome.counts.values()) >= answers or time.monotonic() > end:
                break
            began = time.thread_time()
            try:
                _one_run(fleet, f"{seed}/{number}", number, Path(folder), lines, outcome)
            except Exception as error:
                where = traceback.format_exc().splitlines()[-3:]
                text = f"{error!r:.500} {' '.join(where)[:500]}"
                outcome.failures.append(f"run {number}: {text}")
            outcome.slowest = max(outcome.slowest, time.thread_time() - began)
            if len(outcome.failures) >= 20:
                break
    return outcome


@contextmanager
def quiet() -> Iterator[Lines]:
    """Log of Flower into nothing but a check; always the same run id."""
    logger, lines = logging.getLogger("flwr"), Lines()
    before = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [lines], False
    try:
        with (
            patch("secrets.token_hex", return_value=RUN),
            patch("flower_mcepl.strategies.rounds.report"),
            patch("flower_mcepl.record.writing.package_versions", dict),
            patch("os.fsync"),
        ):
            yield lines
    finally:
        logger.handlers, logger.propagate = before


def _one_run(
    fleet: Fleet, seed: str, number: int, folder: Path, lines: Lines, outcome: Outcome
) -> None:
    rng = random.Random(seed)
    mutants = Mutants(rng, fleet.others)
    boxes = _boxes() if number % LISTEN == 0 else {}
    record = folder / f"{number}"

    def answer(index: int, order: Order[Array]) -> Records | Error:
        honest = fleet.answers[index, order.parcel.round, order.introduce]
        if index != HOSTILE:
            _listen(boxes.get(index), order)
            return honest
        if order.parcel.round < HOSTILE_FROM:
            return honest
        if rng.random() < 0.05:
            code = rng.choice([1, 2, 3, 5, 10**6])  # 0 is Ray's, and ends a simulation
            return Error(code, rng.choice(TEXTS) * rng.choice([1, 50]))
        honest = fleet.answers[index, order.parcel.round, order.introduce or rng.random() < 0.7]
        return mutants.make(honest)

    lines.bad.clear()
    strategy = start(ScriptedGrid(answer), record)
    if honest_rows(strategy) != fleet.rows:
        raise AssertionError("the honest agents have other rows")
    if lines.bad:
        raise AssertionError(f"a line of the log: {lines.bad[0]!r:.300}")
    (path,) = record.iterdir()
    _check_lines(path)
    run = read_run(path)
    outcome.counts.update(_fates(run))
    if number % SHOW == 0:
        outcome.shown += 1
        _show(run, page=number % PRINT == PRINT - SHOW)


def _boxes() -> dict[int, Mailbox]:
    agents = [make_agent(index) for index in range(AGENTS) if index != HOSTILE]
    return {agent.index: open_mail(agent, max_staleness=5, run=RUN).inbox for agent in agents}


def _listen(box: Mailbox | None, order: Order[Array]) -> None:
    """Take in what an honest agent gets: only the hostile one's frames are refused."""
    if box is None:
        return
    parcel = order.parcel
    for sender, chain in parcel.frames.items():
        frames: list[FrameBytes] = []
        try:
            frames += [open_envelope(array.data) for array in chain]
            box.put(sender, frames, latest_round=parcel.round - 1, kept=parcel.kept.get(sender))
        except FrameError:
            if sender != HOSTILE:
                raise


def _check_lines(path: Path) -> None:
    """Check that every line of every file is standard JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the record")

    for file in (*path.glob("*.json"), *path.glob("*.jsonl")):
        text = file.read_text(encoding="utf-8")
        for part in [text] if file.suffix == ".json" else text.splitlines():
            json.loads(part, parse_constant=refuse)
    if (failures := path / "failures.txt").exists() and not clean(
        failures.read_text(encoding="utf-8")
    ):
        raise AssertionError("a control character in failures.txt")


def _fates(run: Run) -> Iterator[str]:
    """What became of each answer of the hostile agent."""
    for line in run.relay:
        if line["round"] < HOSTILE_FROM:
            continue
        reasons = [why for name, why in line["failed"].items() if name in _NAMES]
        yield _rule(reasons[0]) if reasons else "accepted" if not line["missing"] else "not asked"


def _rule(reason: str) -> str:
    """Rule of a refusal, without what came."""
    wrapped = re.search(r"does not answer as an agent \((.*)", reason)
    rule = (wrapped[1] if wrapped else reason).partition("; got")[0]
    rule = re.sub(r"\d+", "#", rule)
    for start in ("metric ", "error #", "names in"):
        if rule.startswith(start):
            return f"refused: {start.strip()} ..."
    return f"refused: {rule:.70}"


def _show(run: Run, *, page: bool) -> None:
    """Show a record: as text, and now and then as the page of a run."""
    shown = [agent_table(run)]
    if page:
        shown.append(report_page(Source(run.path.name, run.path, (run,))))
    for text in shown:
        if not clean(text):
            raise AssertionError(f"a control character in what is shown: {text!r:.300}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--answers", type=int, default=100_000, help="mutants to try (default: 100000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other mutants (default: 0)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long (default: never)"
    )
    parser.add_argument("--only", type=int, help="play this run alone, as a find names it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    outcome = fuzz(options.answers, seed=options.seed, seconds=options.seconds, only=options.only)
    print(
        f"{sum(outcome.counts.values()):,} answers, seed {options.seed}, "
        f"{time.monotonic() - began:.0f} s; {outcome.shown:,} records shown"
    )
    for fate, count in outcome.counts.most_common():
        print(f"  {count:>9,}  {fate}")
    print(f"slowest run: {outcome.slowest:.2f} s")
    for failure in outcome.failures:
        print(f"FAILED {failure}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
