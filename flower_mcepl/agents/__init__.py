"""The algorithms, one a file; each is an `Agent`."""

from flower_mcepl.agents.agent import (
    CLASS_FACTS,
    Agent,
    AgentState,
    Payload,
    agent_file,
    load_state,
    save_state,
)
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig
from flower_mcepl.agents.neighbor_average import NeighborAverageAgent
from flower_mcepl.agents.own_loop import OwnLoopAgent
from flower_mcepl.agents.registry import ALGORITHMS, find_algorithm, make_agent, make_server

__all__ = [
    "ALGORITHMS",
    "CLASS_FACTS",
    "Agent",
    "AgentState",
    "MceplAgent",
    "MceplConfig",
    "NeighborAverageAgent",
    "OwnLoopAgent",
    "Payload",
    "agent_file",
    "find_algorithm",
    "load_state",
    "make_agent",
    "make_server",
    "save_state",
]
