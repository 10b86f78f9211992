"""ClientApp whose functions are named, and loaded where the rounds are played."""

import contextlib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, final

from flwr.app import Context, RecordDict

from flower_mcepl.clients import resident
from flower_mcepl.clients.message_app import MessageApp, Mod
from flower_mcepl.clients.seats import Finish
from flower_mcepl.config.fields import read_fields
from flower_mcepl.errors import ConfigError
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.runs.worker_settings import RESIDENT, WorkerSettings

if TYPE_CHECKING:
    from flower_mcepl.clients.app import AgentApp

# By the app's id: Ray pickles the app for every message, and what was loaded for the
# first one serves them all.
_loaded: "dict[str, AgentApp]" = {}


class Names(NamedTuple):
    """Names of an app's functions, each "module:attribute"."""

    model_fn: str
    data_fn: str
    task: str | None = None


@final
class NamedApp(MessageApp):
    """ClientApp that plays one agent, on a device in its resident worker."""

    def __init__(self, names: Names, mods: Sequence[Mod] = ()) -> None:
        super().__init__(mods)
        for name in names:
            _check_name(name)
        self.names = names

    def load(self) -> "AgentApp":
        """App of the named functions, loaded into this process."""
        if self.id not in _loaded:
            _loaded[self.id] = load_app(self.names, id=self.id)
        return _loaded[self.id]

    def begin(
        self, content: RecordDict, context: Context, opened: contextlib.ExitStack
    ) -> tuple[RecordDict, Finish]:
        """Play the round in the resident worker, or here; see `MessageApp.begin`."""
        settings = read_fields(WorkerSettings, {**context.run_config, **context.node_config})
        if in_simulation() or settings.worker != RESIDENT or not resident.AVAILABLE:
            return self.load().begin(content, context, opened)
        return resident.begin(self.names, content, context, opened, idle=settings.worker_idle)


def load_app(names: Names, *, id: str) -> "AgentApp":
    """App of the named functions, under the ``id`` of the app that names them.

    Raises
    ------
    ConfigError
        If a module has no such attribute.
    """
    from flower_mcepl.clients.app import app_of_functions

    model_fn, data_fn = _attribute(names.model_fn), _attribute(names.data_fn)
    task = None if names.task is None else _attribute(names.task)
    app = app_of_functions(model_fn, data_fn, task=task)  # type: ignore[arg-type]
    app.id = id
    return app


def _check_name(name: str | None) -> None:
    module, _, attribute = (name or "module:attribute").partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ConfigError(
            'a function given by name is named as "module:attribute", such as '
            f'"my_app.task:model_fn"; got {name!r}.'
        )


def _attribute(name: str) -> object:
    module, _, attribute = name.partition(":")
    place: object = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(place, part):
            raise ConfigError(
                f"make_client_app names {name}, and {module} has no {attribute}. Correct the name."
            )
        place = getattr(place, part)
    return place
