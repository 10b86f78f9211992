"""Depth of an agent: which first stages of a common network it holds, trains and sends.

All agents know the whole network, which the run's seed draws: so what a shallow agent
holds is the first part of what a deep one holds, weights, first scores and first masks
alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, final

from torch import nn

from flower_mcepl.agents.handshake import DEPTH, LAYERS_BY_DEPTH, WEIGHTS_BY_DEPTH
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.config.fields import RunConfig
from flower_mcepl.config.patterns import matches_any
from flower_mcepl.config.ratios import ratios_of
from flower_mcepl.models import Staged

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DepthConfig(TrainingConfig):
    """Parameter of algorithms whose agents may hold a part of the network.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # stages that the agent holds of a network that has them; 0: all
    depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.depth)

    @classmethod
    def from_run_config(
        cls, run_config: RunConfig, *, agent: int, node_config: RunConfig | None = None
    ) -> Self:
        """Read one agent's settings; of several depths it has the one in its turn."""
        depth = read_depth(run_config, node_config, agent=agent)
        return super().from_run_config(
            {**run_config, "depth": depth}, agent=agent, node_config=node_config
        )


def read_depth(run_config: RunConfig, node_config: RunConfig | None, *, agent: int) -> int:
    """Depth of one agent: ``3``, or in turn ``"2, 3, 4"``, or its node config's own."""
    depths, own = ratios_of("depth", run_config, node_config, agent=agent, default=0)
    for depth in (*depths, own):
        check_depth(depth)
    return int(own)


def depth_of(config: TrainingConfig) -> int:
    """Depth that a configuration asks for; 0, all, where the algorithm knows none."""
    return config.depth if isinstance(config, DepthConfig) else 0


def check_depth(depth: float) -> None:
    """Raise ConfigError unless ``depth`` is a whole number, 0 or more."""
    check(
        depth >= 0 and depth == int(depth),
        "depth is a number of stages, a whole number >= 1, or 0 for all",
        depth,
        'Use for example 2, or "2, 3, 4" for agents in turn.',
    )


@final
@dataclass(frozen=True)
class Depths:
    """A network that all agents know, and the part of it that one of them holds."""

    whole: nn.Module  # all stages and exits
    parts: tuple[nn.Module, ...]  # what agents of each depth hold, the shallowest first
    depth: int  # stages that the agent holds; 0: the network has none

    @classmethod
    def of(cls, module: nn.Module, depth: int) -> "Depths":
        """The part of depth ``depth`` of a network; 0: all.

        Raises
        ------
        ConfigError
            If the network has no stages, or fewer.
        """
        if not isinstance(module, Staged) or module.is_part:
            check(
                depth == 0,
                "depth needs a network with stages, flower_mcepl.Staged, and the model function "
                f"returns {_described(module)}; depth",
                depth,
                "Return Staged(stages, exits), or leave depth out.",
            )
            return cls(module, (module,), 0)
        depth = depth or module.num_stages
        module.at_depth(depth)
        parts = (module.at_depth(number) for number in range(1, module.num_stages + 1))
        return cls(module, tuple(parts), depth)

    @property
    def held(self) -> nn.Module:
        """What the agent holds."""
        return at_depth(self.parts, self.depth)


def at_depth(by_depth: Sequence[T], depth: int) -> T:
    """Entry of a depth among those of all depths, or the only one; 0: the last."""
    return by_depth[depth - 1]


def depth_facts(depth: int, lists: Sequence[Shapes], sizes: Sequence[int]) -> dict[str, Any]:
    """Facts for the handshake; none without stages.

    ``lists`` are the layers, and ``sizes`` the numbers of weights, that agents of each
    depth send.
    """
    if not depth:
        return {}
    by_depth = {WEIGHTS_BY_DEPTH: [*sizes], LAYERS_BY_DEPTH: [len(each) for each in lists]}
    return {DEPTH: depth, **by_depth}


def _described(module: nn.Module) -> str:
    return "a part of one" if isinstance(module, Staged) else type(module).__name__


def deepest(module: nn.Module) -> nn.Module:
    """A network for who knows no depth: with the last exit alone."""
    return module.at_depth(module.num_stages) if isinstance(module, Staged) else module


def held_names(names: Iterable[str], part: Iterable[str]) -> list[str]:
    """Those of the names that a part of the network has, in their order."""
    part = {*part}
    return [name for name in names if name in part]


def fitting(keys: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Keys by layer, without those that fit deeper layers alone."""
    names = [*names]
    return {key: value for key, value in keys.items() if matches_any(key, names)}
