"""Local weights: all train alone; the baseline that collaboration must beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.algorithm import Algorithm
from flower_mcepl.agents.parts.dense import DenseAgent, SgdConfig
from flower_mcepl.agents.parts.depth import DepthConfig
from flower_mcepl.agents.parts.votes import WHOLE


@dataclass(frozen=True, kw_only=True)
class LocalConfig(SgdConfig, DepthConfig):
    """Parameters of local training: SGD on weights.

    The step size is tuned on the quickstart's digits (10 agents of 3 classes on a ring,
    validation split, two seeds, 100 rounds of one mini-batch): of 0.01, 0.02, 0.03,
    0.05, 0.1, 0.3 and 1 the best; from 0.3 on nothing is learned.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    lr: float = 0.03  # η > 0


@final
class LocalAgent(DenseAgent[LocalConfig]):
    """One agent that learns alone, in whatever graph, by SGD; it sends nothing."""

    algorithm = "local"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layers = {}

    @classmethod
    def weighs_votes_with(cls, config: Any) -> bool:
        """Whether votes count: it hears none."""
        return True

    def fuse(
        self, inbox: Mapping[int, Payload], *, round: int, votes: Mapping[int, float] = WHOLE
    ) -> None:
        """Leave everything as it is."""

    def outgoing(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


LOCAL = Algorithm(LocalAgent, LocalConfig)
