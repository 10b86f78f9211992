"""Whether this process belongs to a simulation of Flower's, or to a deployment."""

import sys


def in_simulation() -> bool:
    """Whether this process is of a Ray simulation, and no device or server."""
    # Flower's simulation imports it in one thread while the ServerApp begins in another
    initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
    return initialized is not None and bool(initialized())
