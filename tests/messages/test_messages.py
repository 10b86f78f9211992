"""What relay and agents say: the same bytes as ever, read back as they were written,
and nothing believed unchecked.
"""

import copy
import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flower_mcepl import AnswerError, ConfigError
from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.errors import visible
from flower_mcepl.exchange.parcels import Answer, Parcel, Posted
from flower_mcepl.messages import answer as answers
from flower_mcepl.messages.identity import identity, is_question, question, read_identity
from flower_mcepl.messages.limits import LIMITS, is_setting
from flower_mcepl.messages.order import AppInput, Order, is_order
from tests.fleet.message_runs import FILE, as_sent, content_of, record_messages
from tests.messages.test_envelope import npy

PACKAGE = Path(__file__).parents[2] / "flower_mcepl"


@dataclass(frozen=True)
class Carrier:
    """Stands for Flower's `Array`."""

    data: bytes


# --- the bytes on the wire ---


@pytest.fixture(scope="module")
def recorded() -> dict:
    """Orders and answers of scripted runs, recorded by `message_runs` before `Order`
    was a class.
    """
    return json.loads(FILE.read_text(encoding="utf-8"))


def recorded_contents(recorded: dict, side: str) -> list[Any]:
    listings = [message[side] for run in recorded["messages"].values() for message in run]
    return [content_of(listing) for listing in listings]


def test_the_messages_of_whole_runs_are_those_recorded(recorded: dict) -> None:
    """Kinds, names, order of the keys, types and values; as text, since a loss may be
    not a number.
    """
    now = record_messages()
    for name, messages in recorded["messages"].items():
        for mine, then in zip(now["messages"][name], messages, strict=True):
            assert json.dumps(mine) == json.dumps(then)
    # ages came later, for runs without a barrier
    assert all(parcel.pop("ages") is None for parcel in now["parcels"])
    assert now["parcels"] == recorded["parcels"]


def test_recorded_orders_are_read_and_written_byte_for_byte(recorded: dict) -> None:
    contents = recorded_contents(recorded, "order")
    orders = [content for content in contents if is_order(content)]
    for content in orders:
        records = Order.from_records(content).to_records(ArrayRecord, ConfigRecord)
        assert as_sent(RecordDict(records)) == as_sent(content)
    questions = [content for content in contents if is_question(content)]
    assert [as_sent(content) for content in questions] == [
        as_sent(RecordDict(question(ConfigRecord)))
    ] * 3
    assert len(orders) + len(questions) == len(contents) > 20


def test_recorded_answers_are_read_and_written_byte_for_byte(recorded: dict) -> None:
    contents = recorded_contents(recorded, "answer")
    identities = [content for content in contents if "metrics" not in content]
    assert [read_identity(content) for content in identities] == [0, 1, 2]
    for agent, content in enumerate(identities):
        assert as_sent(content) == as_sent(RecordDict(identity(agent, ConfigRecord)))
    for content in contents:
        if content not in identities:
            answer = answers.from_records(content)
            records = answers.to_records(answer, ArrayRecord, ConfigRecord, MetricRecord)
            assert as_sent(RecordDict(records)) == as_sent(content)


