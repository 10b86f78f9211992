"""The interface of an agent: one participant of an algorithm, without a network."""

import abc
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flower_mcepl.data.batches import EVALUATED, AgentData
from flower_mcepl.errors import ConfigError, StateError
from flower_mcepl.files.atomic import remove_leftovers, replace_file
from flower_mcepl.files.bundle import Bundle
from flower_mcepl.wire import Prior

Payload = Mapping[str, Tensor]
"""What one agent sends: a bool mask or float tensor per layer."""

STATE_VERSION = 1  # raise it when the meaning of a state's entries changes


AgentState = Bundle
"""Everything an agent must remember between rounds; arrays are ``group/layer``."""


class Agent(abc.ABC):
    """One participant of a decentralized algorithm.

    Verbs, in the order of a round: `fuse` what the neighbors sent, `evaluate` the
    personal model, `train`, say what is `outgoing`; and `state` / `restore` to survive.
    An agent never knows whether it lives in a test, in Ray or on a device.
    """

    # name in records and saved states; `make_agent` gives the one that is registered
    algorithm: str
    index: int  # 0..N-1 in the graph
    seed: int  # seed of the run
    fingerprint: str  # of the shared frozen weights, 32 hex characters
    # where pretrained weights come from, with a digest; "": from the model function
    weights_from: str = ""
    layers: dict[str, tuple[int, ...]]  # shape of each layer's outgoing tensor
    layers_down: dict[str, tuple[int, ...]] | None = None  # of what it hears; None: the same
    # what the floats of a layer stand for, where it is not float32 (`parts.words`)
    float_types: Mapping[str, torch.dtype] = MappingProxyType({})
    depth: int = 0  # stages that it holds of the network; 0: the network has none
    # `layers` of agents of each depth, where there are several
    layers_by_depth: tuple[dict[str, tuple[int, ...]], ...] = ()
    # it hears a `Server` alone, which is number N in the graph, and never other agents
    server_based: bool = False
    # the algorithm's mixing weights are not defined on a directed graph
    undirected_only: bool = False
    prior: Prior | None = None  # what all agents know of every mask beforehand; spares bytes
    precision: str = "float32"  # how the wire carries floats, see `encode_frame`

    @classmethod
    def weighs_votes_with(cls, config: Any) -> bool:
        """Whether agents of such parameters are `WeighsVotes`; by default not."""
        return False

    @property
    def weighs_votes(self) -> bool:
        """Whether it is one that `WeighsVotes`."""
        return self.weighs_votes_with(getattr(self, "config", None))

    @abc.abstractmethod
    def fuse(self, inbox: Mapping[int, Payload], *, round: int) -> None:
        """Take in the neighbors' payloads of ``round``, by agent; it may be empty.

        It leaves the tensors as they are: some are the common `first_payload`.
        """

    @abc.abstractmethod
    def train(self, *, round: int) -> dict[str, float]:
        """Take the local steps of ``round``; return metrics with ``train-loss``.

        They are numbers, and none has the name of one that `evaluate` returns.
        """

    @abc.abstractmethod
    def outgoing(self) -> dict[str, Tensor]:
        """Return what the neighbors get this round: all of `layers`, in these shapes.

        An empty mapping sends nothing: the neighbors go on with what they hold.
        """

    def sent(self, decoded: Payload) -> None:  # noqa: B027
        """Take note of what comes out of this round's frame at its receivers.

        ``decoded`` are the layers that travelled as differences; empty where all that
        is `outgoing` arrives as it is, up to the rounding of `precision`. By default
        nothing.
        """

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Evaluate the personal model on the agent's test split.

        Return ``accuracy``, ``loss``, ``num-examples`` and ``density``.
        """

    def personal_model(self) -> nn.Module:
        """Return the network that `evaluate` evaluates, on its own, as a copy.

        Raises
        ------
        ConfigError
            If the algorithm has no torch network to hand out; by default so.
        """
        raise ConfigError(
            f"a personal model is exported from an agent with a torch network of its own; agents "
            f"of {self.algorithm} tell of none. Save the app's model where the app trains it, or "
            "give the algorithm's agent a personal_model."
        )

    def check(self) -> None:  # noqa: B027
        """Check what the agent is to learn from, before round 1; by default nothing.

        Raises
        ------
        DataError
            If it does not fit.
        """

    @abc.abstractmethod
    def state(self) -> AgentState:
        """Return everything that must survive until the next round."""

    @abc.abstractmethod
    def restore(self, state: AgentState) -> None:
        """Go on from a state of the same agent, algorithm, seed and weights.

        Raises
        ------
        StateError
            If it is of anything else, or incomplete.
        """

    @abc.abstractmethod
    def first_payload(self) -> dict[str, Tensor] | None:
        """Return what all know of this agent before its first frame; None: nothing.

        Tensors that nobody changes in place, in the shapes of `layers`.
        """

    @abc.abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return this agent's parameters, JSON-able, for the run record."""

    def describe(self) -> dict[str, Any]:
        """Return facts for the handshake: JSON-able scalars in kebab-case."""
        return {
            "agent": self.index,
            "algorithm": self.algorithm,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            **({"weights-from": self.weights_from} if self.weights_from else {}),
        }

    def _facts(self, **more: Any) -> dict[str, Any]:
        return {
            "state-version": STATE_VERSION,
            "algorithm": self.algorithm,
            "agent": self.index,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            **({"depth": self.depth} if self.depth else {}),
            **more,
        }

    def _check_facts(self, facts: Mapping[str, Any]) -> None:
        for key, mine in self._facts().items():
            if facts.get(key) != mine:
                raise StateError(
                    f"the saved state is of {key} {facts.get(key)!r}, but agent {self.index} has "
                    f"{mine!r}. Use the state of this agent and run, or start afresh without it."
                )


