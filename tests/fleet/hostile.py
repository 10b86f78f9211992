"""A hostile agent among honest ones, through the real strategy and the real app.

The hostile one answers what it answered in an honest run, twisted; so its frames do not
depend on what it gets. Honest agents are deterministic: one that gets the same orders
as in an earlier run is not played again, but answers as then.
"""

import copy
import functools
import hashlib
import importlib.util
import sys
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Context, Error, Message, RecordDict
from torch import nn

from flower_mcepl import Agent, AgentData, Topology, shared_module
from flower_mcepl.agents import find_algorithm, make_server
from flower_mcepl.agents import make_agent as make_any_agent
from flower_mcepl.clients import make_agent_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.errors import IncompleteRunError
from flower_mcepl.strategies import GossipStrategy, ServerStrategy, waiting
from flower_mcepl.strategies.rounds import ExchangeStrategy
from tests.fleet.flower import state_of
from tests.fleet.grid import InProcessGrid, travel

AGENTS, HOSTILE, ROUNDS, SEED = 4, 0, 3, 7
HONEST = tuple(agent for agent in range(AGENTS) if agent != HOSTILE)
RUN = "00c0ffee00c0ffee"
TRAFFIC = ("sent_bytes", "received_bytes", "uplink_bytes", "seconds")

Records = dict[str, Any]
Twist = Callable[[int, Records], Records | Error | None]
"""What comes in place of a round's answer; None: nothing comes."""


def load_fuzzer() -> ModuleType:
    """The fuzzer of answers, which makes the mutants."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_answers.py"
    spec = importlib.util.spec_from_file_location("fuzz_answers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_answers"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


fuzzer = load_fuzzer()


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))


def tiny_agent(index: int, algorithm: str = "mcepl") -> Agent:
    """Agent of a few made-up examples."""
    draw = torch.Generator().manual_seed(100 + index)
    labels = torch.randint(3, (16,), generator=draw)
    split = torch.randn(16, 12, generator=draw) + labels.view(-1, 1), labels
    data = AgentData.of(split, split, agent=index)
    return make_any_agent(
        algorithm, index, shared_module(tiny_net, seed=SEED), data, settings(algorithm), seed=SEED
    )


def settings(algorithm: str) -> dict[str, Any]:
    steps = {"score-lr": 10.0, "finetune-lr": 1.0} if algorithm == "mcepl" else {}
    return {"batch-size": 8, **steps}


@dataclass
class Memory:
    """Answers and states of one algorithm's agents, by all orders that led to them."""

    played: dict[bytes, tuple[RecordDict, Context]] = field(default_factory=dict)
    # the hostile agent's honest answers by round; its handshake
    script: dict[int, Records] = field(default_factory=dict)
    handshake: Records = field(default_factory=dict)


_memories: dict[tuple[str, int, int], Memory] = {}


@functools.cache
def handshake_of(algorithm: str = "mcepl") -> Records:
    """What the hostile agent says of itself at first, in an honest run."""
    play(None, algorithm=algorithm)
    return dict(_memories[algorithm, ROUNDS, 1].handshake)


