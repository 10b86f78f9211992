"""Mod that lets an app written for FedAvg average with its neighbors, as it is."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp import mod as flowers_mods
from numpy.typing import NDArray

from flower_mcepl.agents import Agent
from flower_mcepl.agents.array_layout import Arrays
from flower_mcepl.clients.app import AgentApp, make_agent_app
from flower_mcepl.clients.message_app import MessageApp
from flower_mcepl.clients.metric_names import read_evaluation, read_training
from flower_mcepl.clients.naming import agent_index, introduce, naming_the_agent
from flower_mcepl.config.engines import BATCHED, LOOP
from flower_mcepl.errors import AnswerError, ConfigError
from flower_mcepl.messages.bundle import is_bundle
from flower_mcepl.messages.identity import is_question
from flower_mcepl.messages.order import AppInput, Order, is_order
from flower_mcepl.runs.worker_settings import NONE

CallNext = Callable[[Message, Context], Message]

_WITHOUT_EVALUATE = "No evaluate function registered"  # what Flower says to an app that has none
# Flower's mods that expect one set of arrays in and the same keys out; outside of this
# one they see frames.
_INSIDE_ONLY = {
    flowers_mods.fixedclipping_mod.__code__: "fixedclipping_mod",
    flowers_mods.adaptiveclipping_mod.__code__: "adaptiveclipping_mod",
    flowers_mods.LocalDpMod.__call__.__code__: "LocalDpMod",
}


@final
@dataclass(frozen=True, kw_only=True)
class NeighborAverageMod:
    """Average of the neighbors in place of the global model of a FedAvg app.

    `neighbor_average_mod` is one with the defaults. The server runs `GossipStrategy`,
    whose ``start`` gets the ``initial_arrays`` as FedAvg's does. In every round the
    agent averages its own arrays with those that its neighbors sent
    (`NeighborAverageAgent`), calls the app's evaluate function on the average if an
    evaluation is due, then its train function, and sends what that returns.

    Parameters
    ----------
    arrays, config : str (default: "arrays", "config")
        Names of the records in which the app expects the model and the configuration,
        as in FedAvg (``arrayrecord_key``, ``configrecord_key``).
    evaluate : bool (default: True)
        Call the app's evaluate function, if it has one. False for a model that has no
        accuracy.
    accuracy, loss : str, optional
        Names of these in the app's evaluate metrics; by default a known name is looked
        for (`read_evaluation`). Other evaluate metrics that are finite numbers go into
        the record under their own names.

    Notes
    -----
    The mod stands first in the list: mods after it see what they see under FedAvg, one
    ArrayRecord in and one out with the same keys, and mods before it see frames. The
    state between two messages is kept as that of every agent of this package; the app's
    own entries in ``Context.state`` stay as they are. In a train message that also
    evaluates, the app's lifespan is entered once more around the evaluation.

    Examples
    --------
    >>> app = ClientApp(mods=[neighbor_average_mod])
    """

    arrays: str = "arrays"
    config: str = "config"
    evaluate: bool = True
    accuracy: str | None = None
    loss: str | None = None

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """Play the round that `GossipStrategy` orders; other messages go to the app.

        Raises
        ------
        ConfigError
            If another strategy sent a train or evaluate message, or a mod stands before
            this one that cannot.
        FlowerMceplError
            If the app or one of its mods fails, or answers what it must not; the
            message names the agent.
        """
        kind = message.metadata.message_type
        if _call.get() is not None or kind not in ("train", "evaluate", "query"):
            return call_next(message, context)
        if is_question(message.content):
            return introduce(message, context)
        if kind == "query":
            return call_next(message, context)
        if is_bundle(message.content):
            raise ConfigError(
                "agents-per-node above 1 needs an app of make_client_app; with "
                "neighbor_average_mod a node plays one agent. Set agents-per-node to 1."
            )
        if context.run_config.get("engine") == BATCHED:
            raise ConfigError(
                f'engine = "{BATCHED}" stacks agents of make_client_app; with '
                "neighbor_average_mod an app calculates as it likes. Leave engine out."
            )
        if not is_order(message.content):
            raise ConfigError(
                "neighbor_average_mod takes messages of GossipStrategy; this one holds "
                f"{', '.join(message.content) or 'nothing'}. Use GossipStrategy on the server, or "
                "leave the mod out."
            )
        app = _running_app()
        if isinstance(app, MessageApp):
            raise ConfigError(
                "an app of make_client_app exchanges with its neighbors by itself; "
                "neighbor_average_mod is for an ordinary ClientApp with train and evaluate "
                "functions. Use one of the two."
            )
        if getattr(app, "_call", None) is not None:  # private: how Flower marks such an app
            raise ConfigError(
                "ClientApp(client_fn=...) is of Flower's older API, whose records "
                "neighbor_average_mod cannot fill. Move it over with the few lines of "
                'docs/existing-apps.md, "Apps of the older API"; the NumPyClient stays as it is.'
            )
        with naming_the_agent(context):
            order = Order.from_records(message.content)
        call = _Call(self, message, context, call_next, app, order.parcel.round, _input(order))
        player = make_agent_app(call.agent)
        assert isinstance(player, AgentApp)
        # an agent built earlier may be used again
        player.id = f"neighbor-average/{call.input.layout.fingerprint}"
        player.takes_arrays = True
        with _calling(call):
            return player(message, _neutral(context))


neighbor_average_mod = NeighborAverageMod()


@dataclass(frozen=True)
class _Call:
    """Arguments of the app's functions while one message is answered."""

    names: NeighborAverageMod
    message: Message
    context: Context
    call_next: CallNext
    app: ClientApp | None
    round: int
    input: AppInput[Array]

    def agent(self, context: Context) -> Agent:
        """Agent whose functions are those of the app that is called at the time."""
        # here, as a device loads its own algorithm alone
        from flower_mcepl.agents import NeighborAverageAgent

        initial = self.input.arrays
        return NeighborAverageAgent(
            agent_index(context),
            self.input.layout,
            lambda arrays, round: _current().train(arrays, round),
            lambda arrays: _current().evaluate(arrays),
            initial=None if initial is None else _numpy(initial),
        )

    def train(self, arrays: Arrays, round: int) -> tuple[Arrays, dict[str, float]]:
        """Call the app's train function."""
        message = self._inside("train", arrays, round, self.input.train_config)
        reply = self._content("train", self.call_next(message, self.context))
        records = list(reply.array_records.values())
        if len(records) != 1:
            raise AnswerError(
                "the app's train function must return one ArrayRecord, as for FedAvg; it "
                f"returned {len(records)} ({', '.join(reply) or 'no records'}). Put all arrays of "
                "the model into one."
            )
        return _numpy(records[0]), read_training(_metrics("train", reply))

    def evaluate(self, arrays: Arrays) -> dict[str, float]:
        """Call the app's evaluate function; return nothing where it has none."""
        if not self.names.evaluate:
            return {}
        config = self.input.evaluate_config
        message = self._inside("evaluate", arrays, self.round - 1, config)
        try:
            if self.message.metadata.message_type == "evaluate":
                reply = self.call_next(message, self.context)
            elif self.app is not None:
                reply = self.app(message, self.context)
            else:
                return {}
        except ValueError as error:
            if str(error).startswith(_WITHOUT_EVALUATE):
                return {}
            raise
        metrics = _metrics("evaluate", self._content("evaluate", reply))
        return read_evaluation(metrics, accuracy=self.names.accuracy, loss=self.names.loss)

    def _inside(
        self, message_type: str, arrays: Arrays, round: int, config: Mapping[str, Any]
    ) -> Message:
        """Message that the app would have got from FedAvg."""
        blank = copy.copy(self.message)
        blank.content = RecordDict()
        message = copy.deepcopy(blank)
        message.metadata.message_type = message_type
        message.content = RecordDict(
            {
                self.names.arrays: ArrayRecord(
                    {name: Array(array) for name, array in arrays.items()}
                ),
                self.names.config: ConfigRecord({**config, "server-round": round}),
            }
        )
        return message

    def _content(self, function: str, reply: object) -> RecordDict:
        if not isinstance(reply, Message):
            raise AnswerError(
                f"the app's {function} function must return Message(content, reply_to=message); "
                f"it returned {type(reply).__name__}."
            )
        if reply.has_error():
            raise AnswerError(
                f"the app or one of its mods answered {function} with error {reply.error.code}: "
                f"{reply.error.reason}"
            )
        return reply.content


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def _calling(call: _Call) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _current() -> _Call:
    call = _call.get()
    assert call is not None
    return call


