"""The server's side of server-based algorithms, one a file; each is a `Server`."""

from flower_mcepl.agents.server import Server

__all__ = ["Server"]
