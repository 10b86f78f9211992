"""What an algorithm is to everything that runs, checks and draws it: one value."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flower_mcepl.agents.agent import Agent, AgentState
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.server import Server
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.errors import FlowerMceplError, StateError

Masks = Mapping[str, NDArray[Any]]
"""One agent's masks by layer, booleans."""


def no_masks(state: AgentState, parameters: Mapping[str, Any]) -> str:
    """Say that such agents have no final masks."""
    return f"agents of {state.facts.get('algorithm')} hold no mask at the end"


@final
@dataclass(frozen=True)
class Algorithm:
    """One algorithm, as an entry of `ALGORITHMS`.

    Parameters
    ----------
    agent : type[Agent]
        The class of its agents, made with ``(index, module, data, config, *, seed,
        device)``.
    config : type[TrainingConfig]
        The class of their parameters; its fields in kebab-case are run-config keys, and
        every one has a default.
    server : type[Server], optional
        The class of the server that they hear, made with ``(module, num_agents, config,
        *, seed)``; without one agents hear each other.
    final_masks : callable, optional
        ``final_masks(state, parameters)`` reads an agent's masks, arrays of booleans by
        layer, from the state that a run leaves; or returns a text that says why there
        are none. The parameters are the agent's, as the run record has them.
    fixed : mapping, optional
        Fields of the config that the algorithm sets itself, and a run config does not.

    Raises
    ------
    ConfigError
        If a class is of another kind, a parameter lacks its default, or a fixed
        parameter is none of the config's.
    """

    agent: type[Agent]
    config: type[TrainingConfig]
    server: type[Server] | None = None
    final_masks: Callable[[AgentState, Mapping[str, Any]], Masks | str] = no_masks
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_class(self.agent, Agent, "agent")
        _check_class(self.config, TrainingConfig, "config")
        if self.server is not None:
            _check_class(self.server, Server, "server")
        own, name = vars(self.config), self.config.__name__
        check(
            "__dataclass_fields__" in own or not own.get("__annotations__"),
            f"fields of a config class are parameters only if it is a dataclass; {name} adds",
            ", ".join(own.get("__annotations__", ())),
            "Write @dataclass(frozen=True, kw_only=True) above it.",
        )
        check(
            not (bare := _without_default(self.config)),
            f"every parameter of {name} needs a default: a run config may name none of them",
            ", ".join(bare),
            "Write one, as in kept: float = 0.5.",
        )
        names = {each.name for each in dataclasses.fields(self.config)}
        check(
            self.fixed.keys() <= names,
            f"fixed parameters must be fields of {self.config.__name__}",
            ", ".join(sorted(self.fixed.keys() - names)),
        )

    def keys(self) -> set[str]:
        """Return the run-config keys that set its parameters."""
        return self.config.keys() - self._fixed_keys()

    def read_config(
        self, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> TrainingConfig:
        """Return one agent's parameters; keys of fixed ones do not matter."""
        fixed = self._fixed_keys()
        free = {key: value for key, value in run_config.items() if key not in fixed}
        config = self.config.from_run_config(free, agent=agent, node_config=node_config)
        return dataclasses.replace(config, **self.fixed)

    def masks_of(
        self, state: AgentState, parameters: Mapping[str, Any]
    ) -> dict[str, NDArray[np.bool_]] | str:
        """Return an agent's final masks, or why it has none.

        Raises
        ------
        StateError
            If they cannot be read from the state.
        """
        try:
            masks = self.final_masks(state, {**parameters, **self.fixed})
            if isinstance(masks, str):
                return masks
            return {name: np.asarray(mask, dtype=bool) for name, mask in masks.items()}
        except FlowerMceplError:
            raise
        except Exception as error:  # whatever a reader meets in a state that is not as it should be
            raise StateError(
                f"the masks of agent {state.facts.get('agent')} cannot be read from its state "
                f"({type(error).__name__}: {error}). Use another copy of the record, or mend the "
                f"algorithm's final_masks."
            ) from error

    def _fixed_keys(self) -> set[str]:
        return {name.replace("_", "-") for name in self.fixed}


def _check_class(given: Any, kind: type, what: str) -> None:
    check(
        isinstance(given, type) and issubclass(given, kind),
        f"the {what} of an Algorithm must be a subclass of {kind.__name__}",
        given,
        "See docs/extending.md.",
    )


def _without_default(config: type[TrainingConfig]) -> list[str]:
    missing = dataclasses.MISSING
    return [
        each.name
        for each in dataclasses.fields(config)
        if each.init and each.default is missing and each.default_factory is missing
    ]
