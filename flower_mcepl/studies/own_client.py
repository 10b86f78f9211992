"""ClientApps of an app's own: of these no agent can be built before a run."""

from dataclasses import dataclass

from flower_mcepl.errors import ConfigError
from flower_mcepl.studies.flower_app import FlowerApp, imported_component

_MOVE = "Move it over (docs/existing-apps.md, Apps of the older API), or use make_client_app."
_ADD = (
    "Where the server runs GossipStrategy: ClientApp(mods=[neighbor_average_mod]), or "
    "make_client_app. Nothing, where it runs a strategy of Flower's."
)


@dataclass(frozen=True)
class OwnClient:
    """A ClientApp of neither `make_client_app` nor `make_agent_app`."""

    what: str
    remedy: str  # empty where a run needs none


def own_client(app: FlowerApp) -> OwnClient | None:
    """What a ClientApp of the app's own is; None where agents can be built of it.

    Raises
    ------
    ConfigError
        If what the app names is no ClientApp at all.
    """
    from flower_mcepl.clients.message_app import MessageApp
    from flower_mcepl.clients.mods import NeighborAverageMod

    with imported_component(app) as client:
        if not callable(client):
            raise ConfigError(
                f"a clientapp is a ClientApp; {app.client} is {type(client).__name__}."
            )
        if isinstance(client, MessageApp):
            return None
        # private names of Flower's, which has no public ones for them
        mods, is_older = getattr(client, "_mods", ()), getattr(client, "_call", None) is not None
    if is_older:
        return OwnClient("a ClientApp of Flower's older API (client_fn)", _MOVE)
    if any(isinstance(mod, NeighborAverageMod) for mod in mods):
        return OwnClient("the app's own ClientApp, averaging by neighbor_average_mod", "")
    return OwnClient("the app's own ClientApp, without neighbor_average_mod", _ADD)