class HostileGrid(InProcessGrid):
    """Nodes of which one answers as a twist says; `late` rounds come a round later."""

    def __init__(
        self, algorithm: str, memory: Memory, twist: Twist | None, late: Collection[int] = ()
    ) -> None:
        app = make_agent_app(lambda context: tiny_agent(agent_index(context), algorithm))
        super().__init__(app, AGENTS)
        self.memory, self.twist, self.late = memory, twist, late
        self.orders: list[tuple[int, int, dict[str, Any]]] = []  # agent, round, order
        self._past = {node: b"" for node in self.contexts}
        self._held_back: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer at once; an order travels only where the app has not answered it."""
        self._replies |= self._held_back
        self._held_back = {}
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            reply = self._reply(message.metadata.dst_node_id, message)
            self.answered(ids[-1], message.metadata.dst_node_id, reply)
        return ids

    def answered(self, message_id: str, node: int, reply: Message) -> None:
        kept = node - 1000 == HOSTILE and self.orders[-1][1] in self.late
        (self._held_back if kept else self._replies)[message_id] = reply

    def _reply(self, node: int, message: Message) -> Message:
        order = dict(message.content["order"])
        agent, round = node - 1000, int(order["server-round"])
        self.orders.append((agent, round, order))
        if agent == HOSTILE and self.twist is not None:
            return self._twisted(round, message, introduce=bool(order["introduce"]))
        content = self._played(node, message, order)
        if agent == HOSTILE:
            self._note(round, content)
        return Message(content, reply_to=message)

    def _played(self, node: int, message: Message, order: dict[str, Any]) -> RecordDict:
        """Answer of the real app; of an earlier run where all orders were the same."""
        key = hashlib.sha256(self._past[node] + bytes([node - 1000]))
        key.update(repr(sorted(order.items())).encode())
        for place, array in message.content["frames"].items():
            key.update(place.encode() + array.data)
        self._past[node] = key.digest()
        if key.digest() not in self.memory.played:
            context = copy.deepcopy(self.contexts[node])
            reply = travel(self.app(travel(message), context))
            assert not reply.has_error(), reply.error.reason
            self.memory.played[key.digest()] = reply.content, context
        content, self.contexts[node] = self.memory.played[key.digest()]
        return content

    def _note(self, round: int, content: RecordDict) -> None:
        records = {name: dict(record) for name, record in content.items()}
        if round == 1:
            own = ("fresh", "builds-on", "header-bytes", "content")
            self.memory.handshake = {k: v for k, v in records["agent"].items() if k not in own}
        self.memory.script[round] = records

    def _twisted(self, round: int, message: Message, *, introduce: bool) -> Message:
        assert self.twist is not None
        records = fuzzer.copied(self.memory.script[round])
        if introduce:
            records["agent"] |= self.memory.handshake
        said = self.twist(round, records)
        if said is None:
            said = Error(3, "Message Unavailable")
        if isinstance(said, Error):
            return Message(said, reply_to=message)
        reply = Message(RecordDict(), reply_to=message)
        reply.__dict__["_content"] = said  # Flower's own records refuse some of it
        return reply


@dataclass
class Ended:
    """What a run came to."""

    strategy: ExchangeStrategy
    grid: HostileGrid
    taken: frozenset[int]  # rounds of which the hostile agent's answer was taken in
    states: dict[int, dict[str, Any]]  # of the honest agents
    rows: list[dict[str, Any]]  # theirs, without the traffic

    @property
    def honest(self) -> tuple[Any, Any]:
        """All that must be equal, bit for bit."""
        return self.states, self.rows

    @property
    def server(self) -> dict[str, bytes]:
        """Server's tensors, of a server-based algorithm."""
        assert isinstance(self.strategy, ServerStrategy)
        tensors = self.strategy.server.state().tensors
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Clock:
    """Time that passes only while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def play(
    twist: Twist | None,
    *,
    algorithm: str = "mcepl",
    rounds: int = ROUNDS,
    key_interval: int = 1,
    late: Collection[int] = (),
    record: Path | None = None,
    **options: Any,
) -> Ended:
    """Play a run in which the hostile agent's answers are twisted; None: they are not.

    The run ends as it should: only the hostile agent may owe its closing answer.
    """
    memory = _memories.setdefault((algorithm, rounds, key_interval), Memory())
    if twist is not None and not memory.script:
        play(None, algorithm=algorithm, rounds=rounds, key_interval=key_interval)
    grid = HostileGrid(algorithm, memory, twist, late)
    strategy = strategy_of(algorithm, key_interval, record=record, **options)
    taken: set[int] = set()
    take = strategy.exchange.take

    def noting(agent: int, answer: Any, *, round: int) -> Any:
        if agent == HOSTILE:
            taken.add(round)
        return take(agent, answer, round=round)

    strategy.exchange.take = noting  # type: ignore[method-assign]
    with patch("secrets.token_hex", return_value=RUN), patch.object(waiting, "time", Clock()):
        try:
            strategy.start(grid, num_rounds=rounds, timeout=30.0)
        except IncompleteRunError:
            assert strategy.book.unanswered == (HOSTILE,)
    rows = [
        {key: value for key, value in row.items() if key not in TRAFFIC}
        for row in strategy.monitor.rows
        if row["agent"] != HOSTILE
    ]
    states = {agent: _bits(grid.contexts[1000 + agent]) for agent in HONEST}
    return Ended(strategy, grid, frozenset(taken), states, rows)


def strategy_of(algorithm: str, key_interval: int, **options: Any) -> ExchangeStrategy:
    options = {"evaluate_every": 1, "min_agents": AGENTS - 1, "wait_timeout": 0.01, **options}
    if find_algorithm(algorithm).server is None:
        ring = Topology.ring(AGENTS)
        return GossipStrategy(ring, key_interval=key_interval, **options)
    module = shared_module(tiny_net, seed=SEED)
    server = make_server(algorithm, module, AGENTS, settings(algorithm), seed=SEED)
    return ServerStrategy(server, **options)


@functools.cache
def reference(
    taken: frozenset[int],
    *,
    algorithm: str = "mcepl",
    rounds: int = ROUNDS,
    key_interval: int = 1,
    late: frozenset[int] = frozenset(),
) -> Ended:
    """Run in which the agent said the truth in the rounds ``taken``, else nothing."""
    ended = play(
        lambda round, records: records if round in taken else None,
        algorithm=algorithm,
        rounds=rounds,
        key_interval=key_interval,
        late=late,
    )
    assert ended.taken == taken
    return ended


def _bits(context: Context) -> dict[str, Any]:
    """State of an agent, bit for bit."""
    state = state_of(context).state
    tensors = {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}
    return {**tensors, "facts": repr(sorted(state.facts.items()))}
