"""The device side on its own: messages into a ClientApp, and what it keeps, calls and
refuses.
"""

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flower_mcepl import (
    AgentData,
    ConfigError,
    CorruptFrameError,
    DataError,
    FlowerMceplError,
    MceplAgent,
    StateError,
    Topology,
)
from flower_mcepl.agents import AgentState
from flower_mcepl.clients import app as client_app
from flower_mcepl.clients import make_agent_app, make_client_app
from flower_mcepl.clients.memory import STATE
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.messages.identity import read_identity
from flower_mcepl.messages.limits import LIMITS
from flower_mcepl.runs import book
from flower_mcepl.wire import FrameHeader, read_header
from tests.fleet.agents import make_agent, small_net, split
from tests.fleet.flower import (
    RUN_CONFIG,
    RecordingGrid,
    app_grid,
    data_fn,
    frame_bytes,
    gossip,
    model_fn,
    sent_round,
    state_bytes,
    up_frames,
)
from tests.fleet.flower_messages import (
    a_context,
    a_message,
    be_a_node,
    frame_of,
    the_answer,
    the_app,
)


@pytest.fixture(autouse=True)
def identity() -> None:
    be_a_node()


def three_rounds(apps: Iterable[ClientApp], context: Context) -> list[bytes]:
    """Three rounds with two neighbors, each message given to the next app; return the
    agent's frames.
    """
    neighbors = [the_app(), the_app()]
    contexts = [a_context(j, run_id=context.run_id) for j in (1, 2)]
    came: dict[int, bytes] = {}
    frames = []
    for round, app in zip((1, 2, 3), apps, strict=True):
        message = a_message(round, frames=came, neighbors=(1, 2) if came else None)
        frames.append(frame_of(app(message, context)))
        pairs = enumerate(zip(neighbors, contexts, strict=True), start=1)
        came = {j: frame_of(other(a_message(round), state)) for j, (other, state) in pairs}
    return frames


# --- what it answers ---


def test_the_answer_is_handshake_metrics_and_frame() -> None:
    answer = the_answer(the_app()(a_message(1), a_context(2)))
    facts = answer.facts
    assert (facts["agent"], answer.fresh, facts["num-examples"], facts["num-weights"]) == (
        2,
        True,
        24,
        228,
    )
    assert facts["retention"] == "conv 0.3, linear 0.9"
    assert len(facts["fingerprint"]) == 32
    assert set(answer.metrics) == {"train-loss", "seconds"}
    assert len(answer.posts) == 1


def test_closing_message_trains_nothing_and_brings_no_frame() -> None:
    app, context = the_app(), a_context()
    app(a_message(1), context)
    before = state_bytes(context)
    answer = the_answer(app(a_message(2, neighbors=(), evaluate=True, train=False), context))
    assert {"accuracy", "loss", "num-examples", "density"} <= set(answer.metrics)
    assert not answer.posts
    assert not answer.refused
    assert state_bytes(context)["agent/scores/0.weight"] == before["agent/scores/0.weight"]


def test_a_query_says_who_it_is_without_calling_the_app() -> None:
    def never(context: Context) -> Any:
        raise AssertionError

    message = Message(RecordDict(), dst_node_id=1000, message_type="query")
    answer = make_client_app(never, never)(message, a_context(3))
    assert read_identity(answer.content) == 3


HANDSHAKE = {
    "algorithm",
    "seed",
    "fingerprint",
    "num-weights",
    "kept-weights",
    "first-mask",
    "parameters",
}


def test_a_device_may_keep_its_classes_to_itself() -> None:
    classes = {"classes", "train-counts", "test-counts"}
    open_one, secretive = (
        set(the_answer(the_app()(a_message(1), a_context(2, **settings))).facts)
        for settings in ({}, {"tell-classes": False})
    )
    assert open_one - secretive == classes
    assert secretive < open_one


@pytest.mark.parametrize("asked", [True, False])
def test_the_handshake_comes_only_where_it_is_asked_for_or_the_agent_is_fresh(asked: bool) -> None:
    app, context = the_app(), a_context(2)
    first = the_answer(app(a_message(1, introduce=asked), context))
    assert first.introduces
    assert set(first.facts) >= HANDSHAKE | {"agent"}
    later = the_answer(app(a_message(2, introduce=asked), context))
    assert (first.fresh, later.fresh) == (True, False)
    assert later.introduces is asked
    assert later.facts == (first.facts if asked else {"agent": 2})


