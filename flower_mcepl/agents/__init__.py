"""The algorithms, one a file; each is an `Agent`, and an entry of `ALGORITHMS`.

What an algorithm of one's own is made of is here, too: docs/extending.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flower_mcepl.agents.agent import (
    CLASS_FACTS,
    Agent,
    AgentState,
    Payload,
    agent_file,
    load_state,
    save_state,
)
from flower_mcepl.agents.algorithm import Algorithm, Masks
from flower_mcepl.agents.parts.training import TrainingConfig
from flower_mcepl.agents.registry import ALGORITHMS, find_algorithm, make_agent, make_server
from flower_mcepl.agents.server import Server
from flower_mcepl.agents.tasks import Metric, Task

if TYPE_CHECKING:
    from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig
    from flower_mcepl.agents.neighbor_average import NeighborAverageAgent
    from flower_mcepl.agents.own_loop import OwnLoopAgent
    from flower_mcepl.agents.parts.averaging import MixingAgent
    from flower_mcepl.agents.parts.dense import DenseAgent, SgdConfig
    from flower_mcepl.agents.parts.masked import MaskedAgent
    from flower_mcepl.agents.parts.masked_config import MaskedConfig
    from flower_mcepl.agents.parts.sparse import SparseAgent, SparseConfig

__all__ = [
    "ALGORITHMS",
    "CLASS_FACTS",
    "Agent",
    "AgentState",
    "Algorithm",
    "DenseAgent",
    "MaskedAgent",
    "MaskedConfig",
    "Masks",
    "MceplAgent",
    "MceplConfig",
    "Metric",
    "MixingAgent",
    "NeighborAverageAgent",
    "OwnLoopAgent",
    "Payload",
    "Server",
    "SgdConfig",
    "SparseAgent",
    "SparseConfig",
    "Task",
    "TrainingConfig",
    "agent_file",
    "find_algorithm",
    "load_state",
    "make_agent",
    "make_server",
    "save_state",
]

# A process loads the algorithm that its run names, and no other: these names load what
# they stand for when they are first used.
_LATER = {
    "DenseAgent": "parts.dense",
    "MaskedAgent": "parts.masked",
    "MaskedConfig": "parts.masked_config",
    "MceplAgent": "mcepl",
    "MceplConfig": "mcepl",
    "MixingAgent": "parts.averaging",
    "NeighborAverageAgent": "neighbor_average",
    "OwnLoopAgent": "own_loop",
    "SgdConfig": "parts.dense",
    "SparseAgent": "parts.sparse",
    "SparseConfig": "parts.sparse",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
