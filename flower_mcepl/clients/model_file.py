"""Personal model of an agent as a file, at the end of a run (``export``)."""

from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import Array, Context

from flower_mcepl.agents import Agent, agent_file
from flower_mcepl.clients.device import device_settings
from flower_mcepl.messages.order import Order
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.runs.best import BEST
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.settings import DeviceSettings
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.streams import torch_threads

MODELS = "models"  # below a device's state-dir
logger = getLogger("flwr")


# A model that cannot be written costs the file and never the answer, whatever a user's
# network does to an exporter: the state is kept by then.
def export_last_model(
    agent: Agent,
    last: Generation,
    metrics: Mapping[str, float],
    *,
    order: Order[Array],
    context: Context,
    model_fn: Callable[[Context], Any] | None,
) -> None:
    """Write the agent's best model, or its last where none was kept; log the file."""
    settings = device_settings(context)
    if not settings.export or order.parcel.train:
        return
    from flower_mcepl.personal.files import Exported, export_model
    from flower_mcepl.personal.network import reference_to_app

    name = Path(agent_file(agent.index)).with_suffix(EXPORTS[settings.export])
    to, round = _folder(order, settings) / name, last.round
    try:
        with torch_threads(settings.threads):
            if last.best is not None:
                agent.restore(last.best)
                metrics, round = {}, last.best.facts[BEST]["round"]
            network = (
                reference_to_app(model_fn, context.run_config, context.node_config)
                if model_fn
                else {}
            )
            to.parent.mkdir(parents=True, exist_ok=True)
            lines = export_model(Exported(agent, round, metrics, network), to)
    except Exception as error:
        logger.warning(f"agent {agent.index}: its model was not exported to {to}: {error}")
        return
    for line in lines:
        logger.info(f"agent {agent.index}: {line}")


def _folder(order: Order[Array], settings: DeviceSettings) -> Path:
    """Run record where an agent is simulated; else a folder of the device, by run."""
    if in_simulation() and order.agents_dir:
        return Path(order.agents_dir)
    root = settings.state_folder()
    assert root is not None  # refused beside export
    return root / MODELS / order.run
