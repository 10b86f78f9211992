"""The interface of a server: what aggregates, in a server-based algorithm."""

import abc
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flower_mcepl.agents.agent import STATE_VERSION, AgentState, Payload
from flower_mcepl.agents.parts.groups import Shapes, check_group, groups_of, state_of
from flower_mcepl.config.checks import check
from flower_mcepl.errors import StateError
from flower_mcepl.masks.layers import find_maskable
from flower_mcepl.masks.model import fingerprint


class Server(abc.ABC):
    """The center of a star: every agent hears it, and no agent hears another.

    Verbs, in the order of a round: `receive` what the agents answered, `payload_for`
    each of them; and `state` / `restore` to survive. All agents begin round 1 from what
    they have in common, without a word from the server.

    Parameters
    ----------
    module : nn.Module
        The network with the weights that all agents share or start from, as from
        `shared_module`.
    num_agents : int
        N; the server itself is participant number N.
    seed : int
        Seed of the run, the same as on all agents.
    """

    algorithm: str  # name in records and saved states, the same as that of its agents
    # where pretrained weights come from, with a digest; "": from the model function
    weights_from: str = ""
    shared: bool  # every agent gets the same payload
    layers: dict[str, tuple[int, ...]]  # shape of each layer of what agents send
    layers_down: dict[str, tuple[int, ...]]  # the same of what the server sends
    # those of `layers` that are bool masks; the others hold floats
    mask_layers: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, num_agents: int, *, seed: int) -> None:
        check(num_agents >= 1, "num_agents must be >= 1", num_agents)
        self.num_agents, self.seed = num_agents, seed
        self.fingerprint = fingerprint(module, find_maskable(module))

    @property
    def index(self) -> int:
        """The server's number in the graph: the first after the agents."""
        return self.num_agents

    @abc.abstractmethod
    def receive(
        self, inbox: Mapping[int, Payload], *, round: int, num_examples: Mapping[int, int]
    ) -> None:
        """Aggregate the payloads of ``round``, at least one, by agent index.

        ``num_examples`` are the sizes of the agents' training splits, where they are
        known.
        """

    @abc.abstractmethod
    def note(self, agent: int, payload: Payload) -> None:
        """Take note of a payload that must not count: it began from an older model."""

    @abc.abstractmethod
    def payload_for(self, agent: int, *, round: int) -> Payload | None:
        """Return what the agent gets after ``round``; None: nothing yet."""

    @abc.abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return the server's parameters, JSON-able, for the run record."""

    @abc.abstractmethod
    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return all tensors that must survive, in groups."""

    @abc.abstractmethod
    def _group_shapes(self) -> dict[str, tuple[Shapes, bool]]:
        """Return what each group of a state holds, and whether it may be absent."""

    @abc.abstractmethod
    def _take_back(self, groups: Mapping[str, dict[str, Tensor]]) -> None:
        """Undo `_groups`."""

    def describe(self) -> dict[str, Any]:
        """Return what agents and server must have in common, as in `Agent.describe`."""
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            **({"weights-from": self.weights_from} if self.weights_from else {}),
            "num-weights": sum(math.prod(shape) for shape in self.layers_down.values()),
        }

    def state(self) -> AgentState:
        """Return everything that must survive until the next round."""
        return state_of(self._facts(), self._groups())

    def restore(self, state: AgentState) -> None:
        """Continue exactly where `state` was taken.

        Raises
        ------
        StateError
            If it is the state of another algorithm, run or number of agents, or
            incomplete.
        """
        for key, mine in self._facts().items():
            if state.facts.get(key) != mine:
                raise StateError(
                    f"the saved state is of {key} {state.facts.get(key)!r}, but the server has "
                    f"{mine!r}. Use the state of this server and run, or start afresh without it."
                )
        groups = groups_of(state)
        for group, (shapes, may_be_absent) in self._group_shapes().items():
            check_group(groups, group, shapes, whose="the server", may_be_absent=may_be_absent)
        self._take_back(groups)

    def _facts(self) -> dict[str, Any]:
        return {"state-version": STATE_VERSION, "num-agents": self.num_agents, **self.describe()}


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights that train, by name."""
    return {
        name: w.detach().cpu().clone() for name, w in module.named_parameters() if w.requires_grad
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
