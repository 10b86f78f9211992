"""An agent and its mail as they were after one round, as bytes."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from flower_mcepl.agents import Agent, AgentState
from flower_mcepl.errors import StateError
from flower_mcepl.exchange.held import Arrays
from flower_mcepl.exchange.turn import Mail

# the key of the metadata under which everything but the arrays stands, as JSON
_ABOUT = "generation"
_PARTS = ("agent", "inbox", "outbox")


@dataclass(frozen=True)
class Generation:
    """Everything from which an agent plays the next round.

    Parameters
    ----------
    run : str
        Which run it is of, see `flower_mcepl.messages.keys.RUN`.
    round : int
        The round after which it was taken.
    agent : int
        The agent's number in the graph.
    state : AgentState
        What `Agent.state` gave.
    inbox, outbox : arrays by name
        What `Mailbox.arrays` and `Outbox.arrays` gave.
    source : str (default: "")
        Where it was read, for messages.
    """

    run: str
    round: int
    agent: int
    state: AgentState
    inbox: Arrays
    outbox: Arrays
    source: str = field(default="", compare=False)

    @classmethod
    def of(cls, agent: Agent, mail: Mail, *, run: str, round: int) -> "Generation":
        """Take it from an agent and its mail."""
        return cls(
            run, round, agent.index, agent.state(), mail.inbox.arrays(), mail.outbox.arrays()
        )

    def restore(self, agent: Agent, mail: Mail) -> None:
        """Let agent and mail continue from here.

        Raises
        ------
        StateError
            If it is of another agent, algorithm, seed or model. Agent and mail are then
            of no further use.
        """
        try:
            agent.restore(self.state)
            mail.inbox.restore(self.inbox)
            mail.outbox.restore(self.outbox)
        except StateError as error:
            raise StateError(f"{self.source}: {error}" if self.source else str(error)) from error

    def encode(self) -> bytes:
        """Return it in the safetensors format."""
        tensors = {name: tensor.numpy() for name, tensor in self.state.tensors.items()}
        arrays = {
            f"{part}/{name}": array if array.flags.c_contiguous else array.copy()
            for part, found in zip(_PARTS, (tensors, self.inbox, self.outbox), strict=True)
            for name, array in found.items()
        }
        about = {
            "run": self.run,
            "round": self.round,
            "agent": self.agent,
            "facts": self.state.facts,
        }
        return safetensors.numpy.save(arrays, metadata={_ABOUT: json.dumps(about, sort_keys=True)})

    @classmethod
    def decode(cls, data: bytes) -> "Generation":
        """Undo `encode`.

        Raises
        ------
        StateError
            If the bytes are not what `encode` gave.
        """
        try:
            about = _about(data)
            parts: dict[str, Arrays] = {part: {} for part in _PARTS}
            for key, array in safetensors.numpy.load(data).items():
                part, _, name = key.partition("/")
                parts[part][name] = array
            tensors = {name: torch.from_numpy(array) for name, array in parts["agent"].items()}
            state = AgentState(tensors, dict(about["facts"]))
            return cls(
                str(about["run"]),
                int(about["round"]),
                int(about["agent"]),
                state,
                parts["inbox"],
                parts["outbox"],
            )
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                "a saved state must be what this release of flower-mcepl saves; it cannot be "
                f"read ({error!r}). Use another copy, or start afresh without it."
            ) from error


def _about(data: bytes) -> dict[str, Any]:
    """Read the metadata, which `safetensors.numpy.load` leaves out: a length of 8 bytes, then JSON."""
    length = int(np.frombuffer(data, "<u8", count=1)[0])
    found = json.loads(json.loads(bytes(data[8 : 8 + length]))["__metadata__"][_ABOUT])
    if not isinstance(found, dict):
        raise ValueError("its metadata is no table")
    return found
