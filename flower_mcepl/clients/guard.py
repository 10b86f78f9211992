"""Guard: every message is answered, whatever happens in a ClientApp.

A SuperNode that never gets its reply blocks, for all later runs: Flower waits without
an end for one that bears the message's id, and does not look at what the ClientApp gave
instead.
"""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from flower_mcepl.errors import ConfigError, FlowerMceplError

FAILED = 2  # Flower's code for a ClientApp that raised

# Of Flower's own mods these expect one set of arrays in, and the same keys out. Here
# neighbors' frames come in and the agent's own goes out; they then answer with an error
# to the reply instead of to the message.
_UNFIT = {"fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod", "secagg_mod", "secaggplus_mod"}

Call = Callable[[Message, Context], Any]


def check_mods(mods: Iterable[object]) -> None:
    """Refuse mods that cannot work on an agent's messages.

    Raises
    ------
    ConfigError
        If one cannot be called, or is one of Flower's that clip, add noise to or sum up
        a model's arrays.
    """
    for mod in mods:
        if not callable(mod):
            raise ConfigError(
                f"a mod must be callable as mod(message, context, call_next); got {mod!r:.80}."
            )
        made_by = mod if hasattr(mod, "__qualname__") else type(mod)
        name = getattr(made_by, "__qualname__", "")
        if name in _UNFIT and str(getattr(made_by, "__module__", "")).partition(".")[0] == "flwr":
            raise ConfigError(
                f"mods must let an agent's frames pass as they are; Flower's {name} changes the "
                "arrays of a global model, which there is none of here, and would leave the "
                "SuperNode waiting for ever. Leave it out: masks are bits, which have no norm to "
                "clip and take no Gaussian noise."
            )


def answer_to(message: Message, context: Context, call: Call) -> Message:
    """Answer of ``call`` if Flower can send it, else an error that says why.

    Raises
    ------
    FlowerMceplError
        If ``call`` tries to end the process. Other exceptions pass: Flower answers with
        an error itself.
    """
    try:
        reply = call(message, context)
    except SystemExit as error:
        if _flower_ends_it(error):
            raise
        raise FlowerMceplError(
            f"node {context.node_id}: the app or a mod called sys.exit({error.code!r}), which "
            "would leave the message without an answer. Raise an exception instead."
        ) from error
    wrong = _fault(reply, message)
    if wrong is None:
        return reply  # type: ignore[no-any-return]
    code, its_error = FAILED, ""
    if isinstance(reply, Message) and reply.has_error():
        code, its_error = reply.error.code, f" It said: {reply.error.reason}"
    reason = (
        f"node {context.node_id}: a ClientApp and each of its mods must return Message(content, "
        f"reply_to=message), with the message that came; here {wrong}. Mend or leave out the mods "
        f"of make_client_app.{its_error}"
    )
    return Message(Error(code, reason), reply_to=message)


def _fault(reply: Any, message: Message) -> str | None:
    """Fault of a reply, None if there is none."""
    if not isinstance(reply, Message):
        return (
            f"{type(reply).__name__} came out"
            if reply is not None
            else "None came out (is a return missing?)"
        )
    sent, came = reply.metadata, message.metadata
    if sent.reply_to_message_id != came.message_id or (sent.src_node_id, sent.dst_node_id) != (
        came.dst_node_id,
        came.src_node_id,
    ):
        return "the reply is to another message, or to a reply"
    if sent.run_id != came.run_id or sent.message_type != came.message_type:
        return "the reply is of another run or type than the message"
    if reply.has_error():
        return None
    if not reply.has_content() or not isinstance(reply.content, RecordDict):
        return "the reply holds neither a RecordDict nor an error"
    try:
        _ = reply.object_id  # writes it as it will be sent
    except Exception as error:
        return f"the reply cannot be sent ({type(error).__name__}: {error})"
    return None


def _flower_ends_it(error: SystemExit) -> bool:
    """Whether Flower ends the process, as when its SuperNode stops: nobody waits."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith(
        "flwr."
    )
