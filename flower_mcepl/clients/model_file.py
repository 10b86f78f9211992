"""Personal model of an agent as a file, at the end of a run (``export``)."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
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
) -> dict[str, bytes]:
    """Export the agent's best model, or its last where none was kept; log the file.

    A device keeps it. Of a simulated agent it is handed over to the relay: returned, by
    the ending of the file's name.
    """
    settings = device_settings(context)
    if not settings.export or order.parcel.train:
        return {}
    name = Path(agent_file(agent.index)).with_suffix(EXPORTS[settings.export])
    export = partial(_export, agent, last, metrics, context=context, model_fn=model_fn)
    if not (order.store and in_simulation()):
        root = settings.state_folder()
        assert root is not None  # refused beside export
        to = root / MODELS / order.run / name
        export(to, shown=str(to))
        return {}
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / name
        return {to.suffix: to.read_bytes()} if export(to, shown=to.name) else {}


def _export(
    agent: Agent,
    last: Generation,
    metrics: Mapping[str, float],
    to: Path,
    *,
    shown: str,
    context: Context,
    model_fn: Callable[[Context], Any] | None,
) -> bool:
    """Write the file, and log it under the name to be shown; whether that went well."""
    from flower_mcepl.personal.files import Exported, export_model
    from flower_mcepl.personal.network import reference_to_app

    round = last.round - 1  # the closing exchange begins one that nobody trains in
    evaluation = {name: value for name, value in metrics.items() if name != "seconds"}
    try:
        with torch_threads(device_settings(context).threads):
            if last.best is not None:
                agent.restore(last.best)
                evaluation, round = {}, last.best.facts[BEST]["round"]
            network = (
                reference_to_app(model_fn, context.run_config, context.node_config)
                if model_fn
                else {}
            )
            to.parent.mkdir(parents=True, exist_ok=True)
            lines = export_model(Exported(agent, round, evaluation, network), to)
    except Exception as error:
        logger.warning(f"agent {agent.index}: its model was not exported to {shown}: {error}")
        return False
    for line in lines:
        logger.info(f"agent {agent.index}: {line.replace(str(to), shown)}")
    return True
