"""The algorithms, one a file; each is an `Agent`."""

from flower_mcepl.agents.agent import Agent, AgentState, Payload, agent_file, load_state, save_state
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig

__all__ = ["Agent", "AgentState", "MceplAgent", "MceplConfig", "Payload", "agent_file", "load_state", "save_state"]