def headers_of(answer: Message) -> list[FrameHeader]:
    return [read_header(frame, make_agent(0).layers) for frame in up_frames(answer)]


def test_an_answer_says_of_each_frame_what_it_builds_on_and_how_large_its_header_is() -> None:
    app, context = the_app(), a_context()
    app(a_message(1), context)
    answer = app(a_message(2, neighbors=(), acknowledged=1, whole=True), context)
    delta, key = headers_of(answer)
    posts = the_answer(answer).posts
    assert [post.builds_on for post in posts] == [1, 0] == [delta.reference, key.reference]
    assert [post.header_bytes for post in posts] == [delta.header_bytes, key.header_bytes]
    assert the_answer(answer).content == delta.content == key.content
    # its answer in round 2 was lost
    again = app(a_message(3, neighbors=(), acknowledged=1), context)
    assert [header.reference for header in headers_of(again)] == [1]
    restarted = the_app()(a_message(4, neighbors=(), acknowledged=1, whole=True), a_context())
    assert [header.reference for header in headers_of(restarted)] == [0]


def delta_of(agent: int, contexts: dict[int, Context], round: int) -> bytes:
    """The agent's next frame, which builds on its last one."""
    message = a_message(
        round,
        neighbors=() if round > 1 else None,
        **({"acknowledged": round - 1} if round > 1 else {}),
    )
    return frame_of(the_app()(message, contexts[agent]))


def test_an_answer_names_what_is_held_and_what_is_lacking() -> None:
    app, context = the_app(), a_context()
    neighbors = {j: a_context(j, run_id=context.run_id) for j in (1, 2)}
    sent = {j: [delta_of(j, neighbors, round) for round in (1, 2, 3)] for j in neighbors}
    app(a_message(1), context)

    def answer_to(round: int, frames: dict[int, bytes]) -> Answer[Array]:
        message = a_message(round, frames=frames, neighbors=(1, 2), introduce=False)
        return the_answer(app(message, context))

    assert answer_to(2, {1: sent[1][0], 2: sent[2][0]}).held == {1: 1, 2: 1}
    lacks = answer_to(4, {1: sent[1][2], 2: sent[2][1]})  # agent 1's frame of round 2 never came
    assert (lacks.held, lacks.lacking, lacks.refused) == ({2: 2}, (1,), ())
    again = answer_to(5, {})  # the next message brought nothing: it is still in doubt
    assert (again.held, again.lacking) == ({2: 2}, ())


def test_a_chain_arrives_in_its_order() -> None:
    app, context = the_app(), a_context()
    neighbors = {1: a_context(1, run_id=context.run_id)}
    chain = [delta_of(1, neighbors, round) for round in range(1, 13)]
    app(a_message(1), context)
    message = a_message(13, neighbors=(1,))
    for place, frame in enumerate(chain):  # "1/10" comes after "1/9"
        message.content["frames"][f"1/{place}"] = Array(np.frombuffer(frame, np.uint8))
    answer = the_answer(app(message, context))
    assert (answer.held, answer.refused, answer.lacking) == ({1: 12}, (), ())


def test_a_damaged_envelope_costs_that_frame_alone() -> None:
    app, context = the_app(), a_context()
    neighbors = {j: a_context(j, run_id=context.run_id) for j in (1, 2)}
    app(a_message(1), context)
    message = a_message(
        2, frames={j: delta_of(j, neighbors, 1) for j in neighbors}, neighbors=(1, 2)
    )
    message.content["frames"]["1/0"].data = b"no envelope"
    answer = the_answer(app(message, context))
    (reason,) = answer.refused
    assert reason.startswith(
        "CorruptFrameError, frame of agent 1: a frame must come as an npy array"
    )
    assert set(answer.held) == {2}


def test_reasons_are_cut_to_what_an_answer_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> bytes:
        raise CorruptFrameError("no " * 2000)

    app, context = the_app(), a_context()
    app(a_message(1), context)
    monkeypatch.setattr(client_app, "open_envelope", refuse)
    (reason,) = the_answer(app(a_message(2, frames={1: b""}, neighbors=(1,)), context)).refused
    assert 900 < len(reason) <= LIMITS.reason
    assert reason.startswith("CorruptFrameError, frame of agent 1: no no ")


# --- what it keeps ---


def test_state_survives_through_the_context_alone() -> None:
    one, many = a_context(), a_context()
    app = the_app()
    kept = three_rounds([app] * 3, one)
    renewed = three_rounds([the_app() for _ in range(3)], many)
    assert kept == renewed
    assert state_bytes(one) == state_bytes(many)
    assert len(set(kept)) == 3


def test_state_travels_through_flowers_records() -> None:
    grid, context = app_grid(1), a_context()
    app = the_app()
    app(a_message(1), context)
    for round in (2, 3):
        app(a_message(round, neighbors=(), acknowledged=round - 1), context)
    gossip(grid, Topology.from_edges([], num_agents=1), rounds=3, evaluate_every=9)
    app(a_message(4, neighbors=(), train=False), context)
    assert state_bytes(grid.contexts[1000]) == state_bytes(context)


def agent_with(verb: str, answer: Callable[..., Any]) -> MceplAgent:
    agent = make_agent(0)
    setattr(agent, verb, answer)
    return agent


@pytest.mark.parametrize("verb", ["restore", "fuse", "train", "outgoing", "state", "describe"])
def test_the_context_stays_as_it_was_where_anything_fails(verb: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no {verb} today")

    context = a_context()
    make_agent_app(lambda context: make_agent(0))(a_message(1), context)
    before = state_bytes(context)
    app = make_agent_app(lambda context: agent_with(verb, fail))
    with pytest.raises(
        FlowerMceplError,
        match=rf"agent 0: RuntimeError: no {verb} today\. Its traceback is in the log of",
    ):
        app(a_message(2, neighbors=(1, 2), evaluate=True), context)
    assert state_bytes(context) == before
    assert set(context.state) == {STATE}


def test_facts_that_json_cannot_hold_leave_the_context_empty() -> None:
    odd = AgentState({"set": {1}}, {"x": np.zeros(1)})
    context = a_context()
    with pytest.raises(FlowerMceplError, match="agent 0: TypeError"):
        make_agent_app(lambda context: agent_with("state", lambda: odd))(a_message(1), context)
    assert not context.state


def test_another_agents_state_is_refused() -> None:
    context = a_context(1)
    the_app()(a_message(1), context)
    context.node_config["partition-id"] = 2
    with pytest.raises(
        StateError, match=r"the saved state is of agent 1, but agent 2 has 2\. Use the state"
    ):
        the_app()(a_message(2), context)


# --- what it calls ---


def test_model_and_data_are_made_once_per_process_and_run() -> None:
    calls: list[tuple[str, int]] = []

    def model(context: Context) -> Any:
        calls.append(("model", context.run_id))
        return small_net()

    def data(context: Context) -> Any:
        calls.append((f"data {context.node_config['partition-id']}", context.run_id))
        return data_fn(context)

    app = make_client_app(model, data)
    for run in (7, 8):
        for agent in (0, 1, 0, 1, 0):
            app(a_message(1), a_context(agent, run_id=run))
    assert calls == [
        ("model", 7),
        ("data 0", 7),
        ("data 1", 7),
        ("model", 8),
        ("data 0", 8),
        ("data 1", 8),
    ]


@pytest.mark.parametrize("agent", [0, 7])
def test_two_nameless_functions_are_told_apart(agent: int) -> None:
    """The model's seed and the agent's number may be equal, and so may the functions'
    names.
    """
    app = make_client_app(lambda context: small_net(), lambda context: data_fn(context))
    again = make_client_app(lambda context: small_net(), lambda context: (split(50), split(51)))
    context = a_context(agent, run_id=9)
    first, other = app(a_message(1), context), again(a_message(1), a_context(agent, run_id=9))
    assert frame_of(first) != frame_of(other)


def test_agents_do_not_share_what_is_cached() -> None:
    """Two agents of one process train the same module object; neither may see the
    other.
    """
    alone = three_rounds([the_app()] * 3, a_context())
    app, context, other = the_app(), a_context(), a_context(5)
    other.run_id = context.run_id

    class Between:
        def __call__(self, message: Message, context: Context) -> Message:
            app(a_message(1), copy.deepcopy(other))
            return app(message, context)

    assert three_rounds([Between()] * 3, context) == alone  # type: ignore[list-item]


def noisy_model(context: Context) -> Any:
    net = small_net()
    net[0].weight.data.mul_(1 + np.random.rand() + random.random())  # noqa: NPY002
    return net


def noisy_data(context: Context) -> Any:
    order = torch.randperm(24)
    inputs, labels = split(0)
    random.random()
    noise = np.random.rand()  # noqa: NPY002
    train, test = order[:20], order[20:]
    return (inputs[train] + noise, labels[train]), (inputs[test], labels[test])


def test_global_generators_neither_matter_nor_move() -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
        context = a_context()
        app = make_client_app(noisy_model, noisy_data)
        results.append([frame_of(app(a_message(round), context)) for round in (1, 2)])
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert results[0] == results[1]


class ShuffledGrid(RecordingGrid):
    """Works the nodes off in another order and hands the answers over in yet another
    one.
    """

    def __init__(self, *args: Any, seed: int, **options: Any) -> None:
        self.random = random.Random(seed)
        super().__init__(*args, **options)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = [*messages]
        super().push_messages(self.random.sample(messages, len(messages)))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        return self.random.sample(replies, len(replies))

    def get_node_ids(self) -> Iterable[int]:
        return self.random.sample(list(super().get_node_ids()), len(self.contexts))


def test_the_order_of_the_nodes_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "new_run_id", lambda: "0" * 16)  # frames bear it
    topology = Topology.random_neighbors(4, degree=2, seed=3)
    frames, states = [], []
    for seed in (0, 1):
        grid = ShuffledGrid(the_app(), 4, RUN_CONFIG, seed=seed)
        strategy = gossip(grid, topology, rounds=4)
        frames.append(
            {
                (sent_round(m), m.metadata.dst_node_id, j): frame_bytes(array)
                for m in grid.log
                for j, array in m.content["frames"].items()
            }
        )
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in strategy.monitor.rows]
        states.append(([state_bytes(context) for context in grid.contexts.values()], rows))
    assert frames[0] == frames[1]
    assert states[0] == states[1]


