"""Whatever a ClientApp or a mod does, Flower gets an answer to the message; who gave
none has not moved on.
"""

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (  # what users are tempted to add
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)

from flower_mcepl import ConfigError, FlowerMceplError
from flower_mcepl.clients import make_agent_app
from tests.fleet.agents import make_agent
from tests.fleet.flower import state_bytes
from tests.fleet.flower_messages import a_context, a_message, be_a_node, frame_of, the_app
from tests.fleet.grid import InProcessGrid

Next = Callable[[Message, Context], Message]


@pytest.fixture(autouse=True)
def identity() -> None:
    be_a_node()


def sent(round: int, **order: Any) -> Message:
    """A message with an id, as Flower's are."""
    message = a_message(round, **order)
    message.metadata.__dict__["_message_id"] = f"message {round}"
    return message


def check_answers(reply: Any, message: Message) -> None:
    """What Flower's SuperNode and SuperLink need of a reply."""
    assert isinstance(reply, Message)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id != ""
    assert reply.metadata.src_node_id == message.metadata.dst_node_id
    assert reply.metadata.dst_node_id == message.metadata.src_node_id
    assert reply.metadata.run_id == message.metadata.run_id
    assert reply.has_error() != reply.has_content()
    assert reply.object_id  # it can be sent


# --- mods that break the answer ---


def returns_nothing(message: Message, context: Context, call_next: Next) -> Any:
    call_next(message, context)


def returns_records(message: Message, context: Context, call_next: Next) -> Any:
    return call_next(message, context).content


def replies_to_the_reply(message: Message, context: Context, call_next: Next) -> Any:
    return Message(RecordDict(), reply_to=call_next(message, context))


def fails_the_reply(message: Message, context: Context, call_next: Next) -> Any:
    return Message(Error(6, "arrays do not match"), reply_to=call_next(message, context))


def replies_to_another_message(message: Message, context: Context, call_next: Next) -> Any:
    return Message(call_next(message, context).content, reply_to=sent(77))


def begins_a_message(message: Message, context: Context, call_next: Next) -> Any:
    return Message(call_next(message, context).content, dst_node_id=1, message_type="train")


def empties_the_reply(message: Message, context: Context, call_next: Next) -> Any:
    reply = call_next(message, context)
    reply.__dict__["_content"] = None
    return reply


def replaces_the_content(message: Message, context: Context, call_next: Next) -> Any:
    reply = call_next(message, context)
    reply.content = {"metrics": 1}  # type: ignore[assignment]
    return reply


def spoils_a_record(message: Message, context: Context, call_next: Next) -> Any:
    values: list[Any] = [1.0]
    reply = call_next(message, context)
    reply.content["spoilt"] = MetricRecord({"values": values})
    values.append(object())  # after Flower looked at it
    return reply


BREAKING = {
    returns_nothing: r"None came out \(is a return missing\?\)",
    returns_records: "RecordDict came out",
    replies_to_the_reply: "the reply is to another message, or to a reply",
    fails_the_reply: r"the reply is to another message.* It said: arrays do not match",
    replies_to_another_message: "the reply is to another message, or to a reply",
    begins_a_message: "the reply is to another message, or to a reply",
    empties_the_reply: "the reply holds neither a RecordDict nor an error",
    replaces_the_content: "the reply holds neither a RecordDict nor an error",
    spoils_a_record: r"the reply cannot be sent \(TypeError",
}


@pytest.mark.parametrize("mod", BREAKING, ids=lambda mod: mod.__name__)
def test_a_mod_that_breaks_the_answer_costs_this_round_alone(mod: Any) -> None:
    context = a_context()
    sound = the_app()
    sound(sent(1), context)
    before, twin = state_bytes(context), copy.deepcopy(context)
    message = sent(2, neighbors=())
    reply = the_app(mods=[mod])(message, context)
    check_answers(reply, message)
    assert reply.error.code == (6 if mod is fails_the_reply else 2)
    assert re.search(BREAKING[mod], str(reply.error.reason))
    assert "must return Message(content, reply_to=message)" in str(reply.error.reason)
    # it will play the round again, or the next one, from there
    assert state_bytes(context) == before
    message = sent(2, neighbors=())
    assert frame_of(sound(message, context)) == frame_of(sound(message, twin))


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_the_guard_is_around_every_message(kind: str) -> None:
    message = sent(1, train=kind == "train")
    message.metadata.message_type = kind
    app = the_app(mods=[returns_nothing])
    check_answers(app(message, a_context()), message)


def test_the_guard_is_around_functions_that_a_user_adds() -> None:
    app = the_app()

    @app.query("health")
    def health(message: Message, context: Context) -> Any:
        return "fine"

    message = sent(1)
    message.metadata.message_type = "query.health"
    reply = app(message, a_context())
    check_answers(reply, message)
    assert "str came out" in str(reply.error.reason)


# --- mods and apps that raise or leave ---


def raises_before(message: Message, context: Context, call_next: Next) -> Message:
    raise RuntimeError("no rounds on Sundays")


def raises_after(message: Message, context: Context, call_next: Next) -> Message:
    call_next(message, context)
    raise RuntimeError("no answers on Sundays")


