"""ClientApp that plays orders of the relay and keeps what an agent became.

Nothing here loads torch: on a device every message is a process of its own.
"""

import contextlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flower_mcepl.clients.guard import answer_to, check_mods
from flower_mcepl.clients.naming import introduce, naming_the_agent
from flower_mcepl.clients.seats import Finish, introduce_all
from flower_mcepl.messages.bundle import is_bundle

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


class MessageApp(ClientApp, ABC):
    """ClientApp of one agent, with the user's mods around every message."""

    def __init__(self, mods: Sequence[Mod] = ()) -> None:
        check_mods(mods)
        super().__init__(mods=list(mods))
        # Ray pickles the app for every message: identity must travel with it
        self.id = uuid.uuid4().hex
        self._open: contextlib.ExitStack | None = None  # what is held until the message is answered
        self._finish: Finish | None = None  # keeps the new state
        _register(self)

    @abstractmethod
    def begin(
        self, content: RecordDict, context: Context, opened: contextlib.ExitStack
    ) -> tuple[RecordDict, Finish]:
        """Play the round that ``content`` orders.

        Returns the content of the answer, and what keeps the agent's new state; what
        must stay open until then goes into ``opened``.
        """

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; keep the new state once nothing can fail, mods included."""
        try:
            with contextlib.ExitStack() as self._open:
                reply = answer_to(message, context, super().__call__)
                if self._finish is not None and not reply.has_error():
                    with _naming(message, context):
                        reply.content.update(self._finish())
                return reply
        finally:
            self._open = self._finish = None

    def play(self, message: Message, context: Context) -> Message:
        """Play the round that a message orders; `__call__` keeps the state."""
        assert self._open is not None
        with _naming(message, context):
            # of an earlier call, where a mod calls twice: the round is then played
            # again
            self._open.close()
            content, self._finish = self.begin(message.content, context, self._open)
            return Message(content, reply_to=message)


def _naming(message: Message, context: Context) -> contextlib.AbstractContextManager[None]:
    """Name the agent in errors; each of several names itself."""
    several = is_bundle(message.content)
    return contextlib.nullcontext() if several else naming_the_agent(context)


def _register(app: MessageApp) -> None:
    @app.train()
    def train(message: Message, context: Context) -> Message:
        return app.play(message, context)

    @app.evaluate()
    def close(message: Message, context: Context) -> Message:
        return app.play(message, context)

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        """Say which agent this node is, or which it plays, without building it."""
        if is_bundle(message.content):
            return Message(introduce_all(message.content, context), reply_to=message)
        return introduce(message, context)
