"""A ClientApp that plays one agent: it translates between Flower's messages and the agent, and does not calculate."""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_mcepl.agents import Agent, agent_file, make_agent, save_state
from flower_mcepl.clients.guard import answer_to, check_mods
from flower_mcepl.clients.memory import Memory, in_simulation, open_memory
from flower_mcepl.config.fields import read_fields
from flower_mcepl.data.batches import AgentData
from flower_mcepl.errors import ConfigError, DataError, FlowerMceplError, FrameError, names_agent
from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.exchange.turn import Reply, open_mail, play_round, refusal
from flower_mcepl.masks.model import shared_module
from flower_mcepl.messages import keys
from flower_mcepl.messages.envelope import open_envelope
from flower_mcepl.messages.handshake import introduction
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import DeviceSettings, RunSettings
from flower_mcepl.streams import isolated_rng, torch_threads

ModelFn = Callable[[Context], nn.Module]
DataFn = Callable[[Context], tuple[object, object]]
AgentFn = Callable[[Context], Agent]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]

AGENTS_KEPT = 32  # in one process, so that not every message builds its agent anew
# modules and data of the present run, for all agents of this process
_shared: dict[tuple[object, ...], Any] = {}
_agents: dict[tuple[object, ...], Agent] = {}  # those last used come last


@final
class AgentApp(ClientApp):
    """A ClientApp that plays one agent; its functions give who runs it without Flower the same agent and network."""

    def __init__(
        self, agent_fn: AgentFn, module_fn: ModelFn | None, mods: Sequence[Mod] = ()
    ) -> None:
        check_mods(mods)
        super().__init__(mods=list(mods))
        self.agent_fn, self.module_fn = agent_fn, module_fn
        # Ray pickles the app for every message: identity must travel with it
        self.id = uuid.uuid4().hex
        self._open: contextlib.ExitStack | None = None  # what is held until the message is answered
        self._finish: Callable[[], None] | None = None  # keeps the new state

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, and keep the agent's new state once nothing can fail any more, mods included."""
        try:
            with contextlib.ExitStack() as self._open:
                reply = answer_to(message, context, super().__call__)
                if self._finish is not None and not reply.has_error():
                    with _naming_the_agent(context):
                        self._finish()
                return reply
        finally:
            self._open = self._finish = None

    def play(self, message: Message, context: Context) -> Message:
        """Play the round that a message orders; `__call__` keeps the state."""
        assert self._open is not None
        with _naming_the_agent(context):
            # of an earlier call, where a mod calls twice: the round is then played
            # again
            self._open.close()
            order = _order(message)
            settings = _device_settings(context)
            memory = self._open.enter_context(
                open_memory(context, order, agent=agent_index(context), settings=settings)
            )
            with torch_threads(settings.threads):
                content, self._finish = _play(self, message, order, context, memory)
            return Message(content, reply_to=message)


