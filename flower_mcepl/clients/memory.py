"""What a device keeps between two messages: agent and mailbox in Flower's ``Context.state``."""

import json

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from flower_mcepl.agents import Agent, AgentState
from flower_mcepl.mailbox import Mailbox

TENSORS, FACTS, MAIL = "mcepl-agent", "mcepl-facts", "mcepl-mail"


def recall(context: Context, agent: Agent, mailbox: Mailbox) -> bool:
    """Restore agent and mailbox from the context; return False where it holds none yet."""
    state = context.state
    if FACTS not in state:
        return False
    tensors = {name: torch.from_numpy(array.numpy()) for name, array in state.array_records[TENSORS].items()}
    agent.restore(AgentState(tensors, json.loads(str(state.config_records[FACTS]["facts"]))))
    mailbox.restore({int(sender): array.numpy().tobytes() for sender, array in state.array_records[MAIL].items()})
    return True


def remember(context: Context, agent: Agent, mailbox: Mailbox) -> None:
    """Put agent and mailbox into the context, for the next message."""
    state = agent.state()
    tensors = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.tensors.items()})
    mail = {str(sender): Array(np.frombuffer(frame, np.uint8)) for sender, frame in mailbox.frames().items()}
    facts = ConfigRecord({"facts": json.dumps(state.facts, sort_keys=True)})
    context.state.update({TENSORS: tensors, MAIL: ArrayRecord(mail), FACTS: facts})  # all made: all or nothing
