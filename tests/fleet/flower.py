"""The small fleet as nodes of an in-process Grid: node 1000 + i plays agent i."""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from flwr.app import ArrayRecord, Context, Message

from flower_mcepl import Agent, Topology
from flower_mcepl.clients import make_agent_app, make_client_app
from flower_mcepl.clients.memory import STATE
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.errors import IncompleteRunError
from flower_mcepl.runs.generation import Generation
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.agents import make_agent
from tests.fleet.flower_messages import RUN_CONFIG, data_fn, frame_bytes, model_fn
from tests.fleet.grid import InProcessGrid


class RecordingGrid(InProcessGrid):
    """Keeps the answers too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.answers: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.answers += [reply for reply in replies if not reply.has_error()]
        return replies


def agent_grid(num_nodes: int, agent_fn: Callable[[int], Agent] = make_agent) -> RecordingGrid:
    """Nodes whose agents are built by hand."""
    return RecordingGrid(make_agent_app(lambda context: agent_fn(agent_index(context))), num_nodes)


def app_grid(num_nodes: int, **run_config: Any) -> RecordingGrid:
    """Nodes that run `make_client_app`."""
    return RecordingGrid(
        make_client_app(model_fn, data_fn), num_nodes, {**RUN_CONFIG, **run_config}
    )


def gossip(
    grid: InProcessGrid,
    topology: Topology | None = None,
    *,
    rounds: int = 4,
    timeout: float = 30.0,
    before: Mapping[int, Callable[[], None]] | None = None,
    after: Callable[[int], None] = lambda round: None,
    incomplete: bool | None = False,
    **options: Any,
) -> GossipStrategy:
    """Run a strategy; `before` holds what happens at the start of a round, `after` sees
    the end of each. An `incomplete` run must leave closing answers out; None: it may.
    """
    options = {"evaluate_every": 2, "record": None, "wait_timeout": 0.01, **options}
    strategy = GossipStrategy(topology or Topology.ring(grid.num_nodes), **options)
    steps = dict(before or {})

    def between_rounds(round: int, _: object) -> None:
        if round:
            after(round)
        steps.pop(round + 1, lambda: None)()

    ends = {
        True: pytest.raises(IncompleteRunError),
        False: contextlib.nullcontext(),
        None: contextlib.suppress(IncompleteRunError),
    }[incomplete]
    with ends:
        strategy.start(grid, num_rounds=rounds, timeout=timeout, evaluate_fn=between_rounds)
    assert not steps
    return strategy


def sent_round(message: Message) -> int:
    return int(message.content["order"]["server-round"])


def down_frames(message: Message) -> dict[int, list[bytes]]:
    """The frames of each sender in what goes to a node."""
    chains: dict[int, list[bytes]] = {}
    for place, array in message.content["frames"].items():
        sender, number = map(int, place.split("/"))
        assert number == len(chains.setdefault(sender, []))
        chains[sender].append(frame_bytes(array))
    return chains


def up_frames(reply: Message) -> list[bytes]:
    """The frames in what a node answers."""
    return [
        frame_bytes(array)
        for array in reply.content.array_records.get("frame", ArrayRecord()).values()
    ]


def held_rounds(grid: InProcessGrid, node: int) -> dict[int, int]:
    """Which round of which agent a node holds, as its Context says."""
    return {
        int(name.partition("/")[0]): int(array[0])
        for name, array in state_of(grid.contexts[node]).inbox.items()
        if name.endswith("/round")
    }


def state_facts(grid: InProcessGrid, node: int) -> dict[str, Any]:
    """The agent's facts in the node's Context."""
    return state_of(grid.contexts[node]).state.facts


def state_of(context: Context) -> Generation:
    """What the Context holds of its agent."""
    return Generation.decode(context.state.array_records[STATE]["generation"].data)


def state_bytes(context: Context) -> dict[str, bytes]:
    """Everything that a Context holds of its agent, bit for bit; nothing where it is
    empty.
    """
    if not context.state:
        return {}
    found = state_of(context)
    tensors = {name: tensor.numpy() for name, tensor in found.state.tensors.items()}
    parts = {"agent": tensors, "inbox": found.inbox, "outbox": found.outbox}
    arrays = {
        f"{part}/{name}": array.tobytes()
        for part, held in parts.items()
        for name, array in held.items()
    }
    return {**arrays, "facts": json.dumps(found.state.facts, sort_keys=True).encode()}
