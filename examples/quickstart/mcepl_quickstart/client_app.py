"""Device side: which network, which data."""

from flwr.app import Context

from flower_mcepl.clients import make_client_app
from mcepl_quickstart.task import Net, load_data


def data_fn(context: Context):
    """Return the training and test split of the agent that this node is."""
    run = context.run_config
    return load_data(
        int(context.node_config["partition-id"]),
        num_agents=int(run["num-agents"]),
        classes_per_agent=int(run["classes-per-agent"]),
        seed=int(run["seed"]),
    )


app = make_client_app(model_fn=lambda context: Net(), data_fn=data_fn)