def make_client_app(model_fn: ModelFn, data_fn: DataFn, *, mods: Sequence[Mod] = ()) -> ClientApp:
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
    All parameters are read from the run config (``algorithm``, the parameters of that algorithm, `DeviceSettings`,
    ``seed``); a SuperNode's node config may set ``retention-conv``, ``retention-linear`` and the `DeviceSettings`
    for itself. Both functions are called once per process and run, and their results are kept. On a device every
    message is a process of its own; what they draw from a global generator is the same each time.

    Examples
    --------
    >>> app = make_client_app(lambda context: Net(), load_data)  # doctest: +SKIP
    """
    app_id = uuid.uuid4().hex  # Ray pickles the app for every message: identity must travel with it

    def module_fn(context: Context) -> nn.Module:
        seed = int(context.run_config.get("seed", 0))
        module: nn.Module = _once(
            context,
            (app_id, "module", seed),
            lambda: shared_module(lambda: model_fn(context), seed=seed),
        )
        return module

    def agent_fn(context: Context) -> Agent:
        index, seed = agent_index(context), int(context.run_config.get("seed", 0))
        module = module_fn(context)
        data = _once(context, (app_id, "data", index), lambda: _load(data_fn, context, seed=seed))
        return make_agent(
            str(context.run_config.get("algorithm", "mcepl")),
            index,
            module,
            data,
            context.run_config,
            context.node_config,
            seed=seed,
            device=_device(context),
        )

    return make_agent_app(agent_fn, module_fn, mods=mods)


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
        return Message(
            RecordDict({keys.AGENT: ConfigRecord({"agent": agent_index(context)})}),
            reply_to=message,
        )

    return app


def agent_index(context: Context) -> int:
    """Return the agent's number, the node config's ``partition-id``."""
    index = context.node_config.get(keys.PARTITION_ID)
    if not isinstance(index, int) or index < 0:
        raise ConfigError(
            f"node {context.node_id} must say which agent it is: its node config needs "
            f"partition-id, a number >= 0; got {index!r}. Start its SuperNode with --node-config "
            "'partition-id=0' (one number per node)."
        )
    return index


@contextlib.contextmanager
def _naming_the_agent(context: Context) -> Iterator[None]:
    """Let every error say which agent it comes from; Flower passes on nothing but an exception's text."""
    index = agent_index(context)
    who = f"agent {index}"
    try:
        yield
    except FlowerMceplError as error:
        if names_agent(error, index):
            raise
        raise type(error)(f"{who}: {error}") from error
    except Exception as error:
        raise FlowerMceplError(
            f"{who}: {type(error).__name__}: {error}. Its traceback is in the log of node "
            f"{context.node_id}."
        ) from error


def _order(message: Message) -> ConfigRecord:
    order = message.content.config_records.get(keys.ORDER)
    if order is None or order.get(keys.VERSION) != keys.MESSAGE_VERSION:
        raise ConfigError(
            f"this device understands GossipStrategy messages of version {keys.MESSAGE_VERSION}; "
            f"got {None if order is None else order.get(keys.VERSION)!r}. Use GossipStrategy, and "
            "the same release of flower-mcepl on server and devices."
        )
    return order


def _play(
    app: AgentApp, message: Message, order: ConfigRecord, context: Context, memory: Memory
) -> tuple[RecordDict, Callable[[], None]]:
    """Return what the agent answers, and what keeps its new state."""
    parcel, damaged = _parcel(message, order)
    place = (context.run_id, app.id, agent_index(context))
    past = memory.recall(before=parcel.round)
    # Only a state makes a used agent what it has to be; where anything fails below, it
    # is not used again.
    used = _agents.pop(place, None)
    agent = used if used is not None and past is not None else app.agent_fn(context)
    mail = open_mail(agent, max_staleness=int(order[keys.MAX_STALENESS]))  # type: ignore[arg-type]
    if past is None:  # nothing has been learned yet that could be evaluated
        parcel = replace(parcel, evaluate=False)
    else:
        past.restore(agent, mail)
    reply = play_round(agent, mail, parcel)
    reply = replace(reply, refused=[*damaged, *reply.refused])
    introduce = past is None or bool(order.get(keys.INTRODUCE, True))
    content = _answer(
        agent, reply, fresh=past is None, facts=_introduction(agent, context) if introduce else {}
    )
    _keep(place, agent)
    future = Generation.of(agent, mail, run=str(order[keys.RUN]), round=parcel.round)
    return content, partial(_finish_round, memory, future, order)


def _parcel(message: Message, order: ConfigRecord) -> tuple[Parcel[bytes], list[str]]:
    """Return the parcel, and why frames whose envelope is damaged were left out."""
    frames: dict[int, list[bytes]] = {}
    damaged = []
    for place, array in message.content.array_records.get(keys.FRAMES, ArrayRecord()).items():
        sender, _, _ = place.partition("/")
        try:
            frames.setdefault(int(sender), []).append(open_envelope(array.data))
        except FrameError as error:
            damaged.append(refusal(sender, error))
    neighbors: Any = order.get(keys.NEIGHBORS, [])
    parcel = Parcel(
        round=int(order[keys.ROUND]),  # type: ignore[arg-type]
        neighbors=tuple(neighbors) if order[keys.FUSE] else None,
        frames=frames,
        evaluate=bool(order[keys.EVALUATE]),
        train=bool(order[keys.TRAIN]),
        acknowledged=order.get(keys.ACKNOWLEDGED),  # type: ignore[arg-type]
        whole=bool(order.get(keys.WHOLE, False)),
    )
    return parcel, damaged


