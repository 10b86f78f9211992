"""Flower client side: one agent inside a ClientApp."""

from flower_mcepl.clients.app import make_agent_app, make_client_app

__all__ = ["make_agent_app", "make_client_app"]
