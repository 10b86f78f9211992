"""Server side: the relay, or the server of a server-based algorithm."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flower_mcepl.strategies import make_strategy
from mcepl_cifar10.task import model_fn

APP_KEYS = [
    "data",
    "cache",
    "partition",
    "train-fraction",
    "validation-fraction",
    "stratify",
    "test-split",
    "augment",
    "network",
    "width",
]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the algorithm that the run config names."""
    strategy = make_strategy(context, model_fn, app_keys=APP_KEYS, name="cifar10")
    strategy.start(grid=grid)
