"""Number of an agent's local steps, for those that say it."""

from flower_mcepl.agents.agent import Agent
from flower_mcepl.agents.own_loop import OwnLoopAgent
from flower_mcepl.agents.parts.training import TrainingConfig


def local_steps(agent: Agent) -> int | None:
    """Mini-batches that the agent takes in a round; None where it counts none."""
    config, data = getattr(agent, "config", None), getattr(agent, "data", None)
    if isinstance(agent, OwnLoopAgent) or not isinstance(config, TrainingConfig) or data is None:
        return None
    return config.num_steps(data.train.num_examples)
