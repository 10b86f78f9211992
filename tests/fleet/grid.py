"""An in-process Grid: runs a ClientApp on N virtual nodes without Ray, SuperLink or
polling.

Semantics of flwr 1.41 simulation: exceptions become error replies (code 2) and discard
the context; messages travel through deflate and inflate, so a payload that cannot be
serialised fails. Nodes can be down, added, tampered with and given other ids.
"""

import copy
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# private: tests only
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

# private: tests only
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity  # private, needed by Message()

SUPERLINK = 1  # node id that the SuperLink's own error replies bear


class InProcessGrid(Grid):
    def __init__(
        self, app: ClientApp, num_nodes: int, run_config: dict[str, Any] | None = None
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.app, self.num_nodes, self.run_config = app, num_nodes, dict(run_config or {})
        self.contexts: dict[int, Context] = {}
        self.down: set[int] = set()  # not online
        # online, but the message never arrives: the SuperLink answers in the end
        self.silent: set[int] = set()
        self.mute: set[int] = set()  # online and at work, but the answer never arrives: the same
        # online and at work, but the answer lies there only after `deliver`
        self.slow: set[int] = set()
        self.unavailable: set[int] = set()  # the SuperLink answers for them with an error
        # on what goes to a node
        self.tamper: Callable[[Message], Message] = lambda message: message
        self.log: list[Message] = []  # everything sent to nodes
        self._replies: dict[str, Message] = {}
        self._kept_back: dict[str, Message] = {}
        for index in range(num_nodes):
            self.add_node(1000 + index, index)

    def add_node(self, node: int, partition: int | None, **node_config: Any) -> None:
        config = (
            {}
            if partition is None
            else {"partition-id": partition, "num-partitions": self.num_nodes}
        )
        self.contexts[node] = Context(
            run_id=1,
            node_id=node,
            state=RecordDict(),
            run_config=self.run_config,
            # in the context, as in simulation
            node_config={"state-dir": "none", **config, **node_config},
        )

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(
        self, content: Any, message_type: Any, dst_node_id: Any, group_id: Any, ttl: Any = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node not in self.down]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        assert isinstance(messages, list), "HttpGrid iterates twice: configure_* must return a list"
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self.log.append(message)
            node = message.metadata.dst_node_id
            if node in self.contexts and node not in self.down:
                reply = self._reply(node, self.tamper(travel(message)))
                self.answered(message.metadata.message_id, node, reply)
        return [message.metadata.message_id for message in messages]

    def answered(self, message_id: str, node: int, reply: Message) -> None:
        """Let an answer lie where it is pulled from, or keep it back."""
        (self._kept_back if node in self.slow else self._replies)[message_id] = reply

    def deliver(self) -> None:
        """Let all answers arrive that were kept back."""
        self._replies |= self._kept_back
        self._kept_back = {}

    def _reply(self, node: int, message: Message) -> Message:
        if node in self.unavailable:
            return _error(message, 5, "Node Unavailable")
        if node in self.silent:
            return _error(message, 3, "Message Unavailable")
        reply = self._work(node, message)
        return _error(message, 4, "Reply Unavailable") if node in self.mute else reply

    def _work(self, node: int, message: Message) -> Message:
        context = copy.deepcopy(self.contexts[node])
        try:
            reply = travel(self.app(message, context))
            self.contexts[node] = context
        except Exception as error:
            reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def _error(message: Message, code: int, reason: str) -> Message:
    reply = Message(Error(code, reason), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK
    return reply


def travel(message: Message) -> Message:
    """The message as it arrives: in bytes, and back."""
    with no_object_id_recompute():  # else each part is deflated 14 times for its id
        parts = get_all_nested_objects(message)
        objects = {key: bytes(part.deflate()) for key, part in parts.items()}
        arrived = inflate_object_from_contents(message.object_id, objects)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived
