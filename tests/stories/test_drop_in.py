"""Apps written for FedAvg that gossip: NumPy, PyTorch, scikit-learn; against gossip
averaging in a plain loop.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from numpy.typing import NDArray
from torch import nn

from flower_mcepl import (
    AnswerError,
    ConfigError,
    RosterError,
    Topology,
    encode_frame,
    read_run,
    simulate,
)
from flower_mcepl.agents import NeighborAverageAgent
from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.clients import NeighborAverageMod, make_client_app, neighbor_average_mod
from flower_mcepl.clients.metric_names import read_evaluation, read_training
from flower_mcepl.messages import keys
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.flower_messages import data_fn, model_fn
from tests.fleet.grid import InProcessGrid

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "drop_in"
SIDES = ("fedavg", "gossip")
STEP = 0.25
INITIAL = {"w": np.array([[1.0, -2.0, 3.0]]), "b": np.array(0.5)}

Values = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def states_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for the agents' states that this test alone has."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


class Nodes(InProcessGrid):
    """Keeps all answers, errors among them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answers: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.answers += replies
        return replies


# --- an app, and gossip averaging in a loop ---


def local_step(values: Values, agent: int, round: int) -> Values:
    """What the NumPy app learns: a step towards a goal of its own, which moves with the
    rounds.
    """
    return {name: x + STEP * (agent + 0.1 * round - x) for name, x in values.items()}


def numpy_app(
    mods: Sequence[Any] = (neighbor_average_mod,),
    answer: Callable[[RecordDict, Context], RecordDict] | None = None,
    train_mods: Sequence[Any] = (),
) -> ClientApp:
    """In the shape of Flower's quickstart; ``answer`` may spoil what the train function
    returns.
    """
    app = ClientApp(mods=list(mods))

    @app.train(mods=list(train_mods))
    def train(msg: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in msg.content["arrays"].items()}
        round = msg.content["config"]["server-round"]
        new = local_step(arrays, context.node_config["partition-id"], round)
        metrics = MetricRecord({"train_loss": float(round), "num-examples": 10})
        content = RecordDict({"arrays": record(new), "metrics": metrics})
        return Message(content if answer is None else answer(content, context), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        metrics = {
            "eval_acc": 0.5,
            "eval_loss": float(msg.content["arrays"]["w"].numpy().sum()),
            "num-examples": 4,
        }
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)

    return app


def record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def run(
    grid: InProcessGrid,
    topology: Topology | None = None,
    *,
    initial: Mapping[str, NDArray[Any]] = INITIAL,
    rounds: int = 5,
    before: Mapping[int, Callable[[], None]] | None = None,
    configs: Mapping[str, ConfigRecord] | None = None,
    **options: Any,
) -> GossipStrategy:
    """Run the strategy; ``before`` holds what happens at the start of a round."""
    options = {"evaluate_every": 1, "record": None, "wait_timeout": 0.01, **options}
    strategy = GossipStrategy(topology or Topology.ring(grid.num_nodes), **options)
    steps = dict(before or {})

    def between(round: int, arrays: ArrayRecord) -> None:
        assert len(arrays) == 0  # there is no global model
        steps.pop(round + 1, lambda: None)()

    strategy.start(
        grid,
        initial_arrays=record(initial),
        num_rounds=rounds,
        timeout=30.0,
        evaluate_fn=between,
        **(configs or {}),
    )
    assert not steps
    return strategy


def oracle(
    topology: Topology,
    rounds: int,
    *,
    initial: Values = INITIAL,
    absent: Mapping[int, Sequence[int]] | None = None,
    deaf: Mapping[tuple[int, int], Sequence[int]] | None = None,
    step: Callable[[Values, int, int], Values] = local_step,
) -> list[list[Values]]:
    """Gossip averaging in a loop: every agent's average after each round.

    ``absent`` are agents that miss a round, ``deaf`` links (receiver, sender) that do
    not carry what was sent in it.
    """
    absent, deaf = absent or {}, deaf or {}
    own: dict[int, Values] = {}  # z_i: trained and sent
    said: dict[int, int] = {}  # the degree that went with it
    degree: dict[int, int] = dict.fromkeys(range(topology.num_agents), 0)
    heard: dict[tuple[int, int], tuple[Values, int]] = {}  # what the receiver holds of the sender
    averages = []
    for round in range(1, rounds + 2):
        here = [i for i in range(topology.num_agents) if i not in absent.get(round, ())]
        for i in here:
            for j in topology.in_neighbors(i, round=1):
                if j in own and i in own and round - 1 not in deaf.get((i, j), ()):
                    heard[i, j] = own[j], said[j]
        fused = {}
        for i in here:
            if i not in own:
                fused[i] = initial
                continue
            inbox = {j: heard[i, j] for j in topology.in_neighbors(i, round=1) if (i, j) in heard}
            mine = max(degree[i], len(inbox))
            weights = {j: 1 / (1 + max(mine, d)) for j, (_, d) in inbox.items()}
            rest = 1 - sum(weights.values())
            fused[i] = {
                name: rest * x + sum(weights[j] * values[name] for j, (values, _) in inbox.items())
                for name, x in own[i].items()
            }
            degree[i] = len(inbox)
        averages.append([fused.get(i, {}) for i in range(topology.num_agents)])
        for i in here:
            own[i], said[i] = step(fused[i], i, round), degree[i]
    return averages[1:]


def told_losses(strategy: GossipStrategy) -> dict[tuple[int, int], float]:
    """What the app's evaluate function said: the sum of the average's weights, by round
    and agent.
    """
    return {(row["round"], row["agent"]): row["loss"] for row in strategy.monitor.rows}


def check_against(strategy: GossipStrategy, averages: list[list[Values]]) -> None:
    told = told_losses(strategy)
    assert told
    for (round, agent), loss in told.items():
        assert loss == pytest.approx(averages[round - 1][agent]["w"].sum(), rel=1e-12, abs=1e-12), (
            round,
            agent,
        )


# --- the same numbers as the loop ---


@pytest.mark.parametrize(
    "topology",
    [
        Topology.ring(5),
        Topology.complete(4),
        Topology.from_edges([(0, 1), (1, 2), (1, 3), (3, 4)], num_agents=5),
    ],
    ids=["ring", "complete", "tree"],
)
def test_a_numpy_app_averages_as_the_loop_does(topology: Topology) -> None:
    strategy = run(Nodes(numpy_app(), topology.num_agents), topology)
    assert len(told_losses(strategy)) == 5 * topology.num_agents
    check_against(strategy, oracle(topology, 5))
    assert strategy.monitor.train_loss == {round: float(round) for round in range(1, 6)}


def test_equal_degrees_give_the_plain_mean_of_the_neighborhood() -> None:
    z = [local_step(INITIAL, i, 1)["w"] for i in range(4)]
    strategy = run(Nodes(numpy_app(), 4), rounds=1)
    for (_, agent), loss in told_losses(strategy).items():
        assert loss == pytest.approx(
            np.mean([z[agent - 1], z[agent], z[(agent + 1) % 4]], axis=0).sum(), rel=1e-12
        )


def test_a_node_that_misses_a_round_counts_with_its_last_arrays() -> None:
    grid = Nodes(numpy_app(), 4)
    before = {3: lambda: grid.unavailable.add(1002), 4: lambda: grid.unavailable.discard(1002)}
    strategy = run(grid, before=before)
    check_against(strategy, oracle(Topology.ring(4), 5, absent={3: [2]}))
    assert (2, 2) not in told_losses(strategy)  # that of round 2 would have come in round 3


def test_a_late_joiner_begins_from_the_initial_arrays() -> None:
    grid = Nodes(numpy_app(), 4)
    grid.down.add(1003)
    strategy = run(grid, before={3: lambda: grid.down.discard(1003)}, min_agents=3)
    check_against(strategy, oracle(Topology.ring(4), 5, absent={1: [3], 2: [3]}))
    assert {agent for round, agent in told_losses(strategy) if round == 5} == {0, 1, 2, 3}


def test_a_resumed_run_goes_on_from_the_arrays_that_it_began_with(tmp_path: Path) -> None:
    """As with an app whose network is drawn anew at each start."""
    grid = Nodes(numpy_app(), 4)

    def stumble() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid, record=tmp_path, checkpoint_every=1, before={4: stumble})
    (path,) = tmp_path.glob("*-gossip")
    with pytest.raises(
        ConfigError, match=r"initial_arrays was .*'w'.* and is now \[\['b', '<f8', \[3\]\]\]"
    ):
        run(grid, initial={"b": np.zeros(3)}, resume=path)
    sent = len(grid.log)
    # this node has lost its state: it begins from the initial arrays
    grid.contexts[1002].state = RecordDict()
    strategy = run(grid, initial={name: -x for name, x in INITIAL.items()}, resume=path)
    assert strategy.record is not None
    assert [line["fresh"] for line in read_run(path).relay[3:]] == [[2], [], []]
    averages, told = oracle(Topology.ring(4), 5), told_losses(strategy)
    assert {agent for round, agent in told if round == 3} == {0, 1, 3}
    for agent in (0, 1, 3):  # the average of round 3 is taken in round 4, with the states of before
        assert told[3, agent] == pytest.approx(averages[2][agent]["w"].sum(), rel=1e-12)
    again = [m.content[keys.INITIAL] for m in grid.log[sent:] if keys.INITIAL in m.content]
    assert len(again) == 4
    for arrays in again:
        assert {name: array.numpy().tolist() for name, array in arrays.items()} == {
            name: x.tolist() for name, x in INITIAL.items()
        }


def test_a_neighbor_with_other_shapes_is_refused_and_the_agent_lives() -> None:
    grid = Nodes(numpy_app(), 4)

    def another_models(message: Message) -> Message:
        """In round 3 agent 0 is handed a frame of agent 1 that belongs to another
        model.
        """
        order = message.content["order"]
        if message.metadata.dst_node_id == 1000 and order[keys.ROUND] == 3:
            layout = ArrayLayout.of(INITIAL)
            frame = encode_frame(
                {"w": torch.zeros(7)}, sender=1, round=2, fingerprint=layout.fingerprint
            )
            message.content["frames"]["1/0"] = Array(np.frombuffer(frame, np.uint8))
        return message

    grid.tamper = another_models
    strategy = run(grid)
    refused = [
        reply.content["agent"]["refused"]
        for reply in grid.answers
        if not reply.has_error() and "refused" in reply.content["agent"]
    ]
    assert len(refused) == 1
    assert "ForeignFrameError, frame of agent 1" in refused[0][0]
    check_against(strategy, oracle(Topology.ring(4), 5, deaf={(0, 1): [2]}))


def test_simulate_gives_the_same_bits_as_flower() -> None:
    layout = ArrayLayout.of(INITIAL)

    def agent(index: int) -> NeighborAverageAgent:
        return NeighborAverageAgent(
            index,
            layout,
            lambda arrays, round: (
                local_step(arrays, index, round),
                {"train-loss": float(round), "num-examples": 10},
            ),
            lambda arrays: {"accuracy": 0.5, "loss": float(arrays["w"].sum()), "num-examples": 4},
            initial=INITIAL,
        )

    result = simulate(
        [agent(i) for i in range(4)], Topology.ring(4), num_rounds=4, evaluate_every=1
    )
    strategy = run(Nodes(numpy_app(), 4), rounds=4)
    assert {(row["round"], row["agent"]): row["loss"] for row in result.rows} == told_losses(
        strategy
    )
    assert [row["sent_bytes"] for row in result.rows] == [
        row["sent_bytes"] for row in strategy.monitor.rows
    ]


# --- types ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_any_size_come_back_as_they_are(dtype: type) -> None:
    seen: list[str] = []
    initial = {
        "w": np.array([[1.0, -2.0, 1 / 3]], dtype),
        "b": np.array(0.5, dtype),
        "none": np.zeros((0, 2), dtype),
    }

    def note(content: RecordDict, context: Context) -> RecordDict:
        arrays = {n: a.numpy().astype(dtype) for n, a in content["arrays"].items()}
        seen.extend(str(a.dtype) for a in arrays.values())
        return RecordDict({"arrays": record(arrays), "metrics": content["metrics"]})

    def step(values: Values, agent: int, round: int) -> Values:
        return {name: x.astype(dtype) for name, x in local_step(values, agent, round).items()}

    strategy = run(Nodes(numpy_app(answer=note), 3), initial=initial, rounds=3)
    assert set(seen) == {np.dtype(dtype).name}
    expected = oracle(Topology.ring(3), 3, initial=initial, step=step)
    tolerance = {np.float16: 5e-3, np.float32: 1e-6, np.float64: 1e-14}[dtype]
    for (round, agent), loss in told_losses(strategy).items():
        assert loss == pytest.approx(
            float(expected[round - 1][agent]["w"].sum()), abs=tolerance * 10
        )


@pytest.mark.parametrize(
    "value",
    [np.nextafter(1.0, 2.0), 1e300, -1e-310, np.float64(np.pi)],
    ids=lambda value: repr(float(value)),
)
def test_a_float64_travels_bit_for_bit(value: float) -> None:
    layout = ArrayLayout.of({"w": np.array([value])})
    ends = [
        NeighborAverageAgent(
            i,
            layout,
            lambda arrays, round: (arrays, {}),
            lambda arrays: {},
            initial={"w": np.array([value])},
        )
        for i in range(2)
    ]
    got: list[NDArray[Any]] = []
    ends[1]._train_fn = lambda arrays, round: (got.append(arrays["w"]) or arrays, {})  # type: ignore[func-returns-value]
    simulate(ends, Topology.ring(2), num_rounds=2)
    assert got[1].tobytes() == np.array([value]).tobytes()  # the mean of two equal numbers


def test_integers_stay_the_agents_own() -> None:
    initial = {**INITIAL, "count": np.array([3, 4]), "on": np.array(True)}

    def count(content: RecordDict, context: Context) -> RecordDict:
        arrays = {n: a.numpy() for n, a in content["arrays"].items()}
        arrays["count"] = np.array([3, 4]) + context.node_config["partition-id"]
        arrays["on"] = np.array(context.node_config["partition-id"] == 1)
        return RecordDict({"arrays": record(arrays), "metrics": content["metrics"]})

    met: dict[int, list[Any]] = {}

    def watch(msg: Message, context: Context, call_next: Any) -> Message:
        arrays = msg.content["arrays"]
        met.setdefault(context.node_config["partition-id"], []).append(
            [arrays[name].numpy().tolist() for name in ("count", "on")]
        )
        return call_next(msg, context)

    grid = Nodes(numpy_app([neighbor_average_mod, watch], answer=count), 3)
    strategy = run(grid, initial=initial, rounds=2, evaluate_every=2)
    assert {agent: calls[1] for agent, calls in met.items()} == {
        i: [[3 + i, 4 + i], i == 1] for i in range(3)
    }
    assert strategy.roster.facts(0)["parameters"]["own"] == ["count", "on"]
    assert strategy.roster.facts(0)["num-weights"] == 4


def test_a_type_that_holds_all_values_is_widened_and_no_other() -> None:
    layout = ArrayLayout.of({"w": np.zeros(2)})
    assert layout.take({"w": np.ones(2, np.float32)})["w"].dtype == np.float64
    with pytest.raises(
        AnswerError, match=r"'w' was float32 \(2,\) and came back as float64 \(2,\)"
    ):
        ArrayLayout.of({"w": np.zeros(2, np.float32)}).take({"w": np.ones(2)})


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({"n": np.array([1])}, "the app has none; its initial arrays are 'n'"),
        ({"w": np.zeros(2), "text": np.array(["a"])}, "'text' is <U1"),
        ({"w": np.zeros(2, ">f8")}, "byte order of this machine; 'w' is >f8"),
        ({"w": np.zeros(2, np.complex64)}, "'w' is complex64"),
    ],
)
def test_arrays_that_cannot_be_averaged_are_refused(initial: Values, message: str) -> None:
    with pytest.raises(RosterError, match=message):
        run(Nodes(numpy_app(), 3), initial=initial)


# --- what an app may do wrong ---


def renamed(content: RecordDict, context: Context) -> RecordDict:
    arrays = {f"{name}_": array for name, array in content["arrays"].items()}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})


def reshaped(content: RecordDict, context: Context) -> RecordDict:
    return RecordDict(
        {"arrays": record({**INITIAL, "w": np.zeros(3)}), "metrics": content["metrics"]}
    )


def doubled(content: RecordDict, context: Context) -> RecordDict:
    return RecordDict(
        {"arrays": content["arrays"], "more": content["arrays"], "metrics": content["metrics"]}
    )


def unmeasured(content: RecordDict, context: Context) -> RecordDict:
    return RecordDict({"arrays": content["arrays"]})


def diverged(content: RecordDict, context: Context) -> RecordDict:
    return RecordDict(
        {"arrays": record({**INITIAL, "b": np.array(np.nan)}), "metrics": content["metrics"]}
    )


def broken(content: RecordDict, context: Context) -> RecordDict:
    raise KeyError("learning-rate")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (renamed, "got 'w', 'b', returned 'w_', 'b_'"),
        (reshaped, r"'w' was float64 \(1, 3\) and came back as float64 \(3,\)"),
        (doubled, r"must return one ArrayRecord, as for FedAvg; it returned 2"),
        (unmeasured, r"must return one MetricRecord, as for FedAvg; it returned 0 \(arrays\)"),
        (diverged, "not finite in b"),
        (broken, "KeyError: 'learning-rate'"),
    ],
)
def test_an_app_that_fails_says_why_and_the_others_go_on(
    answer: Callable[[RecordDict, Context], RecordDict], message: str, tmp_path: Path
) -> None:
    rounds: list[int] = []

    def spoil(content: RecordDict, context: Context) -> RecordDict:
        if context.node_config["partition-id"] == 1:
            rounds.append(1)
            if len(rounds) == 2:
                return answer(content, context)
        return content

    strategy = run(Nodes(numpy_app(answer=spoil), 3), record=tmp_path / "runs", rounds=4)
    assert strategy.record is not None
    told = read_run(strategy.record.path)
    failed = {line["round"]: line["failed"] for line in told.relay if line["failed"]}
    assert list(failed) == [2]
    assert list(failed[2]) == ["agent 1"]
    assert re.search(message, failed[2]["agent 1"])
    assert "agent 1" in failed[2]["agent 1"]
    check_against(strategy, oracle(Topology.ring(3), 4, absent={2: [1]}))


def test_without_initial_arrays_round_1_says_what_is_missing() -> None:
    with pytest.raises(
        RosterError, match=r"Pass them as to FedAvg: strategy.start\(grid=grid, initial_arrays="
    ):
        run(Nodes(numpy_app(), 3), initial={})


def test_agents_must_begin_from_the_same_arrays() -> None:
    one, other = ArrayLayout.of(INITIAL), ArrayLayout.of({**INITIAL, "b": np.array(0.25)})
    assert one.fingerprint != other.fingerprint
    assert ArrayLayout.from_json(one.to_json()) == one


def test_under_another_strategy_the_mod_refuses() -> None:
    grid = InProcessGrid(numpy_app(), 2)
    FedAvg(min_train_nodes=2).start(grid, record(INITIAL), num_rounds=1)
    context = grid.contexts[1000]
    message = Message(RecordDict({"arrays": record(INITIAL)}), 1000, "train")
    with pytest.raises(
        ConfigError, match=r"takes messages of GossipStrategy; this one holds arrays"
    ):
        grid.app(message, context)


def test_an_app_of_its_own_is_no_stack() -> None:
    grid = InProcessGrid(numpy_app(), 1)
    context = grid.contexts[1000]
    context.run_config["engine"] = "batched"
    message = Message(RecordDict({"arrays": record(INITIAL)}), 1000, "train")
    with pytest.raises(ConfigError, match='engine = "batched" stacks agents of make_client_app'):
        grid.app(message, context)


def test_an_app_of_make_client_app_needs_no_mod() -> None:
    grid = Nodes(make_client_app(model_fn, data_fn, mods=[neighbor_average_mod]), 2)
    with pytest.raises(RosterError, match="exchanges with its neighbors by itself"):
        run(grid)


def test_an_app_of_make_client_app_reads_no_initial_arrays() -> None:
    """Or weights that the server was given would be left out without a word."""
    grid = Nodes(make_client_app(model_fn, data_fn), 2)
    with pytest.raises(RosterError, match=r"read no initial arrays; the server sent 2\. Leave"):
        run(grid)


# --- what is the app's own ---


# names that mean something else to agents of this package
OF_THE_APP = {
    **{"device": "gpu", "threads": "many", "engine": "v8", "worker": 4, "worker-idle": "no"},
    **{"decisions": "yes", "tell-classes": 3, "seed": "today", "algorithm": "resnet"},
}


def test_the_apps_state_configuration_and_messages_are_left_alone() -> None:
    app = ClientApp(mods=[neighbor_average_mod])
    seen: list[tuple[str, int, dict[str, Any]]] = []

    def called(kind: str, msg: Message, context: Context) -> None:
        counter = context.state.config_records.setdefault("counter", ConfigRecord({"calls": 0}))
        counter["calls"] = int(counter["calls"]) + 1  # type: ignore[call-overload]
        assert msg.metadata.message_type == kind
        assert list(msg.content) == ["arrays", "config"]
        assert context.run_config == OF_THE_APP
        seen.append((kind, counter["calls"], dict(msg.content["config"])))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        called("train", msg, context)
        return Message(
            RecordDict({"a": msg.content["arrays"], "m": MetricRecord({"num-examples": 1})}),
            reply_to=msg,
        )

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        called("evaluate", msg, context)
        return Message(RecordDict({"m": MetricRecord({"acc": 1, "num-examples": 1})}), reply_to=msg)

    @app.query("hello")
    def hello(msg: Message, context: Context) -> Message:
        return Message(RecordDict({"said": ConfigRecord({"text": "hello"})}), reply_to=msg)

    @app.train("warm_up")
    def warm_up(msg: Message, context: Context) -> Message:
        return Message(msg.content, reply_to=msg)

    grid = Nodes(app, 2, OF_THE_APP)
    configs = {
        "train_config": ConfigRecord({"lr": 0.1}),
        "evaluate_config": ConfigRecord({"batch": 7}),
    }
    threads = torch.get_num_threads()
    strategy = run(grid, Topology.complete(2), rounds=2, configs=configs)
    assert torch.get_num_threads() == threads
    mine = [entry for entry in seen if entry is not None][::2]  # of agent 0: the two take turns
    assert [kind for kind, _, _ in seen].count("evaluate") == 4
    assert [calls for kind, calls, _ in seen if kind == "train"][:2] == [1, 1]
    assert {"server-round": 1, "lr": 0.1} in [config for kind, _, config in mine]
    assert {"server-round": 2, "batch": 7} in [
        config for kind, _, config in seen if kind == "evaluate"
    ]
    assert {row["accuracy"] for row in strategy.monitor.rows} == {1.0}
    assert all(np.isnan(row["loss"]) for row in strategy.monitor.rows)
    for node, context in grid.contexts.items():
        assert set(context.state) - {"mcepl-state"} == {"counter"}
        assert context.state["counter"]["calls"] == 4, node
    hello_there = Message(RecordDict(), 1000, "query.hello")
    assert app(hello_there, grid.contexts[1000]).content["said"]["text"] == "hello"
    warmth = Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1000, "train.warm_up")
    assert app(warmth, grid.contexts[1000]).content["x"]["y"] == 1


def test_the_relays_question_never_reaches_the_apps_own_query_function() -> None:
    app = numpy_app()

    @app.query()
    def health(msg: Message, context: Context) -> Message:
        assert keys.IDENTIFY not in msg.content
        return Message(RecordDict({"health": ConfigRecord({"good": True})}), reply_to=msg)

    grid = Nodes(app, 3)
    question = Message(RecordDict({keys.IDENTIFY: ConfigRecord()}), 1001, "query")
    assert app(question, grid.contexts[1001]).content.config_records[keys.AGENT]["agent"] == 1
    own = Message(RecordDict(), 1001, "query")
    assert app(own, grid.contexts[1001]).content.config_records["health"]["good"] is True


def test_an_app_without_an_evaluate_function_is_not_evaluated() -> None:
    app = ClientApp(mods=[neighbor_average_mod])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": msg.content["arrays"], "metrics": metrics}), reply_to=msg
        )

    strategy = run(Nodes(app, 3), rounds=3)
    assert strategy.monitor.rows == []


def test_a_model_without_accuracy_is_trained_all_the_same() -> None:
    strategy = run(Nodes(numpy_app([NeighborAverageMod(evaluate=False)]), 3), rounds=2)
    assert strategy.monitor.rows == []
    assert sorted(strategy.monitor.train_loss) == [1, 2]


def test_records_may_have_other_names() -> None:
    app = ClientApp(mods=[NeighborAverageMod(arrays="model", config="told", evaluate=False)])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        assert set(msg.content) == {"model", "told"}
        content = {"model": msg.content["model"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        raise AssertionError

    assert sorted(run(Nodes(app, 3), rounds=2).monitor.train_loss) == []


def test_what_metrics_are_called() -> None:
    told = read_evaluation(
        {"eval_acc": 0.5, "eval_loss": 1.5, "num-examples": 3}, accuracy=None, loss=None
    )
    assert told == {"accuracy": 0.5, "loss": 1.5, "num-examples": 3}
    sklearn = {
        "test_logloss": 0.3,
        "accuracy": 0.9,
        "precision": 0.1,
        "recall": 0.2,
        "num-examples": 7,
    }
    assert read_evaluation(sklearn, accuracy=None, loss=None) == {
        "accuracy": 0.9,
        "loss": 0.3,
        "precision": 0.1,
        "recall": 0.2,
        "num-examples": 7,
    }
    assert (
        read_evaluation({"f1": 0.25, "num-examples": 1}, accuracy="f1", loss=None)["accuracy"]
        == 0.25
    )
    assert read_training({"train_loss": 2, "val_loss": 3, "num-examples": 5}) == {
        "train-loss": 2.0,
        "num-examples": 5,
    }
    assert read_training({"mse": 2.0}) == {}
    assert read_training({"loss": 1.0, "train_loss": 2.0}) == {"train-loss": 2.0}
    for count in (np.nan, np.inf, -1):  # no number of examples
        assert read_training({"num-examples": count}) == {}
    undefined = {"accuracy": np.nan, "loss": np.nan, "num-examples": 0}
    told = read_evaluation(undefined, accuracy=None, loss=None)
    assert told.keys() == {"loss", "num-examples"}
    # no number could be averaged with it
    assert [read_training({"loss": loss}) for loss in (np.nan, np.inf, -np.inf)] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("metrics", "names", "message"),
    [
        (
            {"mse": 1.0, "num-examples": 1},
            {},
            r"metrics are mse, num-examples. Say which .*evaluate=False",
        ),
        (
            {"acc": 0.5, "test_accuracy": 0.6, "num-examples": 1},
            {},
            "may be the accuracy: acc, test_accuracy",
        ),
        ({"acc": 87.5, "num-examples": 1}, {}, r"fraction in 0..1; the app's acc is 87.5"),
        ({"acc": 0.5}, {}, "need 'num-examples'"),
        (
            {"acc": 0.5, "num-examples": 1},
            {"accuracy": "f1"},
            "said to be 'f1'; the app's metrics are acc",
        ),
    ],
)
def test_metrics_that_cannot_be_read_are_told(
    metrics: dict[str, float], names: dict[str, str], message: str
) -> None:
    with pytest.raises(AnswerError, match=message):
        read_evaluation(metrics, **{"accuracy": None, "loss": None, **names})


# --- initial arrays ---


def test_initial_arrays_go_to_each_node_once_and_are_counted_apart() -> None:
    grid = Nodes(numpy_app(), 4)
    strategy = run(grid, rounds=3)
    got = [
        (m.metadata.dst_node_id, m.content["order"][keys.ROUND])
        for m in grid.log
        if keys.INITIAL in m.content
    ]
    assert got == [(1000 + i, 1) for i in range(4)]
    size = sum(len(array.data) for array in record(INITIAL).values())
    totals = strategy.exchange.ledger.totals()
    assert totals["initial_total"] == 4 * size
    frames = [a for m in grid.log for a in m.content["frames"].values()]
    assert totals["links_total"] == sum(a.numpy().size for a in frames)


def test_a_node_that_lost_its_state_begins_again_from_the_initial_arrays(
    states_elsewhere: Path,
) -> None:
    grid = Nodes(numpy_app(), 4)

    def lose() -> None:
        grid.contexts[1001].state = RecordDict()
        for path in states_elsewhere.rglob("*"):
            if path.is_file() and re.search(r"agent-0*1\b", str(path)):
                path.unlink()

    strategy = run(grid, rounds=6, before={3: lose})
    got = [m.content["order"][keys.ROUND] for m in grid.log if keys.INITIAL in m.content][4:]
    assert got == [4]  # in round 3 it said that it holds none
    answered = {(round, agent) for round, agent in told_losses(strategy)}
    assert (2, 1) not in answered
    assert (6, 1) in answered


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    whole = run(Nodes(numpy_app(), 4), rounds=5)
    grid = Nodes(numpy_app(), 4)
    options = {"record": tmp_path / "runs", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(grid, rounds=5, before={4: stop}, **options)
    (folder,) = (tmp_path / "runs").iterdir()
    resumed = run(grid, rounds=5, **options, resume=folder)
    assert told_losses(resumed) == told_losses(whole)


def test_too_few_nodes_are_named() -> None:
    grid = Nodes(numpy_app(), 4)
    grid.down.add(1002)
    with pytest.raises(RosterError, match="there are nodes of 3 agents; missing agents: 2"):
        run(grid)


def test_the_apps_lifespan_is_entered_around_each_of_its_functions() -> None:
    app, events = numpy_app(), []

    @app.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    run(Nodes(app, 1), Topology.from_edges([], num_agents=1), rounds=2, evaluate_every=1)
    assert events == ["enter", "leave", "enter", "enter", "leave", "leave", "enter", "leave"]


# --- mods and wrappers of Flower's ---


# Flower's clipping passes over 0-d arrays
FLAT = {"w": np.array([[1.0, -2.0, 3.0]]), "b": np.array([0.5])}


def moving(moved: list[float]) -> Any:
    """A mod that notes how far what comes after it moved the app's arrays."""

    def watch(msg: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(msg, context)
        if msg.metadata.message_type == "train":
            before, after = (
                np.concatenate([a.numpy().ravel() for a in content["arrays"].values()])
                for content in (msg.content, reply.content)
            )
            moved.append(float(np.linalg.norm(after - before)))
        return reply

    return watch


def test_flowers_clipping_works_inside() -> None:
    moved: list[float] = []
    mods = [neighbor_average_mod, arrays_size_mod, message_size_mod]
    app = numpy_app(mods, train_mods=[moving(moved), fixedclipping_mod])
    configs = {"train_config": ConfigRecord({"clipping_norm": 0.125})}
    strategy = run(Nodes(app, 3), rounds=3, configs=configs, initial=FLAT)
    assert len(moved) == 9
    assert max(moved) == pytest.approx(0.125)

    def clipped(values: Values, agent: int, round: int) -> Values:
        new = local_step(values, agent, round)
        move = {name: new[name] - values[name] for name in values}
        scale = min(1.0, 0.125 / np.sqrt(sum((m**2).sum() for m in move.values())))
        return {name: values[name] + scale * move[name] for name in values}

    check_against(strategy, oracle(Topology.ring(3), 3, initial=FLAT, step=clipped))


def test_flowers_local_dp_works_inside() -> None:
    moved: list[float] = []
    noisy = LocalDpMod(clipping_norm=0.125, sensitivity=1e-9, epsilon=1.0, delta=1e-5)
    run(Nodes(numpy_app(train_mods=[moving(moved), noisy]), 3), rounds=3, initial=FLAT)
    assert len(moved) == 9
    assert max(moved) == pytest.approx(0.125, rel=1e-5)


def test_an_inner_mods_error_reaches_the_server() -> None:
    """For all messages, as Flower's does not look at their type: an answer to evaluate
    holds no arrays.
    """
    app = numpy_app([neighbor_average_mod, LocalDpMod(1.0, 0.0, 1.0, 1e-5)])
    grid = Nodes(app, 3)
    run(grid, rounds=2)
    assert not any(reply.has_error() for reply in grid.answers)  # it costs the evaluation alone
    answers = [reply.content["agent"] for reply in grid.answers]
    reasons = [str(a["evaluation-error"]) for a in answers if "evaluation-error" in a]
    assert len(reasons) == 6
    assert all(
        "answered evaluate with error 6: LocalDpMod expects exactly one ArrayRecord" in r
        for r in reasons
    )


@pytest.mark.parametrize(
    "mod",
    [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)],
    ids=["fixed", "adaptive", "local"],
)
def test_mods_that_would_wedge_the_node_are_refused_outside(mod: Any) -> None:
    grid = Nodes(numpy_app([mod, neighbor_average_mod]), 3)
    configs = {"train_config": ConfigRecord({"clipping_norm": 1.0})}
    with pytest.raises(RosterError) as error:
        run(grid, configs=configs)
    assert re.search(r"stands before neighbor_average_mod|expects exactly one", str(error.value))


def test_a_strategy_wrapper_has_no_aggregate_to_work_on() -> None:
    grid = Nodes(numpy_app(), 3)
    wrapped = DifferentialPrivacyServerSideFixedClipping(
        GossipStrategy(Topology.ring(3), record=None), 1.0, 1.0, 3
    )
    with pytest.raises(ConfigError, match="nothing is aggregated"):
        wrapped.start(grid, initial_arrays=record(INITIAL), num_rounds=1)
    assert grid.log == []


# --- PyTorch and scikit-learn ---


def test_a_pytorch_app_with_batch_norm() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    app = ClientApp(mods=[neighbor_average_mod])

    def batch(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        x = torch.randn(64, 3, generator=generator)
        return x, (x[:, 0] > 0).long()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
        x, y = batch(context)
        for _ in range(1 + context.node_config["partition-id"]):
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            for parameter in model.parameters():  # the first of torch's optimizers takes seconds
                parameter.data.sub_(parameter.grad, alpha=0.5)
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(x)})
        return Message(
            RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}),
            reply_to=msg,
        )

    counters = []

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
        counters.append((context.node_config["partition-id"], int(model[1].num_batches_tracked)))
        x, y = batch(context)
        accuracy = (model.eval()(x).argmax(1) == y).float().mean().item()
        return Message(
            RecordDict({"m": MetricRecord({"eval_acc": accuracy, "num-examples": len(x)})}),
            reply_to=msg,
        )

    torch.manual_seed(0)
    initial = {name: tensor.numpy() for name, tensor in net().state_dict().items()}
    strategy = run(Nodes(app, 4), initial=initial, rounds=12, evaluate_every=12)
    assert min(row["accuracy"] for row in strategy.monitor.rows) > 0.85
    assert sorted(counters) == [(i, 12 * (1 + i)) for i in range(4)]


