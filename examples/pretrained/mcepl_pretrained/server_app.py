"""Server side: the relay, or the server of a server-based algorithm."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flower_mcepl.strategies import make_strategy
from mcepl_pretrained.task import model_fn

APP_KEYS = ["partition", "train-fraction", "validation-fraction", "test-fraction", "stratify"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the algorithm that the run config names."""
    strategy = make_strategy(context, model_fn, app_keys=APP_KEYS, name="pretrained")
    strategy.start(grid=grid)
