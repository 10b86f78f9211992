"""ClientApp of one agent: it translates messages, and does not calculate."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_mcepl.agents import Agent, Task, agent_file, make_agent, save_state
from flower_mcepl.agents.agent import best_file
from flower_mcepl.agents.handshake import introduction
from flower_mcepl.clients.device import (
    DataFn,
    agent_index,
    device_settings,
    load_data,
    once,
    torch_device,
)
from flower_mcepl.clients.guard import answer_to, check_mods
from flower_mcepl.clients.kept import KeptAgents, size_of
from flower_mcepl.clients.memory import Memory, open_memory
from flower_mcepl.clients.model_file import export_last_model
from flower_mcepl.errors import FlowerMceplError, FrameError, names_agent
from flower_mcepl.exchange.parcels import Answer, Parcel
from flower_mcepl.exchange.turn import open_mail, play_round, refusal
from flower_mcepl.masks.model import shared_module
from flower_mcepl.messages.answer import to_records
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.messages.identity import identity
from flower_mcepl.messages.limits import LIMITS
from flower_mcepl.messages.order import Order
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.streams import torch_threads

ModelFn = Callable[[Context], nn.Module]
AgentFn = Callable[[Context], Agent]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]

_agents = KeptAgents()  # of this process, so that not every message builds its agent anew


@final
class AgentApp(ClientApp):
    """ClientApp that plays one agent.

    Its functions give who runs it without Flower the same agent and network.
    """

    def __init__(
        self, agent_fn: AgentFn, module_fn: ModelFn | None, mods: Sequence[Mod] = ()
    ) -> None:
        check_mods(mods)
        super().__init__(mods=list(mods))
        self.agent_fn, self.module_fn = agent_fn, module_fn
        self.model_fn: ModelFn | None = None  # the user's own, where there is one
        # Ray pickles the app for every message: identity must travel with it
        self.id = uuid.uuid4().hex
        self._open: contextlib.ExitStack | None = None  # what is held until the message is answered
        self._finish: Callable[[], None] | None = None  # keeps the new state

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; keep the new state once nothing can fail, mods included."""
        try:
            with contextlib.ExitStack() as self._open:
                reply = answer_to(message, context, super().__call__)
                if self._finish is not None and not reply.has_error():
                    with naming_the_agent(context):
                        self._finish()
                return reply
        finally:
            self._open = self._finish = None

    def play(self, message: Message, context: Context) -> Message:
        """Play the round that a message orders; `__call__` keeps the state."""
        assert self._open is not None
        with naming_the_agent(context):
            # of an earlier call, where a mod calls twice: the round is then played
            # again
            self._open.close()
            order = Order.from_records(message.content)
            settings = device_settings(context)
            memory = self._open.enter_context(
                open_memory(context, order, agent=agent_index(context), settings=settings)
            )
            with torch_threads(settings.threads):
                answer, self._finish = _play(self, order, context, memory)
            content = RecordDict(to_records(answer, ArrayRecord, ConfigRecord, MetricRecord))
            return Message(content, reply_to=message)


def make_client_app(
    model_fn: ModelFn, data_fn: DataFn, *, task: Task | None = None, mods: Sequence[Mod] = ()
) -> ClientApp:
    """Make the ClientApp of one agent from what a Flower app has anyway.

    Parameters
    ----------
    model_fn : callable
        ``model_fn(context)`` returns the network, freshly initialised. It is called on
        the run's seed, so that every device draws the same weights; they are never
        sent.
    data_fn : callable
        ``data_fn(context)`` returns the agent's splits ``(train, test)`` or ``(train,
        validation, test)``: pairs of tensors, map-style datasets or DataLoaders (see
        `flower_mcepl.data.batches.AgentData.of`). The run-config key ``evaluate-on``
        says which of the last two the agent is evaluated on. Which agent it is stands
        in ``context.node_config["partition-id"]``.
    task : Task, optional
        Loss, metrics and targets of one's own, in place of the run-config key ``task``
        (``"classification"``, ``"binary"``, ``"multilabel"``, ``"regression"``,
        ``"segmentation"`` or ``"tokens"``).
    mods : sequence of callables (default: none)
        Flower's mods around every message, ``mod(message, context, call_next)``, as for
        any ClientApp. The agent's new state is kept only after they have let the answer
        pass.

    Raises
    ------
    ConfigError
        If a mod cannot work here, as Flower's own that clip arrays or add noise.

    Notes
    -----
    All parameters are read from the run config (``algorithm``, the parameters of that
    algorithm, `DeviceSettings`, ``seed``); a SuperNode's node config may set
    ``retention-conv``, ``retention-linear`` and the `DeviceSettings` for itself. Both
    functions are called once per process and run, and their results are kept. On a
    device every message is a process of its own; what they draw from a global generator
    is the same each time.

    Examples
    --------
    >>> app = make_client_app(lambda context: Net(), load_data)  # doctest: +SKIP
    """
    app_id = uuid.uuid4().hex  # Ray pickles the app for every message: identity must travel with it

    def module_fn(context: Context) -> nn.Module:
        seed = int(context.run_config.get("seed", 0))
        module: nn.Module = once(
            context,
            (app_id, "module", seed),
            lambda: shared_module(lambda: model_fn(context), seed=seed),
        )
        return module

    def agent_fn(context: Context) -> Agent:
        index, seed = agent_index(context), int(context.run_config.get("seed", 0))
        module = module_fn(context)
        data = once(
            context, (app_id, "data", index), lambda: load_data(data_fn, context, seed=seed)
        )
        return make_agent(
            str(context.run_config.get("algorithm", "mcepl")),
            index,
            module,
            data,
            context.run_config,
            context.node_config,
            seed=seed,
            device=torch_device(context),
            task=task,
        )

    app = make_agent_app(agent_fn, module_fn, mods=mods)
    assert isinstance(app, AgentApp)
    app.model_fn = model_fn
    return app