# --- what the node config says ---


def test_a_node_sets_its_own_retention() -> None:
    node = {"retention-conv": 0.5, "retention-linear": "0.25"}
    facts = the_answer(the_app()(a_message(1), a_context(node=node))).facts
    assert facts["retention"] == "conv 0.5, linear 0.25"
    assert facts["kept-weights"] == 18 + 48
    plain = the_answer(the_app()(a_message(1), a_context())).facts
    assert facts["fingerprint"] == plain["fingerprint"]


def test_a_node_sets_its_own_threads_and_they_are_put_back() -> None:
    seen = []

    class Watching:
        num_examples = 24

        def training_batches(self, **options: Any) -> Any:
            seen.append(torch.get_num_threads())
            yield split(0)

        def evaluation_batches(self, *, batch_size: int) -> Any:
            yield split(0)

    before = torch.get_num_threads()
    app = make_client_app(model_fn, lambda context: (Watching(), Watching()))
    for threads in (3, 2):
        app(a_message(1), a_context(node={"threads": threads}, threads=5))
    app(a_message(1), a_context(threads=4))
    app(a_message(1), a_context())
    assert seen == [3, 2, 4, 1]
    assert torch.get_num_threads() == before


def test_a_node_sets_its_own_device() -> None:
    answer = the_app()(a_message(1), a_context(node={"device": "cpu"}, device="cuda:77"))
    assert the_answer(answer).posts


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"retention-conv": 0.0},
            r"agent 3: the retention ratio of key retention-conv .*in \(0, 1\]; got 0\.0",
        ),
        (
            {"retention-linear": 1.5},
            r"agent 3: the retention ratio of key retention-linear .*got 1\.5\. Use for example",
        ),
        ({"retention-conv": "much"}, "agent 3: run-config key retention-conv must be a number"),
        ({"device": "gpu"}, "agent 3: device must be auto, cpu, cuda, cuda:N or mps; got 'gpu'"),
        ({"threads": -1}, r"agent 3: threads must be >= 0 \(0: torch's own choice\); got -1"),
        ({"threads": "two"}, "agent 3: run-config key threads must be int; got 'two'"),
    ],
)
def test_a_bad_node_config_names_the_agent(node: dict[str, Any], message: str) -> None:
    context = a_context(3, node=node)
    with pytest.raises(ConfigError, match=message):
        the_app()(a_message(1), context)
    assert not context.state


@pytest.mark.parametrize("partition", [None, "0", -1, 0.0])
def test_a_node_must_say_which_agent_it_is(partition: Any) -> None:
    context = a_context()
    context.node_config["partition-id"] = partition
    if partition is None:
        del context.node_config["partition-id"]
    with pytest.raises(
        ConfigError, match=r"node 1000 must say which agent it is.*--node-config 'partition-id=0'"
    ):
        the_app()(a_message(1), context)