@pytest.mark.slow
def test_a_scikit_learn_app() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.datasets import load_digits

    digits = load_digits()
    app = ClientApp(mods=[neighbor_average_mod])

    def partition(context: Context) -> tuple[Any, Any]:
        mine = np.flatnonzero(
            np.arange(len(digits.target)) % 4 == context.node_config["partition-id"]
        )
        return digits.data[mine] / 16, digits.target[mine]

    def model(arrays: ArrayRecord) -> Any:
        found = sklearn.LogisticRegression(max_iter=5, warm_start=True)
        found.classes_ = np.arange(10)
        found.coef_, found.intercept_ = arrays.to_numpy_ndarrays()
        return found

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        import warnings

        fitted = model(msg.content["arrays"])
        x, y = partition(context)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is not meant to converge in one round
            fitted.fit(x[:-60], y[:-60])
        content = {
            "arrays": ArrayRecord([fitted.coef_, fitted.intercept_]),
            "metrics": MetricRecord({"num-examples": len(x)}),
        }
        return Message(RecordDict(content), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        x, y = partition(context)
        accuracy = model(msg.content["arrays"]).score(x[-60:], y[-60:])
        metrics = MetricRecord({"accuracy": accuracy, "num-examples": 60})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    strategy = GossipStrategy(Topology.ring(4), evaluate_every=5, record=None)
    initial = ArrayRecord([np.zeros((10, 64)), np.zeros(10)])
    strategy.start(Nodes(app, 4), initial_arrays=initial, num_rounds=10)
    assert min(row["accuracy"] for row in strategy.monitor.rows if row["round"] == 10) > 0.8


# --- docs and example ---


def python_blocks(section: str) -> list[str]:
    text = (ROOT / "docs" / "existing-apps.md").read_text()
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", found, re.DOTALL)


@pytest.fixture
def apps() -> Iterator[None]:
    """The two apps of the example can be imported."""
    folders = [str(EXAMPLE / side) for side in ("fedavg", "gossip")]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)


CONFIG = {"num-server-rounds": 2, "local-epochs": 1, "learning-rate": 0.1, "batch-size": 32}


@pytest.mark.slow
@pytest.mark.usefixtures("apps")
def test_own_functions_train_a_masked_model_as_documented() -> None:
    from drop_in_fedavg.task import Net, load_data, test, train

    (code,) = python_blocks("Your functions, a masked model")
    names: dict[str, Any] = {"Net": Net, "load_data": load_data, "test": test, "train": train}
    exec(code, names)
    strategy = GossipStrategy(Topology.ring(4), evaluate_every=4, record=None)
    strategy.start(Nodes(names["app"], 4), num_rounds=4)
    losses = strategy.monitor.train_loss
    assert losses[4] < losses[1]
    assert {row["density"] for row in strategy.monitor.rows} != {1.0}
    assert strategy.exchange.ledger.totals()["link_bits_per_weight"] < 1.1


def test_own_functions_must_leave_a_gradient() -> None:
    from flower_mcepl import AgentData, MceplConfig, shared_module
    from flower_mcepl.agents import OwnLoopAgent

    data = AgentData.of(
        (torch.zeros(4, 2), torch.zeros(4).long()),
        (torch.zeros(2, 2), torch.zeros(2).long()),
        agent=0,
    )
    module = shared_module(lambda: nn.Linear(2, 2), seed=1)
    agent = OwnLoopAgent(
        0,
        module,
        data,
        MceplConfig(retention=0.5),
        train_fn=lambda m, r: 0.0,
        evaluate_fn=lambda m: {},
        seed=1,
    )
    with pytest.raises(ConfigError, match=r"left none on the scores"):
        agent.train(round=1)
    with pytest.raises(ConfigError, match="loss, num-examples is missing from nothing"):
        agent.evaluate()