@pytest.mark.parametrize("mod", [raises_before, raises_after])
def test_an_exception_passes_and_the_state_stays(mod: Any) -> None:
    """Flower makes an error reply of it, in simulation as on devices."""
    context = a_context()
    the_app()(sent(1), context)
    before = state_bytes(context)
    with pytest.raises(RuntimeError, match="on Sundays"):
        the_app(mods=[mod])(sent(2, neighbors=()), context)
    assert state_bytes(context) == before


def test_an_app_cannot_leave() -> None:
    """An exit would end a device's process without an answer, and a worker of the
    simulation with it.
    """

    def leave(context: Context) -> Any:
        sys.exit("no data today")

    with pytest.raises(
        FlowerMceplError,
        match=r"node 1000: .*called sys\.exit\('no data today'\).*Raise an exception",
    ):
        make_agent_app(leave)(sent(1), a_context())


def test_flower_may_end_the_process() -> None:
    """As its signal handlers do when the SuperNode stops."""
    scope: dict[str, Any] = {"__name__": "flwr.supercore.exit.exit", "sys": sys}
    exec("def handler(*_):\n    sys.exit(3)", scope)
    with pytest.raises(SystemExit) as caught:
        make_agent_app(scope["handler"])(sent(1), a_context())
    assert caught.value.code == 3


# --- mods that work ---


def test_mods_see_every_message_in_their_order_and_may_add_to_the_answer() -> None:
    seen = []

    def first(message: Message, context: Context, call_next: Next) -> Message:
        seen.append("first")
        reply = call_next(message, context)
        reply.content["notes"] = ConfigRecord({"battery": 0.5})
        return reply

    def second(message: Message, context: Context, call_next: Next) -> Message:
        seen.append("second")
        return call_next(message, context)

    context, plain = a_context(), a_context()
    message = sent(1)
    reply = the_app(mods=[first, second, arrays_size_mod, message_size_mod])(message, context)
    check_answers(reply, message)
    assert seen == ["first", "second"]
    assert reply.content["notes"]["battery"] == 0.5
    assert frame_of(reply) == frame_of(the_app()(sent(1), plain))
    assert state_bytes(context) == state_bytes(plain)


def test_a_mod_that_calls_twice_plays_one_round() -> None:
    def twice(message: Message, context: Context, call_next: Next) -> Message:
        first, again = frame_of(call_next(message, context)), call_next(message, context)
        assert frame_of(again) == first
        return again

    contexts = a_context(), a_context()
    for round in (1, 2):
        frames = [
            frame_of(app(sent(round, neighbors=() if round > 1 else None), context))
            for app, context in zip((the_app(), the_app(mods=[twice])), contexts, strict=True)
        ]
        assert frames[0] == frames[1]
    assert state_bytes(contexts[0]) == state_bytes(contexts[1])


# --- mods that are refused ---


def local_dp() -> Any:
    return LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize("mod", [local_dp(), fixedclipping_mod, adaptiveclipping_mod])
@pytest.mark.parametrize(
    "make", [the_app, lambda **options: make_agent_app(lambda context: make_agent(0), **options)]
)
def test_flowers_clipping_mods_are_refused_as_the_app_is_built(mod: Any, make: Any) -> None:
    name = getattr(mod, "__name__", type(mod).__name__)
    with pytest.raises(
        ConfigError, match=rf"mods must let an agent's frames pass.*Flower's {name} .*Leave it out"
    ):
        make(mods=[arrays_size_mod, mod])


def test_a_users_own_mod_of_the_same_name_is_not_refused() -> None:
    def fixedclipping_mod(message: Message, context: Context, call_next: Next) -> Message:
        return call_next(message, context)

    message = sent(1)
    check_answers(the_app(mods=[fixedclipping_mod])(message, a_context()), message)


def test_a_mod_must_be_callable() -> None:
    with pytest.raises(
        ConfigError,
        match=r"a mod must be callable as mod\(message, context, call_next\); got 'clip'",
    ):
        the_app(mods=["clip"])


def test_local_dp_that_comes_in_by_a_side_door_wedges_nothing() -> None:
    """Unguarded, its error would be a reply to the reply, on which a SuperNode waits
    for ever.
    """
    hidden = local_dp()
    message = sent(1)
    reply = the_app(mods=[lambda *call: hidden(*call)])(message, a_context())
    check_answers(reply, message)
    assert reply.error.code == 6
    assert "It said: LocalDpMod expects the keys in the ArrayRecord" in str(reply.error.reason)

    unguarded = ClientApp(mods=[hidden])

    @unguarded.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"out": ArrayRecord()}), reply_to=message)

    message.content["frames"] = ArrayRecord({"x": next(iter(frames_of_one_agent().values()))})
    # what the guard is there for
    assert unguarded(message, a_context()).metadata.reply_to_message_id == ""


def frames_of_one_agent() -> ArrayRecord:
    return the_app()(sent(1), a_context()).content["frame"]


def test_a_node_with_a_broken_mod_shows_as_an_error_and_nothing_hangs() -> None:
    grid = InProcessGrid(the_app(mods=[returns_nothing]), 1, {"seed": 7})
    message = sent(1)
    message.metadata.__dict__["_dst_node_id"] = 1000
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
