"""Personal model of an agent as a file, at the end of a run (``export``)."""

from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import Array, Context

from flower_mcepl.agents import Agent
from flower_mcepl.clients.device import device_settings
from flower_mcepl.errors import FlowerMceplError
from flower_mcepl.messages.order import Order
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.simulated import in_simulation

MODELS = "models"  # below a device's state-dir
logger = getLogger("flwr")


# A model that cannot be written costs the file and never the answer: the state is kept,
# and `flower-mcepl export` can be tried again with the reason at hand.
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
    kind = device_settings(context).export
    if not kind or order.parcel.train:
        return
    from flower_mcepl.personal.files import FORMATS, Exported, export_model
    from flower_mcepl.personal.network import reference_to_app

    to = _folder(order, context) / f"agent-{agent.index:04d}{FORMATS[kind]}"
    try:
        if last.best is not None:
            agent.restore(last.best)
            metrics = {}
        network = (
            reference_to_app(model_fn, context.run_config, context.node_config) if model_fn else {}
        )
        to.parent.mkdir(parents=True, exist_ok=True)
        model = Exported(agent, last.round, metrics, network)
        for line in export_model(model, to):
            logger.info(f"agent {agent.index}: {line}")
    except (FlowerMceplError, OSError) as error:
        logger.warning(f"agent {agent.index}: its model was not exported to {to}: {error}")


def _folder(order: Order[Array], context: Context) -> Path:
    """Run record where an agent is simulated; else a folder of the device, by run."""
    if in_simulation() and order.agents_dir:
        return Path(order.agents_dir)
    root = device_settings(context).state_folder()
    assert root is not None  # refused beside export
    return root / MODELS / order.run
