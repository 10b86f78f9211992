"""The algorithms, one a file; each is an `Agent`."""

from flower_mcepl.agents.agent import Agent, AgentState, Payload, load_state, save_state
from flower_mcepl.agents.mcepl import MceplAgent, MceplConfig

__all__ = ["Agent", "AgentState", "MceplAgent", "MceplConfig", "Payload", "load_state", "save_state"]
