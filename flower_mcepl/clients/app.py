"""ClientApp of one agent: it translates messages, and does not calculate."""

import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_mcepl.agents import Agent, Task, make_agent
from flower_mcepl.agents.handshake import introduction
from flower_mcepl.agents.parts.pacing import set_pace
from flower_mcepl.clients.device import (
    DataFn,
    device_settings,
    load_data,
    once,
    torch_device,
)
from flower_mcepl.clients.kept import KeptAgents, size_of
from flower_mcepl.clients.memory import Memory, open_memory
from flower_mcepl.clients.message_app import MessageApp, Mod
from flower_mcepl.clients.model_file import export_last_model
from flower_mcepl.clients.naming import agent_index
from flower_mcepl.clients.seats import Finish, begin_all
from flower_mcepl.clients.stacked_seats import begin_stacked
from flower_mcepl.config.engines import BATCHED, LOOP, check_engine
from flower_mcepl.errors import ConfigError, FrameError
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import Reply, open_mail, play_round, refusal
from flower_mcepl.masks.model import shared_module
from flower_mcepl.messages.answer import handed_records, to_records
from flower_mcepl.messages.bundle import is_bundle
from flower_mcepl.messages.envelope import open_envelope, raw_array
from flower_mcepl.messages.limits import LIMITS
from flower_mcepl.messages.order import Order
from flower_mcepl.record.reading import read_run
from flower_mcepl.runs.best import BestState
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.streams import torch_threads

ModelFn = Callable[[Context], nn.Module]
AgentFn = Callable[[Context], Agent]

_agents = KeptAgents()  # of this process, so that not every message builds its agent anew


@final
class AgentApp(MessageApp):
    """ClientApp that plays one agent in the process that gets its messages.

    Its functions give who runs it without Flower the same agent and network.
    """

    def __init__(
        self, agent_fn: AgentFn, module_fn: ModelFn | None, mods: Sequence[Mod] = ()
    ) -> None:
        super().__init__(mods)
        self.agent_fn, self.module_fn = agent_fn, module_fn
        self.model_fn: ModelFn | None = None  # the user's own, where there is one
        self.takes_arrays = False  # the server's initial ones

    def begin(
        self, content: RecordDict, context: Context, opened: contextlib.ExitStack
    ) -> tuple[RecordDict, Finish]:
        """Play the round that ``content`` orders; see `MessageApp.begin`."""
        if _engine(context) == BATCHED:
            with torch_threads(device_settings(context).threads):
                return begin_stacked(self._open_seat, content, context, opened)
        if is_bundle(content):
            return begin_all(self.begin, content, context, opened)
        with torch_threads(device_settings(context).threads):
            seat = self._open_seat(content, context, opened)
            reply = play_round(seat.agent, seat.mail, seat.parcel)
            return seat.answer(reply)

    def _open_seat(
        self, content: RecordDict, context: Context, opened: contextlib.ExitStack
    ) -> "OpenSeat":
        order = Order.from_records(content)
        if order.app is not None and not self.takes_arrays:
            raise ConfigError(
                "agents draw their weights from the run's seed and read no initial arrays; the "
                f"server sent {len(order.app.layout.arrays)}. Leave initial_arrays out of "
                "strategy.start(...). Pretrained weights are the run-config key weights, as in "
                "docs/pretrained.md; a FedAvg app that keeps its train and evaluate functions "
                "needs ClientApp(mods=[neighbor_average_mod])."
            )
        settings = device_settings(context)
        memory = opened.enter_context(
            open_memory(context, order, agent=agent_index(context), settings=settings)
        )
        return OpenSeat(self, order, context, memory)


def _engine(context: Context) -> str:
    return check_engine(context.run_config.get("engine", LOOP))


def app_of_functions(
    model_fn: ModelFn, data_fn: DataFn, *, task: Task | None = None, mods: Sequence[Mod] = ()
) -> AgentApp:
    """ClientApp of `make_client_app` for functions that are there."""
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

    app = AgentApp(agent_fn, module_fn, mods)
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
    return AgentApp(agent_fn, module_fn, mods)


