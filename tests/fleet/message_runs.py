"""Three scripted runs whose messages are vectors: what relay and agents said before
`messages/` wrote and read it.

The strategy, the client code and the grid are the real ones. What an agent trains and
what a frame holds is made up here, so that the messages are the same on every machine,
and stay the same when the wire format changes: nobody opens a frame.

`python -m tests.fleet.message_runs` writes ``tests/vectors/messages.json`` anew.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

# private: tests only
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from flower_mcepl import Agent, Topology
from flower_mcepl.agents import AgentState
from flower_mcepl.clients import make_agent_app, neighbor_average_mod
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import Reply
from flower_mcepl.strategies import GossipStrategy
from flower_mcepl.wire import WrittenFrame
from tests.fleet.grid import InProcessGrid

FILE = Path(__file__).parents[1] / "vectors" / "messages.json"
RUN = "00c0ffee00c0ffee"
KINDS = {"array": ArrayRecord, "config": ConfigRecord, "metric": MetricRecord}


class ScriptedAgent(Agent):
    """Says of itself what a real one would, and learns nothing."""

    algorithm, seed, fingerprint = "scripted", 7, "5" * 32
    layers = {"fc": (4,)}  # noqa: RUF012

    def __init__(self, index: int) -> None:
        self.index = index

    def fuse(self, inbox: Any, *, round: int) -> None: ...

    def train(self, *, round: int) -> dict[str, float]:
        raise NotImplementedError

    def outgoing(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        raise NotImplementedError

    def state(self) -> AgentState:
        return AgentState({}, {})

    def restore(self, state: AgentState) -> None: ...

    def first_payload(self) -> None:
        return None

    def parameters(self) -> dict[str, Any]:
        return {"retention": {"conv": 0.3}, "betas": [0.9, None], "name": "\u00b5"}

    def describe(self) -> dict[str, Any]:
        more = {"num-weights": 4, "kept-weights": 2, "prior": "", "classes": "0 3", "ratio": 0.5}
        return {**super().describe(), **more}


def scripted_round(agent: Agent, mail: Any, parcel: Parcel[bytes]) -> Reply:
    """What `play_round` answers in these runs: it depends on agent and parcel alone."""
    index, round = agent.index, parcel.round
    metrics: dict[str, float] = {}
    if parcel.evaluate:
        loss = math.nan if index == 1 else 1.25
        metrics |= {"accuracy": 0.5, "loss": loss, "num-examples": 7, "density": 0.75}
    frames = []
    if parcel.train:
        metrics["train-loss"] = 1 / (round + index)
        frames.append(_frame(index, round, "delta", None if round == 1 else round - 1))
        if parcel.whole:
            frames.append(_frame(index, round, "key", 0 if index else None))
    odd = round == 3
    return Reply(
        frames,
        {**metrics, "seconds": 0.25},
        # after an even round it says that it lacks two, so a chain is due
        held={sender: round - 2 + round % 2 for sender in parcel.frames},
        refused=["CorruptFrameError, frame of agent 0: damaged"] if odd and index == 1 else [],
        lacking=[1] if odd and index == 0 else [],
    )


def _frame(agent: int, round: int, kind: str, reference: int | None) -> WrittenFrame:
    data = f"{kind} of agent {agent}, round {round}".encode()
    return WrittenFrame(data, reference, 5, f"{round:08x}{agent:08x}", {}, {})


class Listening(InProcessGrid):
    """Keeps what goes to the nodes and what they answer, as listings in which the order
    counts.
    """

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        super().__init__(app, num_nodes)
        self.said: list[dict[str, Any]] = []

    def answered(self, message_id: str, node: int, reply: Message) -> None:
        sent = next(m for m in self.log if m.metadata.message_id == message_id)
        assert not reply.has_error(), reply.error.reason
        self.said.append(
            {
                "type": sent.metadata.message_type,
                "node": node,
                "order": listing(sent.content),
                "answer": listing(reply.content),
            }
        )
        super().answered(message_id, node, reply)


def listing(content: RecordDict) -> list[Any]:
    """Name, kind and entries of every record, in their order, as JSON holds them."""
    names = {record: kind for kind, record in KINDS.items()}
    return [
        [name, names[type(record)], [[key, _listed(value)] for key, value in record.items()]]
        for name, record in content.items()
    ]


def _listed(value: Any) -> Any:
    if isinstance(value, Array):
        return [value.dtype, list(value.shape), value.stype, value.data.hex()]
    return value


def content_of(listed: list[Any]) -> RecordDict:
    """The records of a listing."""
    return RecordDict(
        {
            name: KINDS[kind]({key: _unlisted(value, kind) for key, value in entries})
            for name, kind, entries in listed
        }
    )


def _unlisted(value: Any, kind: str) -> Any:
    if kind == "array":
        dtype, shape, stype, data = value
        return Array(dtype, tuple(shape), stype, bytes.fromhex(data))
    return value


def as_sent(content: RecordDict) -> list[bytes]:
    """The bytes that Flower sends for some records: those of the records, and of all in
    them.
    """
    return [bytes(part.deflate()) for part in get_all_nested_objects(content).values()]


def numpy_app() -> ClientApp:
    app = ClientApp(mods=[neighbor_average_mod])

    @app.train()
    def train(message: Message, context: Any) -> Message:
        raise NotImplementedError  # the round is scripted

    app.evaluate()(train)
    return app


@contextlib.contextmanager
def _scripted() -> Iterator[list[dict[str, Any]]]:
    """Let rounds be scripted and keep the parcels that they are played with."""
    parcels: list[dict[str, Any]] = []

    def play(agent: Agent, mail: Any, parcel: Parcel[bytes]) -> Reply:
        frames = {j: [frame.decode() for frame in chain] for j, chain in parcel.frames.items()}
        shown = {**vars(parcel), "frames": frames, "agent": agent.index}
        parcels.append(json.loads(json.dumps(shown)))
        return scripted_round(agent, mail, parcel)

    with (
        patch("flower_mcepl.clients.app.play_round", play),
        patch("secrets.token_hex", return_value=RUN),
        patch("flower_mcepl.strategies.rounds.report"),
    ):
        yield parcels


def record_messages() -> dict[str, Any]:
    """All messages of the three runs, and the parcels that the agents made of them."""
    with _scripted() as parcels, tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"evaluate_every": 2, "key_interval": 2, "checkpoint_every": 2}
        grid = Listening(make_agent_app(lambda context: ScriptedAgent(agent_index(context))), 3)
        runs = {
            "a run that breaks off": _broken_off(grid, options, folder),
            "resumed": _resumed(grid, options, folder),
            "an app of FedAvg": _drop_in(),
        }
    recorded: dict[str, Any] = json.loads(json.dumps({"messages": runs, "parcels": parcels}))
    return recorded


def _broken_off(grid: Listening, options: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Three rounds, the last one without agent 2; then somebody stops it."""

    def between(round: int, _: object) -> None:
        if round == 2:
            grid.down.add(1002)
        if round == 3:
            raise KeyboardInterrupt

    strategy = GossipStrategy(Topology.ring(3), record=folder, min_agents=2, **options)
    with contextlib.suppress(KeyboardInterrupt):
        strategy.start(
            grid,
            num_rounds=4,
            timeout=30.0,
            train_config=ConfigRecord({"note": "hello", "rates": [0.5, 0.25]}),
            evaluate_fn=between,
        )
    return _said(grid)


def _resumed(grid: Listening, options: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """From the checkpoint after round 2 to the end, agent 2 with them again."""
    grid.down.clear()
    (path,) = Path(folder).iterdir()
    GossipStrategy(Topology.ring(3), resume=path, min_agents=3, **options).start(
        grid, num_rounds=4, timeout=30.0
    )
    return _said(grid)


def _drop_in() -> list[dict[str, Any]]:
    """Two rounds of an app that begins with the server's arrays."""
    grid = Listening(numpy_app(), 2)
    arrays = {"w": np.array([[1.0, -2.0, 3.0]], np.float32), "count": np.array(3)}
    GossipStrategy(Topology.ring(2), record=None, evaluate_every=1).start(
        grid,
        initial_arrays=ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        num_rounds=2,
        timeout=30.0,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_config=ConfigRecord({"batch": 7}),
    )
    return _said(grid)


def _said(grid: Listening) -> list[dict[str, Any]]:
    said, grid.said = grid.said, []
    return said


if __name__ == "__main__":
    FILE.write_text(json.dumps(record_messages()) + "\n", encoding="utf-8")
