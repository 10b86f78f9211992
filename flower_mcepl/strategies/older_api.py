"""Flower's older API: what its server calls first, and what an app does instead."""

from typing import NoReturn

from flower_mcepl.errors import ConfigError


class NotOfTheOlderApi:
    """Strategy that says so where a ``server_fn`` hands it to Flower's older server."""

    def initialize_parameters(self, client_manager: object) -> NoReturn:
        """Refuse: the older server asks for initial parameters before anything else.

        Raises
        ------
        ConfigError
            Always.
        """
        name = type(self).__name__
        raise ConfigError(
            f"{name} is a strategy of Flower's message API; server_fn, ServerAppComponents and "
            f"ServerApp(strategy=...) take those of the older one. Write app = ServerApp(), and "
            f"under @app.main() a function main(grid, context) that calls {name}(...).start("
            "grid=grid, initial_arrays=ArrayRecord(ndarrays), num_rounds=...) with what stood in "
            "initial_parameters and ServerConfig (docs/existing-apps.md)."
        )