# A client's round. Building an agent takes longer than playing its round, so a process
# keeps the agents that it has built. But a used agent is no fresh one: it holds what it
# learned last, perhaps of a round that failed half-way, that was never answered, or
# that is being played again. Nothing but a saved state makes it what it has to be, so
# it is used again only where there is one, which then overwrites all of it; without a
# state a new agent is built. It is taken out of the kept ones before anything can fail,
# and goes back only when its answer is there: no error leaves a half-played agent
# behind. What the agent becomes is kept later still, by what is returned here, once all
# mods have let the answer pass.


@final
class OpenSeat:
    """One agent as it was after its last round, with its mail and what it is to answer.

    Attributes
    ----------
    agent, mail, parcel
        What `play_round` takes.
    fresh : bool
        Whether the agent begins, without a state.
    """

    def __init__(
        self, app: AgentApp, order: Order[Array], context: Context, memory: Memory
    ) -> None:
        self._app, self._order, self._context, self._memory = app, order, context, memory
        self._place = (context.run_id, app.id, agent_index(context))
        past = memory.recall(before=order.parcel.round)
        used = _agents.take(self._place)
        self.fresh = past is None
        self.agent = used if used is not None and past is not None else _new_agent(app, context)
        keeper = BestState() if order.keep_best else None
        self.mail = open_mail(
            self.agent,
            max_staleness=order.max_staleness,
            age_decay=order.age_decay,
            run=order.run,
            keeper=keeper,
        )
        self.parcel, self._damaged = _opened(order.parcel)
        if past is None:  # nothing has been learned yet that could be evaluated
            self.parcel = replace(self.parcel, evaluate=False)
            self.agent.check()
        else:
            past.restore(self.agent, self.mail)

    def answer(self, reply: Reply) -> tuple[RecordDict, Finish]:
        """What the agent answers to its round, and what keeps its new state."""
        order, context, agent = self._order, self._context, self.agent
        refused = [*self._damaged, *reply.refused][: LIMITS.reasons]
        reply = replace(
            reply,
            refused=[reason[: LIMITS.reason] for reason in refused],
            evaluation_error=reply.evaluation_error[: LIMITS.reason],
        )
        introduces = self.fresh or order.introduce
        facts: dict[str, Any] = {"agent": agent.index}
        if introduces:
            facts = introduction(agent, tell_classes=device_settings(context).tell_classes)
        answer = reply.answer(facts, _frame_array, fresh=self.fresh, introduces=introduces)
        future = Generation.of(agent, self.mail, run=order.run, round=self.parcel.round)
        most = device_settings(context).agent_cache_bytes
        _agents.keep(self._place, agent, size=size_of(agent, future.state), most=most)
        export = partial(
            export_last_model,
            *(agent, future, answer.metrics),
            order=order,
            context=context,
            model_fn=self._app.model_fn,
        )
        records = RecordDict(to_records(answer, ArrayRecord, ConfigRecord, MetricRecord))
        return records, partial(_finish_round, self._memory, future, order, export)


def _new_agent(app: AgentApp, context: Context) -> Agent:
    """Build an agent, which replays the decisions of a record if it is to."""
    agent = app.agent_fn(context)
    record = device_settings(context).decisions
    if record:
        set_pace([agent], decisions=read_run(record).decisions)
    return agent


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
    memory: Memory, future: Generation, order: Order[Array], export: Callable[[], dict[str, bytes]]
) -> dict[str, ArrayRecord]:
    """Keep the state; a simulated agent hands over what the run record is to hold."""
    memory.remember(future)
    model = export()
    if not (order.store and in_simulation()):
        return {}
    exported = {ending: raw_array(data, Array) for ending, data in model.items()}
    return handed_records(raw_array(future.encode(), Array), exported, ArrayRecord)