def make_agent_app(
    agent_fn: AgentFn, module_fn: ModelFn | None = None, *, mods: Sequence[Mod] = ()
) -> ClientApp:
    """Make a ClientApp from a function that builds the agent of a context.

    Where a process gets several messages for one agent it may build it once and
    `Agent.restore` it for each.

    ``module_fn`` gives the network that a server of these agents is made with, where
    they have one and are run without Flower; ``mods`` are as for `make_client_app`.
    """
    app = AgentApp(agent_fn, module_fn, mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return app.play(message, context)

    @app.evaluate()
    def close(message: Message, context: Context) -> Message:
        return app.play(message, context)

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        """Say which agent this node is, without building it."""
        return introduce(message, context)

    return app


def introduce(message: Message, context: Context) -> Message:
    """Answer to the question which agent this node is."""
    return Message(RecordDict(identity(agent_index(context), ConfigRecord)), reply_to=message)


@contextlib.contextmanager
def naming_the_agent(context: Context) -> Iterator[None]:
    """Name the agent in every error: Flower passes on an exception's text alone."""
    index = agent_index(context)
    who = f"agent {index}"
    try:
        yield
    except FlowerMceplError as error:
        if names_agent(error, index):
            raise
        raise type(error)(f"{who}: {error}") from error
    except Exception as error:
        where = "the run's log" if in_simulation() else f"the log of node {context.node_id}"
        raise FlowerMceplError(
            f"{who}: {type(error).__name__}: {error}. Its traceback is in {where}."
        ) from error


# A client's round. Building an agent takes longer than playing its round, so a process
# keeps the agents that it has built. But a used agent is no fresh one: it holds what it
# learned last, perhaps of a round that failed half-way, that was never answered, or
# that is being played again. Nothing but a saved state makes it what it has to be, so
# it is used again only where there is one, which then overwrites all of it; without a
# state a new agent is built. It is taken out of the kept ones before anything can fail,
# and goes back only when its answer is there: no error leaves a half-played agent
# behind. What the agent becomes is kept later still, by what is returned here, once all
# mods have let the answer pass.


def _play(
    app: AgentApp, order: Order[Array], context: Context, memory: Memory
) -> tuple[Answer[Array], Callable[[], None]]:
    """Play the round; return what the agent answers, and what keeps its new state."""
    place = (context.run_id, app.id, agent_index(context))
    past = memory.recall(before=order.parcel.round)
    used = _agents.take(place)
    agent = used if used is not None and past is not None else app.agent_fn(context)
    keeper = BestState() if order.keep_best else None
    mail = open_mail(agent, max_staleness=order.max_staleness, run=order.run, keeper=keeper)
    parcel, damaged = _opened(order.parcel)
    if past is None:  # nothing has been learned yet that could be evaluated
        parcel = replace(parcel, evaluate=False)
        agent.check()
    else:
        past.restore(agent, mail)
    reply = play_round(agent, mail, parcel)
    refused = [*damaged, *reply.refused][: LIMITS.reasons]
    reply = replace(
        reply,
        refused=[reason[: LIMITS.reason] for reason in refused],
        evaluation_error=reply.evaluation_error[: LIMITS.reason],
    )
    introduces = past is None or order.introduce
    facts: dict[str, Any] = {"agent": agent.index}
    if introduces:
        facts = introduction(agent, tell_classes=device_settings(context).tell_classes)
    answer = reply.answer(facts, _frame_array, fresh=past is None, introduces=introduces)
    future = Generation.of(agent, mail, run=order.run, round=parcel.round)
    most = device_settings(context).agent_cache_bytes
    _agents.keep(place, agent, size=size_of(agent, future.state), most=most)
    export = partial(
        export_last_model,
        *(agent, future, answer.metrics),
        order=order,
        context=context,
        model_fn=app.model_fn,
    )
    return answer, partial(_finish_round, memory, future, order, export)


def _opened(parcel: Parcel[Any]) -> tuple[Parcel[bytes], list[str]]:
    """Parcel with opened frames, and why those in damaged envelopes were left out."""
    frames: dict[int, list[bytes]] = {}
    damaged = []
    for sender, chain in parcel.frames.items():
        for array in chain:
            try:
                frames.setdefault(sender, []).append(open_envelope(array.data))
            except FrameError as error:
                damaged.append(refusal(sender, error))
    return replace(parcel, frames=frames), damaged


def _frame_array(frame: bytes) -> Array:
    return Array(np.frombuffer(frame, np.uint8))


def _finish_round(
    memory: Memory, future: Generation, order: Order[Array], export: Callable[[], None]
) -> None:
    if order.agents_dir and not order.parcel.train and in_simulation():
        save_state(future.state, Path(order.agents_dir) / agent_file(future.agent))
        if future.best is not None:
            save_state(future.best, Path(order.agents_dir) / best_file(future.agent))
    memory.remember(future)
    export()
