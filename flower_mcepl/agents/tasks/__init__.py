"""Tasks: what agents learn to predict, the same for every algorithm."""

from flower_mcepl.agents.tasks.task import Metric, Task, find_task

__all__ = ["Metric", "Task", "find_task"]