class WeighsVotes(Protocol):
    """Agent whose `fuse` also takes the votes of its neighbors."""

    def fuse(self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float]) -> None:
        """Take in payloads that count by ``votes``, in (0, 1]; absent: 1."""


# those of `data_facts` that reveal classes
CLASS_FACTS = ("classes", "train-counts", "validation-counts", "test-counts")
# all that `data_facts` may tell
DATA_FACTS = ("num-examples", *(f"num-{split}-examples" for split in EVALUATED), *CLASS_FACTS)


def data_facts(data: AgentData) -> dict[str, Any]:
    """Facts about an agent's data for the handshake: sizes of splits, known classes.

    ``train-counts``, ``validation-counts`` and ``test-counts`` are texts such as
    ``"0:57 3:61"``: class and number of examples.
    """
    facts: dict[str, Any] = {
        "num-examples": data.train.num_examples,
        f"num-{data.evaluated}-examples": data.test.num_examples,
    }
    classes = getattr(data.train, "classes", None)
    if classes is None and "train" in data.class_counts:
        classes = " ".join(map(str, data.class_counts["train"]))
    if classes is not None:
        facts["classes"] = classes
    for split, counts in data.class_counts.items():
        facts[f"{split}-counts"] = " ".join(f"{name}:{count}" for name, count in counts.items())
    return facts


def save_state(state: AgentState, path: Path) -> None:
    """Write a state as one safetensors file for its owner alone, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, state.encode(), mode=0o600)
    remove_leftovers(path.parent, path.name)


def load_state(path: Path) -> AgentState:
    """Read a state written by `save_state`.

    Raises
    ------
    StateError
        If the file is damaged or was not written by `save_state`.
    """
    try:
        return AgentState.decode(path.read_bytes())
    except (OSError, StateError) as error:
        raise StateError(
            f"{path} is no readable agent state ({error}). Use another copy, or start afresh."
        ) from error


def agent_file(agent: int) -> str:
    """Return the name of an agent's state in the run record."""
    return f"agent-{agent:04d}.safetensors"


def best_file(agent: int) -> str:
    """Return the name of an agent's best state in the run record."""
    return f"agent-{agent:04d}-best.safetensors"
