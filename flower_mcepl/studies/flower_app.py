"""The Flower app that a study runs, as far as a study has to know it."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flower_mcepl.config.checks import check
from flower_mcepl.config.schedules import ROUNDS
from flower_mcepl.errors import ConfigError
from flower_mcepl.launch.plan import app_settings, flat
from flower_mcepl.launch.restarts import RESUME

if TYPE_CHECKING:
    from flower_mcepl.clients.app import AgentApp


FLOWER = "flower"  # engine of a study that is Flower's simulation


@dataclass(frozen=True)
class FlowerApp:
    """A folder with ``[tool.flwr.app]`` in its ``pyproject.toml``."""

    folder: Path  # absolute, without links
    client: str  # its component clientapp, "module:attribute"
    config: dict[str, Any]  # its run config, flat as Flower makes it

    @property
    def name(self) -> str:
        """The folder's name, which Flower demands to be the app's."""
        return self.folder.name


def read_app(folder: Path) -> FlowerApp:
    """Read an app's settings.

    Raises
    ------
    ConfigError
        If `folder` holds no Flower app.
    """
    settings = app_settings(folder)
    client = settings.get("components", {}).get("clientapp")
    if not isinstance(client, str) or not client.partition(":")[2]:
        raise ConfigError(
            "a Flower app names its clientapp as 'module:attribute' in "
            f"[tool.flwr.app.components]; {folder} says {client!r}."
        )
    return FlowerApp(folder, client, flat(settings.get("config", {})))


@contextlib.contextmanager
def imported_client(app: FlowerApp) -> Iterator["AgentApp"]:
    """Import the app's ClientApp; its folder is first in ``sys.path`` meanwhile.

    Raises
    ------
    ConfigError
        If the component cannot be imported, or is not made by `make_client_app` or
        `make_agent_app`.
    """
    from flower_mcepl.clients.app import AgentApp
    from flower_mcepl.clients.named import NamedApp

    with imported_component(app) as client:
        if isinstance(client, NamedApp):
            client = client.load()
        if not isinstance(client, AgentApp):
            raise ConfigError(
                "an in-process run needs a ClientApp from make_client_app or make_agent_app; "
                f"{app.client} of "
                f"{app.folder} is {type(client).__name__}. Use them, or run the study with engine "
                '= "flower".'
            )
        yield client


@contextlib.contextmanager
def imported_component(app: FlowerApp) -> Iterator[object]:
    """Import what the app names as its clientapp; see `imported_client`.

    Raises
    ------
    ConfigError
        If a module of another app bears its name.
    """
    module_name, _, attribute = app.client.partition(":")
    folder = str(app.folder)
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
        _refuse_foreign(module.__file__, app)
        yield getattr(module, attribute, None)
    finally:
        sys.path.remove(folder)


def _refuse_foreign(file: str | None, app: FlowerApp) -> None:
    if file is None or not Path(file).resolve().is_relative_to(app.folder):
        raise ConfigError(
            f"the module of {app.client} must be that of the app in {app.folder}; Python has "
            f"loaded {file} under this name. Give the app's package a name of its own."
        )


def refuse_schedule(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a schedule says nothing, as all have one speed."""
    check(
        config.get("schedule", ROUNDS) == ROUNDS,
        "in process all agents of a study have one speed, so that no schedule but "
        f'"{ROUNDS}" says anything; schedule',
        config.get("schedule"),
        'Use engine = "flower", or simulate(schedule="async", speeds=...).',
    )


def refuse_export(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where models are to be written that no device writes."""
    check(
        not config.get("export"),
        "export writes models at the end of a run under Flower; in process it must be empty",
        config.get("export"),
        "Use flower-mcepl export on the record.",
    )


def refuse_resume(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where all runs are to go on with one that broke off."""
    check(
        not config.get(RESUME),
        "a study goes on with its runs that broke off by itself; resume must be empty",
        config.get(RESUME),
        "Leave it out.",
    )