# --- messages and data that it refuses ---


@pytest.mark.parametrize(
    ("content", "came"),
    [
        # FedAvg's
        (
            RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"server-round": 1})}),
            "None",
        ),
        (RecordDict(), "None"),
        (RecordDict({"order": ConfigRecord({"message-version": 1})}), "1"),
        (RecordDict({"order": ConfigRecord({"server-round": 1})}), "None"),
    ],
)
@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_a_message_of_another_strategy_or_version(
    content: RecordDict, came: str, message_type: str
) -> None:
    message = Message(content, dst_node_id=1000, message_type=message_type)
    expected = (
        rf"agent 2: .*messages of version 5; got {came}\. Use GossipStrategy, and the same release"
    )
    with pytest.raises(ConfigError, match=expected):
        the_app()(message, a_context(2))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((split(0, size=0), split(0)), "agent 4's training split is empty.*leave this agent out"),
        ((split(0), split(0, size=0)), "agent 4's test split is empty"),
        (
            [split(0), split(0)],
            r"must return the pair \(train, test\), or .*; for agent 4 it gave list",
        ),
        (None, r"must return the pair \(train, test\), or .*; for agent 4 it gave NoneType"),
        ((split(0), "test"), "agent 4's test split must be a pair of tensors .*got str"),
        (
            ((split(0)[0], split(0, size=5)[1]), split(0)),
            "agent 4's training split holds 24 inputs but 5 labels",
        ),
    ],
)
def test_data_that_are_none(splits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_client_app(model_fn, lambda context: splits)(a_message(1), a_context(4))


@pytest.mark.parametrize(("split_name", "size"), [("test", 5), ("validation", 7)])
def test_the_run_config_says_what_an_agent_is_evaluated_on(split_name: str, size: int) -> None:
    app = make_client_app(model_fn, lambda context: (split(0), split(1, size=7), split(2, size=5)))
    context = a_context(4)
    context.run_config["evaluate-on"] = split_name
    facts = the_answer(app(a_message(1), context)).facts
    assert facts[f"num-{split_name}-examples"] == size
    assert facts["validation-counts"].count(":") == len(set(split(1, size=7)[1].tolist()))
    metrics = the_answer(app(a_message(2, evaluate=True), context)).metrics
    assert metrics["num-examples"] == size


@pytest.mark.parametrize("splits", [(split(0), split(1)), (split(0), None, split(1))])
def test_a_validation_split_that_is_asked_for_must_be_there(splits: Any) -> None:
    context = a_context(4)
    context.run_config["evaluate-on"] = "validation"
    with pytest.raises(
        DataError, match="evaluate-on is 'validation', but agent 4 has no validation split"
    ):
        make_client_app(model_fn, lambda context: splits)(a_message(1), context)


def test_inputs_that_are_not_finite() -> None:
    inputs, labels = split(0)
    app = make_client_app(model_fn, lambda context: ((inputs * float("nan"), labels), split(1)))
    with pytest.raises(
        DataError, match="agent 4's training split must hold finite inputs; 24 of 24 examples"
    ):
        app(a_message(1), a_context(4))


@pytest.mark.parametrize("which", ["model", "data"])
def test_an_error_of_the_apps_own_code_names_agent_type_and_place(which: str) -> None:
    def broken(context: Context) -> Any:
        return {}["label"]

    functions = {"model": model_fn, "data": data_fn, which: broken}
    app = make_client_app(functions["model"], functions["data"])
    with pytest.raises(
        FlowerMceplError, match=r"agent 4: KeyError: 'label'\. .*node 1004\.$"
    ) as caught:
        app(a_message(1), a_context(4))
    assert isinstance(caught.value.__cause__, KeyError)


def test_one_agents_data_may_be_agent_data_by_hand() -> None:
    agent = make_agent(0)
    agent.data = AgentData.of(split(3), split(4), agent=0)
    answer = make_agent_app(lambda context: agent)(a_message(1), a_context())
    assert the_answer(answer).posts


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused_by_name() -> None:
    app = make_client_app(model_fn, data_fn)
    context = a_context(4)
    context.node_config["device"] = "cuda:1"
    with pytest.raises(
        ConfigError, match=r"agent 4: device is 'cuda:1', but torch finds no CUDA here\. Use device"
    ):
        app(a_message(1), context)
