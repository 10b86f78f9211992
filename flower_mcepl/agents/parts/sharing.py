"""Which layers an agent shares with others; the rest is personal."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flower_mcepl.agents.handshake import SHARE
from flower_mcepl.agents.parts.groups import Shapes
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.config.checks import check
from flower_mcepl.config.patterns import best_key, matches_any
from flower_mcepl.errors import ConfigError

ALL = "*"


@dataclass(frozen=True, kw_only=True)
class SharingConfig(TrainingConfig):
    """Parameters of local training and of what is shared.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    # names or patterns of the parameters that are sent and fused, "conv*, fc1.weight";
    # the others are personal: neither sent nor fused, nor known to anyone. "*": all
    share: str = ALL

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            all(patterns_of(self.share)),
            "share must be names or patterns of parameters, separated by commas",
            self.share,
            'Use "*" for all of them, and an algorithm without neighbors, such as local or '
            "local-masks, for none.",
        )


def patterns_of(share: str) -> list[str]:
    """Patterns of a key ``share``."""
    return [part.strip() for part in str(share).split(",")]


def shared_names(share: str, names: Iterable[str]) -> list[str]:
    """Names that match one of the patterns, in their order.

    Raises
    ------
    ConfigError
        If a pattern matches none.
    """
    names, patterns = list(names), patterns_of(share)
    for pattern in patterns:
        if not matches_any(pattern, names):
            raise ConfigError(
                f"the pattern {pattern!r} of share matches nothing that could be sent; use names "
                f"or patterns of: {', '.join(names)}."
            )
    return [name for name in names if best_key(name, patterns) is not None]


def shared_shapes(config: TrainingConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of the shared tensors; of all where the algorithm knows no ``share``."""
    share = config.share if isinstance(config, SharingConfig) else ALL
    return {name: shapes[name] for name in shared_names(share, shapes)}


def share_fact(config: TrainingConfig) -> Mapping[str, Any]:
    """Fact for the handshake: what is shared, where that is not everything."""
    share = config.share if isinstance(config, SharingConfig) else ALL
    return {} if share == ALL else {SHARE: ", ".join(patterns_of(share))}


def num_elements(shapes: Shapes) -> int:
    """Number of elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())