def test_nobody_else_touches_a_key_of_a_record() -> None:
    def names_keys(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        return "messages import keys" in text or "messages.keys import" in text

    rooms = {path.parent.name for path in PACKAGE.rglob("*.py") if names_keys(path)}
    assert rooms == {"messages"}


# --- orders and answers of all kinds ---

text = st.text(max_size=12)
numbers = st.integers(0, LIMITS.agent)
rounds = st.integers(0, LIMITS.round)
finite = st.floats(-1e100, 1e100)
int64 = st.integers(-(2**63), 2**63 - 1)
hex16 = st.text("0123456789abcdef", min_size=16, max_size=16)
agents = st.lists(numbers, max_size=4, unique=True)
carriers = st.binary(max_size=6).map(Carrier)


def lists_of(*kinds: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(*kinds, *(st.lists(kind, max_size=3) for kind in kinds))


settings = st.dictionaries(
    text, lists_of(int64, st.floats(allow_nan=False), text, st.binary(max_size=5), st.booleans())
)
layouts = st.builds(
    ArrayLayout,
    st.dictionaries(
        text,
        st.tuples(
            st.sampled_from([np.dtype(t).str for t in ("f4", "f8", "i8", "?", "M8[ns]", "U3")]),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
        ),
        max_size=3,
    ),
    text,
)
app_inputs = st.builds(
    AppInput,
    layout=layouts,
    arrays=st.none() | st.dictionaries(text, carriers, max_size=3),
    train_config=settings,
    evaluate_config=settings,
)


kept_counts = st.integers(1, 3).flatmap(
    lambda layers: st.dictionaries(
        numbers, st.tuples(*[st.integers(0, 2**60)] * layers), max_size=3
    )
)


@st.composite
def orders(draw: Any) -> Order[Carrier]:
    parcel = Parcel(
        draw(st.integers(1, LIMITS.round)),
        draw(st.none() | agents.map(tuple)),
        draw(st.dictionaries(numbers, st.lists(carriers, min_size=1, max_size=3), max_size=3)),
        *(draw(st.booleans()) for _ in range(2)),
        draw(st.none() | rounds),
        draw(st.booleans()),
        draw(kept_counts),
        draw(st.none() | st.dictionaries(numbers, rounds, min_size=1, max_size=3)),
    )
    return Order(
        parcel=parcel,
        run=draw(hex16),
        max_staleness=draw(rounds),
        introduce=draw(st.booleans()),
        age_decay=draw(st.floats(0.0, 1.0, exclude_min=True)),
        checkpoints=tuple(draw(st.lists(rounds, max_size=3))),
        keep_best=draw(st.booleans()),
        store=draw(st.booleans()),
        state=draw(st.none() | carriers),
        config=draw(settings),
        app=draw(st.none() | app_inputs),
    )


# control characters of an agent's texts are spelled out, see below
printable = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | int64 | finite | printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=6,
)
handshakes = st.fixed_dictionaries(
    {"fingerprint": printable, "parameters": st.dictionaries(printable, json_values, max_size=3)},
    optional={
        "num-weights": st.integers(0, 10**15),
        "classes": printable,
        "a-fact": lists_of(int64, finite, printable, st.booleans()),
    },
)
evaluations = st.fixed_dictionaries(
    {
        "accuracy": st.floats(0, 1),
        "loss": finite | st.just(math.nan),
        "num-examples": st.integers(0, 10**15),
        "density": st.floats(0, 1),
    }
)
trainings = st.fixed_dictionaries(
    {}, optional={"train-loss": finite, "seconds": st.floats(0, 1e9), "own": int64 | finite}
)


@st.composite
def some_answers(draw: Any) -> Answer[Carrier]:
    posts, raw = [], draw(st.lists(st.binary(max_size=20), max_size=2))
    for frame in raw:
        carrier = Carrier(npy(np.frombuffer(frame, np.uint8)))
        headers = draw(st.integers(0, len(frame)))
        posts.append(Posted(carrier, len(frame), headers, draw(st.none() | rounds)))
    introduces = draw(st.booleans())
    return Answer(
        facts={"agent": draw(numbers), **(draw(handshakes) if introduces else {})},
        metrics={**draw(st.just({}) | evaluations), **draw(trainings)},
        posts=tuple(posts),
        content=draw(hex16) if posts else None,
        held=draw(st.dictionaries(numbers, rounds, max_size=3)),
        refused=tuple(draw(st.lists(printable, max_size=3))),
        lacking=tuple(draw(agents)),
        fresh=draw(st.booleans()),
        raw=tuple(raw),
        introduces=introduces,
    )


# Compared as texts: they show the order of keys, the types of numbers, and a loss that
# is not a number as equal to itself.


@given(orders())
def test_an_order_is_read_as_it_was_written(order: Order[Carrier]) -> None:
    records = order.to_records()
    assert repr(Order.from_records(copy.deepcopy(records))) == repr(order)


@given(some_answers())
def test_an_answer_is_read_as_it_was_written(answer: Answer[Carrier]) -> None:
    records = answers.to_records(answer)
    assert repr(answers.from_records(copy.deepcopy(records))) == repr(answer)


HOSTILE = "ok\x1b]52;c;cm0gLXJm\x07\r\nINFO : forged\x9b2J\u202eabc\u2028x\x00"


def test_control_characters_of_an_answer_are_spelled_out() -> None:
    answer = Answer(
        facts={
            "agent": 3,
            "fingerprint": HOSTILE,
            "classes": [HOSTILE, "é 数"],
            "parameters": {HOSTILE: [HOSTILE, {"a": HOSTILE}]},
        },
        metrics={},
        refused=[HOSTILE],
        introduces=True,
        evaluation_error=HOSTILE,
    )
    came = answers.from_records(answers.to_records(answer))
    spelled = visible(HOSTILE)
    assert spelled == (r"ok\x1b]52;c;cm0gLXJm\x07\r\nINFO : forged\x9b2J\u202eabc\u2028x\x00")
    assert came.facts == {
        "agent": 3,
        "fingerprint": spelled,
        "classes": [spelled, "é 数"],
        "parameters": {spelled: [spelled, {"a": spelled}]},
    }
    assert came.refused == (spelled,)
    # an exception's text may have several lines; only the first is ever logged
    assert came.evaluation_error == spelled.replace(r"\n", "\n")
    with pytest.raises(AnswerError, match=r"names in agent must be texts .* printable ones"):
        answers.from_records(answers.to_records(replace(answer, facts={**answer.facts, "a\nb": 1})))


@given(st.text())
def test_visible_text_is_printable(text: str) -> None:
    spelled = visible(text)
    assert all(unicodedata.category(char)[0] != "C" for char in spelled)
    assert len(spelled.splitlines()) <= 1
    assert visible(spelled) == spelled


# --- whatever comes instead ---

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | text
    | st.binary(max_size=5)
    | carriers
    | st.sampled_from(["{", '{"a": NaN}', '{"a": 1e999}', "[]", "[" * 5000, '"\\ud800"', "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=4,
)


def mutate(draw: Any, records: dict[str, Any]) -> None:
    """Take away, replace, rename or add a record, or an entry of one, or of a list in
    one.
    """
    table: Any = records
    while True:
        if isinstance(table, list):
            places: list[Any] = [*range(len(table))]
        else:
            places = [*table]
        if not places:
            return
        place = draw(st.sampled_from(places))
        deeper = isinstance(table[place], dict | list) and table[place]
        action = draw(st.sampled_from(["enter"] * 3 * bool(deeper) + ["drop", "replace", "add"]))
        if action == "enter":
            table = table[place]
            continue
        if action == "drop":
            del table[place]
        elif action == "replace":
            table[place] = draw(junk)
        elif isinstance(table, list):
            table.append(draw(junk | st.just(table[place])))
        else:
            table[draw(text | st.sampled_from(NAMES))] = draw(junk | st.just(table[place]))
        return


NAMES = ["neighbors", "store", "layout", "0/1", "3/0", "lacking", "parameters", "loss", "frame"]


def read_or_refused(read: Callable[[Any], Any], records: Any, error: type[Exception]) -> Any:
    """What is read, or None where it is refused, in few words."""
    try:
        return read(records)
    except error as refusal:
        reason = str(refusal)
    assert len(reason) < 2000
    return None


@given(orders(), st.data(), st.integers(1, 3))
def test_a_mutated_order_is_refused_or_sound(
    order: Order[Carrier], data: Any, mutations: int
) -> None:
    records = copy.deepcopy(order.to_records())
    for _ in range(mutations):
        mutate(data.draw, records)
    found = read_or_refused(Order.from_records, records, ConfigError)
    if found is None:
        return
    assert repr(Order.from_records(found.to_records())) == repr(found)
    assert found.parcel.round >= 1
    assert all(is_setting(value, most=LIMITS.setting) for value in found.config.values())


@given(some_answers(), st.data(), st.integers(1, 3))
def test_a_mutated_answer_is_refused_or_sound(
    answer: Answer[Carrier], data: Any, mutations: int
) -> None:
    records = copy.deepcopy(answers.to_records(answer))
    for _ in range(mutations):
        mutate(data.draw, records)
    found = read_or_refused(answers.from_records, records, AnswerError)
    if found is None:
        return
    assert repr(answers.from_records(answers.to_records(found))) == repr(found)
    json.dumps(found.facts, allow_nan=False).encode()
    sound = {key: value for key, value in found.metrics.items() if key != "loss"}
    assert all(math.isfinite(value) for value in sound.values())
    assert 0 <= sound.get("accuracy", 0) <= 1


@given(some_answers(), junk)
def test_a_question_may_get_any_answer(answer: Answer[Carrier], value: Any) -> None:
    assert read_identity(identity(3)) == 3
    assert read_identity(answers.to_records(answer)) == answer.facts["agent"]
    number = read_identity({"agent": {"agent": value}})
    assert number is None or (number == value and type(value) is int)
    assert read_identity({"agent": {}}) is read_identity({}) is None


# --- every rule, by name ---


def an_order() -> dict[str, Any]:
    """Records of an order with everything in it."""
    parcel = Parcel(3, (1, 2), {1: [Carrier(b"a"), Carrier(b"b")]}, acknowledged=2)
    layout = ArrayLayout.of({"w": np.zeros(2)})
    app = AppInput(layout=layout, arrays={"w": Carrier(b"w")}, train_config={"lr": 0.1})
    order = Order(
        parcel=parcel,
        run="00c0ffee00c0ffee",
        max_staleness=5,
        introduce=True,
        checkpoints=(2,),
        keep_best=True,
        store=True,
        state=Carrier(b"state"),
        config={"note": "hello"},
        app=app,
    )
    return copy.deepcopy(order.to_records())


def an_answer() -> dict[str, Any]:
    """Records of an answer with everything in it."""
    posts = [
        Posted(Carrier(npy(np.zeros(9, np.uint8))), 9, 4, reference) for reference in (2, None)
    ]
    answer = Answer(
        facts={
            "agent": 1,
            "fingerprint": "f" * 32,
            "num-weights": 100,
            "classes": "0 3",
            "parameters": {"retention": {"conv": 0.3}},
        },
        metrics={
            "accuracy": 0.5,
            "loss": 1.0,
            "num-examples": 7,
            "density": 0.3,
            "train-loss": 1.5,
            "seconds": 0.1,
        },
        posts=posts,
        content="0123456789abcdef",
        held={0: 2, 2: 2},
        refused=["why"],
        lacking=[0],
        introduces=True,
    )
    handed = answers.handed_records(Carrier(b"state"), {".onnx": Carrier(b"model")})
    return copy.deepcopy({**answers.to_records(answer), **handed})


BIG = {
    "agent": 2**20,
    "round": 10**9 + 1,
    "text": "x" * (LIMITS.text + 1),
    "parameters": json.dumps({"x": "y" * LIMITS.parameters}),
}


@pytest.mark.parametrize(
    ("record", "key", "value", "rule"),
    [
        ("order", "message-version", 4, "messages of version 5; got 4. Use GossipStrategy, and"),
        ("order", "run", "../../elsewhere!", "run must be 16 lower-case hex digits; got '../../"),
        ("order", "run", None, "run must be 16 lower-case hex digits; got None"),
        ("order", "server-round", 0, "server-round must be a whole number in 1..1000000000; got 0"),
        ("order", "server-round", BIG["round"], "server-round must be a whole number in 1.."),
        ("order", "server-round", True, "server-round must be a whole number .* got True"),
        ("order", "server-round", 3.0, "server-round must be a whole number .* got 3.0"),
        ("order", "fuse", 1, "fuse must be true or false; got 1"),
        ("order", "fuse", False, "without fuse there are no neighbors"),
        ("order", "evaluate", "yes", "evaluate must be true or false; got 'yes'"),
        ("order", "max-staleness", -1, "max-staleness must be a whole number in 0.."),
        ("order", "age-decay", 0.0, r"age-decay must be a number in \(0, 1\]; got 0.0"),
        ("order", "age-decay", 1, r"age-decay must be a number in \(0, 1\]; got 1"),
        ("order", "aged-agents", [1, 1], "aged-agents must name each only once"),
        ("order", "aged-agents", [1], "ages must have an entry for each of aged-agents"),
        ("order", "neighbors", [1, 1], "neighbors must name each only once"),
        ("order", "neighbors", [BIG["agent"]], "neighbors must be a list of at most 10000 whole"),
        ("order", "neighbors", [*range(10_001)], "neighbors must be a list of at most 10000"),
        ("order", "neighbors", 3, "neighbors must be a list"),
        ("order", "checkpoints", [-1], "checkpoints must be a list"),
        ("order", "acknowledged", "2", "acknowledged must be a whole number"),
        ("order", "store", "x", "store must be true or false"),
        ("order", "keep-best", 1, "keep-best must be true or false"),
        ("state", "generation", b"bytes", "state must hold arrays of at most 2147483648 bytes"),
        ("state", "other", Carrier(b""), "state must hold generation alone"),
        ("order", "layout", "{", r"layout must be JSON \(JSONDecodeError\)"),
        ("order", "layout", "[" * 100_000, r"layout must be JSON \(RecursionError\)"),
        ("order", "layout", '{"fingerprint": "", "arrays": [["w", "<f3", []]]}', "tell names, typ"),
        ("order", "layout", '{"fingerprint": "", "arrays": [["w", "<f4", [-1]]]}', "tell names"),
        ("order", "layout", '{"fingerprint": "", "arrays": [["w", "f4,f4", []]]}', "tell names"),
        ("order", "layout", '{"fingerprint": 1, "arrays": []}', "tell names, types and shapes"),
        ("order", "note", "x" * (LIMITS.setting + 1), r"a setting \(note\) must be a number, text"),
        ("order", "note", [1, "a"], r"a setting \(note\)"),
        ("order", "x" * 201, 1, "names in order must be texts of at most 200 characters"),
        ("frames", "1/3", Carrier(b""), "frames must be named as sender/place, in their order"),
        ("frames", "x", Carrier(b""), "frames must be named as sender/place"),
        ("frames", "01/0", Carrier(b""), "frames must be named as sender/place"),
        ("frames", f"{BIG['agent']}/0", Carrier(b""), "frames must be named as sender/place"),
        ("frames", "5/0", b"no array", "frames must hold arrays of at most"),
        ("initial-arrays", "w", 0.5, "initial-arrays must hold arrays"),
        ("train-config", "lr", {"a": 1}, r"a setting \(lr\) must be a number"),
    ],
)
def test_a_field_of_an_order_that_breaks_its_rule(
    record: str, key: str, value: Any, rule: str
) -> None:
    records = an_order()
    Order.from_records(records)
    records[record][key] = value
    with pytest.raises(ConfigError, match=rule):
        Order.from_records(records)


@pytest.mark.parametrize(
    ("record", "key", "value", "rule"),
    [
        ("agent", "agent", -1, "agent must be a whole number in 0..1000000; got -1"),
        ("agent", "agent", BIG["agent"], "agent must be a whole number in 0..1000000"),
        ("agent", "fresh", None, "fresh must be true or false; got None"),
        ("agent", "refused", ["x" * 1001], "refused must be a list of at most 1000 texts of at mo"),
        ("agent", "refused", ["x"] * 1001, "refused must be a list of at most 1000 texts"),
        ("agent", "refused", ["\ud800"], "refused must be a list"),
        ("agent", "lacking", [2, 2], "lacking must name each only once"),
        ("agent", "lacking", [True], "lacking must be a list of at most 10000 whole numbers"),
        ("agent", "held-agents", [0], "held-rounds must be as long as held-agents"),
        ("agent", "held-agents", [0, 0], "held-agents must name each only once"),
        ("agent", "held-rounds", [2, BIG["round"]], "held-rounds must be a list of at most"),
        ("agent", "builds-on", [-2, -1], "builds-on must be a list of at most 2 whole numbers"),
        ("agent", "builds-on", [2], "builds-on and header-bytes must tell of each frame"),
        ("agent", "header-bytes", [4, 10], "header-bytes must be in 0..9, the frame's bytes; got"),
        ("agent", "content", "0123456789ABCDEF", "content must be 16 lower-case hex digits"),
        ("agent", "parameters", BIG["parameters"], "parameters must be text of at most 200000 cha"),
        ("agent", "parameters", "[" * 900 + "]" * 900, "parameters must be a JSON object of at mo"),
        ("agent", "parameters", "[" * 9000, r"parameters must be JSON \(RecursionError\)"),
        ("agent", "parameters", '{"a":' * 21 + "1" + "}" * 21, "of at most 20 levels"),
        ("agent", "parameters", "[]", "parameters must be a JSON object"),
        ("agent", "parameters", '{"a": NaN}', "parameters must .* its numbers finite"),
        ("agent", "parameters", '{"a": -1e999}', "parameters must .* its numbers finite"),
        ("agent", "parameters", '{"a": 9223372036854775808}', "its numbers finite"),
        ("agent", "parameters", '{"a": ' + "9" * 5000 + "}", r"must be JSON \(ValueError\)"),
        ("agent", "parameters", '{"a": "\\ud83d"}', "parameters must be a JSON object"),
        ("agent", "fingerprint", None, "fingerprint must be text of at most 10000 characters"),
        ("agent", "num-weights", "many", "num-weights must be a whole number in 0.."),
        ("agent", "num-weights", -1, "num-weights must be a whole number in 0.."),
        ("agent", "classes", b"01", "classes must be a finite number, bool, text, or list"),
        ("agent", "classes", BIG["text"], "classes must be .* of at most 10000 characters"),
        ("agent", "classes", [BIG["text"][:5001]] * 2, "classes must be .* at most 10000 charac"),
        ("agent", "classes", [1, 2.0], "classes must be"),
        ("agent", "classes", {"a": 1}, "classes must be"),
        ("agent", "classes", 5, "classes must be text or a list; got 5"),
        ("agent", "task", ["binary"], "task must be text"),
        ("agent", "train-counts", 3, "train-counts must be text"),
        ("agent", "train_counts", "0:9", "kebab-case, without _; got .train_counts"),
        ("agent", "num-test-examples", "all", "num-test-examples must be a whole number in 0"),
        ("agent", "seed", True, "seed must be a whole number"),
        ("agent", "higher-is-better", 1, "higher-is-better must be true or false"),
        ("agent", "frozen-share", "much", r"frozen-share must be in 0\.\.1"),
        ("agent", "frozen-share", 1.5, r"frozen-share must be in 0\.\.1"),
        ("agent", "main-metric", "../x", "main-metric must be a name of letters, digits"),
        ("agent", "main-metric", "[/x]", "main-metric must be a name"),
        ("agent", "main-metric", "x" * 101, "main-metric must be a name"),
        ("agent", "metric-unit", r"$\frac{$", "metric-unit must be at most 40 characters"),
        ("agent", "rate", math.inf, "rate must be a finite number"),
        ("agent", "x" * 201, 1, "names in agent must be texts of at most 200 characters"),
        ("metrics", "accuracy", 1.0000001, "accuracy must be in 0..1; got 1.0000001"),
        ("metrics", "accuracy", 1e6, "accuracy must be in 0..1"),
        (
            "metrics",
            "accuracy",
            math.nan,
            "metric accuracy must be a finite number up to 1e\\+100; got nan",
        ),
        ("metrics", "density", -0.1, "density must be in 0..1"),
        (
            "metrics",
            "train-loss",
            math.inf,
            "metric train-loss must be a finite number up to 1e\\+100; got inf",
        ),
        (
            "metrics",
            "train-loss",
            math.nan,
            "metric train-loss must be a finite number up to 1e\\+100; got nan",
        ),
        ("metrics", "train-loss", [1.0], "metric train-loss must be a finite number"),
        (
            "metrics",
            "train-loss",
            True,
            "metric train-loss must be a finite number up to 1e\\+100; got True",
        ),
        ("metrics", "num-examples", 7.0, "num-examples must be a whole number"),
        ("metrics", "seconds", -1.0, "seconds must be >= 0; got -1.0"),
        ("metrics", "x" * 201, 1, "names in metrics must be texts of at most 200 characters"),
        ("frame", "third", Carrier(b""), "must tell of each frame"),
        ("frame", "frame", b"bytes", "a frame must be an array of at most 2147483648 bytes"),
        ("frame", "frame", Carrier(b"no envelope"), "must come as an npy array of uint8"),
        ("handed-over", "generation", 0.5, "handed-over must hold arrays of at most"),
        ("handed-over", "third", Carrier(b""), "handed-over may have 2 entries; got 3"),
    ],
)
def test_a_field_of_an_answer_that_breaks_its_rule(
    record: str, key: str, value: Any, rule: str
) -> None:
    records = an_answer()
    answers.from_records(records)
    records[record][key] = value
    with pytest.raises(AnswerError, match=rule):
        answers.from_records(records)


@pytest.mark.parametrize(
    ("record", "keys", "rule"),
    [
        ("order", ["introduce"], "introduce must be true or false; got None"),
        ("order", ["message-version"], "messages of version 5; got None"),
        ("agent", ["parameters"], "facts must come as a whole handshake, parameters included"),
        ("agent", ["content"], "content must stand beside frames, and nowhere else"),
        ("agent", ["builds-on"], "builds-on and header-bytes must tell of each frame"),
        ("metrics", ["density"], "an evaluation needs num-examples, density, and an accuracy or"),
        ("metrics", ["accuracy", "loss"], "an evaluation needs num-examples, density, and an"),
        ("frame", ["frame"], "must tell of each frame"),
    ],
)
def test_a_field_that_must_be_there(record: str, keys: list[str], rule: str) -> None:
    is_of_order = record == "order"
    records = an_order() if is_of_order else an_answer()
    for key in keys:
        del records[record][key]
    with pytest.raises(ConfigError if is_of_order else AnswerError, match=rule):
        (Order if is_of_order else answers).from_records(records)


@pytest.mark.parametrize(
    ("read", "records", "name", "error"),
    [
        (Order.from_records, an_order, "order", ConfigError),
        (Order.from_records, an_order, "frames", ConfigError),
        (answers.from_records, an_answer, "agent", AnswerError),
        (answers.from_records, an_answer, "metrics", AnswerError),
        (answers.from_records, an_answer, "frame", AnswerError),
    ],
)
def test_a_record_that_must_be_there(
    read: Callable[[Any], Any], records: Callable[[], Any], name: str, error: type[Exception]
) -> None:
    found = records()
    del found[name]
    with pytest.raises(error):
        read(found)
    with pytest.raises(error, match=f"{name} must be a record; got 'text'"):
        read({**records(), name: "text"})


def test_limits_of_ones_own_hold_for_every_field() -> None:
    """As the relay will know better how large a frame of its network may be."""
    records = an_answer()
    size = len(records["frame"]["frame"].data)
    answers.from_records(records, replace(LIMITS, frame=size))
    for name in ("frame", "agent", "round", "text", "reason", "reasons", "parameters", "names"):
        with pytest.raises(AnswerError):
            answers.from_records(records, replace(LIMITS, **{name: 0}))
    with pytest.raises(AnswerError, match=f"a frame must be an array of at most {size - 1} bytes"):
        answers.from_records(records, replace(LIMITS, frame=size - 1))
    with pytest.raises(ConfigError, match="frames must hold arrays of at most 0 bytes"):
        Order.from_records(an_order(), replace(LIMITS, frame=0))
    with pytest.raises(ConfigError, match="frames may hold 1 arrays; got 2"):
        Order.from_records(an_order(), replace(LIMITS, arrays=1))


def test_what_may_be_left_out_is_left_out() -> None:
    order = Order(parcel=Parcel(1, None), run="0" * 16, max_staleness=0, introduce=False)
    records = order.to_records()
    assert set(records) == {"frames", "order"}
    assert len(records["order"]) == 9
    assert Order.from_records(records) == order
    answer = Answer(facts={"agent": 0}, metrics={"seconds": 1.0})
    assert set(answers.to_records(answer)["agent"]) == {"agent", "fresh"}
    assert answers.from_records(answers.to_records(answer)) == answer


def test_the_users_settings_stand_below_the_orders_own() -> None:
    """Also where the order leaves a key out: it must not read what the user meant by
    it.
    """
    config = {"server-round": 99, "store": True, "neighbors": [7], "layout": "square", "note": "x"}
    order = Order(
        parcel=Parcel(1, None), run="0" * 16, max_staleness=0, introduce=False, config=config
    )
    found = Order.from_records(order.to_records())
    assert found.config == order.config == {"note": "x"}
    assert (found.parcel.round, found.store, found.parcel.neighbors, found.app) == (
        1,
        False,
        None,
        None,
    )


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_an_infinite_loss_is_none_and_costs_nothing_else(loss: float) -> None:
    records = an_answer()
    records["metrics"]["loss"] = loss
    metrics = answers.from_records(records).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["accuracy"] == 0.5


def test_a_fact_has_a_name_of_its_own() -> None:
    """Else it would be read as what the answer says of itself, whoever wrote the
    algorithm.
    """
    facts = {"agent": 0, "fingerprint": "", "fresh": False, "content": "x", "parameters": {}}
    answer = Answer(facts=facts, metrics={}, fresh=True, introduces=True)
    with pytest.raises(AnswerError, match=r"got content, fresh\. Rename them in Agent\.describe"):
        answers.to_records(answer)
