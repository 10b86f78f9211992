"""What one node gets, without a relay: a Context and the messages of rounds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity  # private, needed by Message()

from flower_mcepl.clients import make_client_app
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.messages.answer import from_records
from flower_mcepl.messages.order import Order
from tests.fleet.agents import SEED, small_net, split

RUN_CONFIG = {"seed": SEED, "batch-size": 8, "score-lr": 1.0, "finetune-lr": 1.0}
RUN = "00c0ffee00c0ffee"
run_ids = iter(range(100, 1_000_000))


def model_fn(context: Context) -> Any:
    return small_net()


def data_fn(context: Context) -> tuple[Any, Any]:
    index = agent_index(context)
    return split(index), split(1000 + index)


def be_a_node() -> None:
    """Let this process make messages."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def a_context(
    agent: int = 0, *, run_id: int | None = None, node: dict[str, Any] | None = None, **run: Any
) -> Context:
    """The Context of a node that keeps its agent's state in it, unless `node` says
    otherwise.
    """
    return Context(
        run_id=next(run_ids) if run_id is None else run_id,
        node_id=1000 + agent,
        node_config={"partition-id": agent, "state-dir": "none", **(node or {})},
        state=RecordDict(),
        run_config={**RUN_CONFIG, **run},
    )


def a_message(
    round: int,
    *,
    frames: dict[int, bytes] | None = None,
    neighbors: Sequence[int] | None = None,
    evaluate: bool = False,
    train: bool = True,
    acknowledged: int | None = None,
    whole: bool = False,
    **order: Any,
) -> Message:
    """What the relay sends; without `neighbors` it is what a node gets that the relay
    does not know yet.
    """
    parcel = Parcel(
        round,
        None if neighbors is None else tuple(neighbors),
        {j: [Array(np.frombuffer(frame, np.uint8))] for j, frame in (frames or {}).items()},
        evaluate=evaluate,
        train=train,
        acknowledged=acknowledged,
        whole=whole,
    )
    facts = {"run": RUN, "max_staleness": 5, "introduce": True, **order}
    content = RecordDict(Order(parcel=parcel, **facts).to_records(ArrayRecord, ConfigRecord))
    return Message(content, dst_node_id=1000, message_type="train")


def the_app(**options: Any) -> ClientApp:
    return make_client_app(model_fn, data_fn, **options)


def frame_bytes(array: Array) -> bytes:
    return bytes(array.numpy().tobytes())


def the_answer(message: Message) -> Answer[Array]:
    """What an agent answers, as the relay reads it."""
    return from_records(message.content)


def frame_of(message: Message) -> bytes:
    return the_answer(message).raw[0]