def _introduction(agent: Agent, context: Context) -> dict[str, Any]:
    facts = introduction(agent, tell_classes=_device_settings(context).tell_classes)
    return {**facts, keys.PARAMETERS: json.dumps(facts[keys.PARAMETERS])}


def _answer(agent: Agent, reply: Reply, *, fresh: bool, facts: Mapping[str, Any]) -> RecordDict:
    facts = {"agent": agent.index, keys.FRESH: fresh, **facts}
    lists = {
        keys.REFUSED: reply.refused,
        keys.LACKING: reply.lacking,
        keys.HELD_AGENTS: list(reply.held),
        keys.HELD_ROUNDS: list(reply.held.values()),
        keys.BUILDS_ON: [
            -1 if frame.reference is None else frame.reference for frame in reply.frames
        ],
        keys.HEADER_BYTES: [frame.header_bytes for frame in reply.frames],
    }
    # Flower's tools trip over empty lists
    facts.update({key: values for key, values in lists.items() if values})
    if reply.frames:
        facts[keys.CONTENT] = reply.frames[0].content
    content = RecordDict(
        {keys.AGENT: ConfigRecord(facts), keys.METRICS: MetricRecord(dict(reply.metrics))}
    )
    if reply.frames:
        content[keys.FRAME] = ArrayRecord(
            {
                key: Array(torch.frombuffer(bytearray(frame.data), dtype=torch.uint8).numpy())
                for key, frame in zip((keys.FRAME, keys.KEY_FRAME), reply.frames, strict=False)
            }
        )
    return content


def _finish_round(memory: Memory, future: Generation, order: ConfigRecord) -> None:
    folder = order.get(keys.AGENTS_DIR)
    if folder and not order[keys.TRAIN] and in_simulation():
        save_state(future.state, Path(str(folder)) / agent_file(future.agent))
    memory.remember(future)


def _load(data_fn: DataFn, context: Context, *, seed: int) -> AgentData:
    index = agent_index(context)
    with isolated_rng(seed, "data", agent=index):
        splits: object = data_fn(context)
    if not isinstance(splits, tuple) or len(splits) not in (2, 3):
        got = f"a tuple of {len(splits)}" if isinstance(splits, tuple) else type(splits).__name__
        raise DataError(
            "the data function must return the pair (train, test), or (train, validation, test); "
            f"for agent {index} it gave {got}."
        )
    train, *validation, test = splits
    return AgentData.of(
        train,
        test,
        agent=index,
        validation=validation[0] if validation else None,
        evaluate_on=read_fields(RunSettings, context.run_config).evaluate_on,
    )


def _keep(place: tuple[object, ...], agent: Agent) -> None:
    for other in [other for other in _agents if other[0] != place[0]]:
        del _agents[other]
    _agents[place] = agent
    while len(_agents) > AGENTS_KEPT:
        del _agents[next(iter(_agents))]


def _once(context: Context, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """Return what ``make`` gave earlier in this process and run, under a key."""
    if any(run_id != context.run_id for run_id, *_ in _shared):
        _shared.clear()
    place = (context.run_id, *key)
    if place not in _shared:
        _shared[place] = make()
    return _shared[place]


def _device_settings(context: Context) -> DeviceSettings:
    return read_fields(DeviceSettings, {**context.run_config, **context.node_config})


def _device(context: Context) -> str:
    told = _device_settings(context).device
    if told != "auto":
        if torch.device(told).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f'device is {told!r}, but torch finds no CUDA here. Use device = "auto" or "cpu"; '
                "in simulation, give "
                "each client a share of the GPU (client-resources-num-gpus in "
                "--federation-config)."
            )
        return told
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
