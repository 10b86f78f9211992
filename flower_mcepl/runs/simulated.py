"""Whether this process belongs to a simulation of Flower's, or to a deployment."""

import sys


def in_simulation() -> bool:
    """Whether this process is of a Ray simulation, and no device or server."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