def _running_app() -> ClientApp | None:
    """ClientApp whose call led here, None if called by hand; check the mods between.

    A mod gets the function that its message is for, and nothing else. Where a train
    message evaluates too, the app's other function is reached through the app.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _INSIDE_ONLY:
            raise ConfigError(
                f"{_INSIDE_ONLY[frame.f_code]} stands before neighbor_average_mod and would see "
                "neighbors' frames instead of a model, and leave the SuperNode waiting for ever. "
                "Place it after: ClientApp(mods=[neighbor_average_mod, ...])."
            )
        if frame.f_code is ClientApp.__call__.__code__:
            app: ClientApp = frame.f_locals["self"]
            return app
        frame = frame.f_back
    return None


def _input(order: Order[Array]) -> AppInput[Array]:
    if order.app is None:
        raise ConfigError(
            "an app with neighbor_average_mod begins with the server's initial arrays, and "
            "there are none. Pass them as to FedAvg: strategy.start(grid=grid, "
            "initial_arrays=ArrayRecord(...), ...)."
        )
    return order.app


def _neutral(context: Context) -> Context:
    """Context without settings of ours that are the app's own by the same name."""
    # an app calculates as it likes, and may mean something else by them
    neutral: dict[str, Any] = {
        **{"device": "auto", "threads": 0, "engine": LOOP},
        **{"worker": NONE, "worker-idle": 1.0, "decisions": "", "tell-classes": True},
    }
    node_config, run_config = {**context.node_config, **neutral}, {**context.run_config, **neutral}
    return Context(
        context.run_id, context.node_id, node_config, context.state, run_config, context.series_id
    )


def _numpy(record: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    return {name: array.numpy() for name, array in record.items()}


def _metrics(function: str, content: RecordDict) -> dict[str, Any]:
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise AnswerError(
            f"the app's {function} function must return one MetricRecord, as for FedAvg; it "
            f"returned {len(records)} ({', '.join(content) or 'no records'})."
        )
    return dict(records[0])
