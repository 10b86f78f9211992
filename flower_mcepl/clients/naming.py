"""Who a node is, in its messages and in every error."""

import contextlib
from collections.abc import Iterator

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_mcepl.errors import ConfigError, FlowerMceplError, names_agent
from flower_mcepl.messages.identity import identity
from flower_mcepl.runs.simulated import in_simulation


def agent_index(context: Context) -> int:
    """Number of the agent, the node config's ``partition-id``."""
    index = context.node_config.get("partition-id")
    if not isinstance(index, int) or index < 0:
        raise ConfigError(
            f"node {context.node_id} must say which agent it is: its node config needs "
            f"partition-id, a number >= 0; got {index!r}. Start its SuperNode with --node-config "
            "'partition-id=0' (one number per node)."
        )
    return index


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
