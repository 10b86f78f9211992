"""Tasks: what agents learn to predict, the same for every algorithm."""

from flower_mcepl.agents.tasks.tally import Metric
from flower_mcepl.agents.tasks.task import Task, find_task

__all__ = ["Metric", "Task", "find_task"]
