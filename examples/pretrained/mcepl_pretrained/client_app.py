"""Device side: which network, which data."""

from flwr.app import Context

from flower_mcepl.clients import make_client_app
from flower_mcepl.data import DataSettings
from mcepl_pretrained.task import load_data, model_fn


def data_fn(context: Context):
    """Return the training, validation and test split of the agent that this node is."""
    run = context.run_config
    return load_data(
        int(context.node_config["partition-id"]),
        num_agents=int(run["num-agents"]),
        settings=DataSettings.from_run_config(run),
        seed=int(run["seed"]),
    )


app = make_client_app(model_fn=model_fn, data_fn=data_fn)