def test_a_numpy_client_moves_over_as_documented() -> None:
    code, _ = python_blocks("Apps of the older API")

    class Client:  # the two methods of flwr.client.NumPyClient that count
        def __init__(self, index: int) -> None:
            self.index = index

        def fit(
            self, parameters: list[NDArray[Any]], config: dict[str, Any]
        ) -> tuple[Any, int, dict[str, Any]]:
            values = dict(zip(INITIAL, parameters, strict=True))
            new = local_step(values, self.index, config["server-round"])
            return [np.asarray(x) for x in new.values()], 10, {}

        def evaluate(
            self, parameters: list[NDArray[Any]], config: dict[str, Any]
        ) -> tuple[float, int, dict[str, Any]]:
            return float(parameters[0].sum()), 4, {"accuracy": 0.5}

    names: dict[str, Any] = {
        "make_client": lambda context: Client(context.node_config["partition-id"])
    }
    exec(code, names)
    strategy = GossipStrategy(Topology.ring(4), evaluate_every=1, record=None)
    strategy.start(
        Nodes(names["app"], 4), initial_arrays=ArrayRecord(list(INITIAL.values())), num_rounds=3
    )
    check_against(strategy, oracle(Topology.ring(4), 3))


def test_the_mods_line_in_the_docs_clips_and_adds_noise() -> None:
    (code,) = python_blocks("Flower's mods and strategy wrappers")
    begins: list[NDArray[Any]] = []  # what the agent, which is alone, trains from

    def train(msg: Message) -> Message:
        arrays = {name: array.numpy() for name, array in msg.content["arrays"].items()}
        begins.append(np.concatenate([array.ravel() for array in arrays.values()]))
        new = record({name: array + 10 for name, array in arrays.items()})  # a move of norm 20
        return Message(RecordDict({"a": new, "m": MetricRecord({"num-examples": 1})}), reply_to=msg)

    names: dict[str, Any] = {"ClientApp": ClientApp, "LocalDpMod": LocalDpMod, "step": train}
    names["neighbor_average_mod"] = neighbor_average_mod
    whole = code.replace(
        "def train(msg, context): ...", "def train(msg, context): return step(msg)"
    )
    assert whole != code
    quiet = whole.replace("epsilon=0.9", "epsilon=200.0")  # noise of a deviation of 0.05 a number
    assert quiet != whole
    moves = []
    for text in (quiet, whole, whole):
        begins.clear()
        exec(text, names)
        run(Nodes(names["app"], 1), Topology.from_edges([], num_agents=1), rounds=2, initial=FLAT)
        moves.append(float(np.linalg.norm(begins[1] - begins[0])))
    assert 0.5 < moves[0] < 1.5  # clipped to 1
    assert moves[0] != pytest.approx(1.0, abs=1e-7)
    assert moves[1] != moves[2]  # which the run's seed does not give


def shown_diff(page: Path) -> dict[str, list[str]]:
    """Hunk lines by file name, of the one diff on a page."""
    (text,) = re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL)
    files = re.split(r"--- \S+\n\+\+\+ \S+/(\S+)\n", text)
    return {name: hunks.splitlines() for name, hunks in zip(files[1::2], files[2::2], strict=True)}


def patched(text: str, lines: Sequence[str]) -> str:
    """Text with the hunks applied; each must fit in exactly one place."""
    hunks = "\n".join(lines).split("\n@@")
    for hunk in hunks:
        body = hunk.splitlines()[1:]
        before, after = (
            "".join(f"{line[1:]}\n" for line in body if line[:1] in sides)
            for sides in (("", " ", "-"), ("", " ", "+"))
        )
        assert text.count(before) == 1, hunk
        text = text.replace(before, after)
    return text


@pytest.mark.parametrize("page", [EXAMPLE / "README.md", ROOT / "docs" / "existing-apps.md"])
def test_the_diff_that_is_shown_makes_one_app_of_the_other(page: Path) -> None:
    diff = shown_diff(page)
    before, after = (EXAMPLE / side / f"drop_in_{side}" for side in SIDES)
    files = {path.name for path in (*before.glob("*.py"), *after.glob("*.py"))}
    for name in files:
        text = (before / name).read_text()
        if name in diff:
            text = patched(text, diff[name])
        assert text == (after / name).read_text(), name
    assert set(diff) == {"client_app.py", "server_app.py"}
    settings = {
        (EXAMPLE / s / "pyproject.toml").read_text().partition("[tool.flwr.app.config]")[2]
        for s in SIDES
    }
    assert len(settings) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("apps")
def test_both_apps_of_the_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import drop_in_fedavg.client_app
    import drop_in_fedavg.server_app
    import drop_in_gossip.client_app
    import drop_in_gossip.server_app

    for client, server in (
        (drop_in_fedavg.client_app, drop_in_fedavg.server_app),
        (drop_in_gossip.client_app, drop_in_gossip.server_app),
    ):
        grid = Nodes(client.app, 10, CONFIG)
        context = Context(1, 0, {}, RecordDict(), CONFIG)
        server.main(grid, context)
        assert not [reply for reply in grid.answers if reply.has_error()]
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(read_run(folder).rounds) == 10


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_both_apps_of_the_example_run_on_flower(side: str, tmp_path: Path) -> None:
    from flower_mcepl.launch import run_app

    outcome = run_app(
        EXAMPLE / side,
        run_config={"num-server-rounds": 3},
        num_supernodes=10,
        federation_config="init-args-num-cpus=2 client-resources-num-cpus=1",
        timeout=600,
    )
    assert outcome.status == "finished:completed", outcome.log[-3000:]
    assert ("accuracy after round 3" if side == "gossip" else "eval_acc") in outcome.log
