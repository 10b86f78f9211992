"""Server side: the relay."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flower_mcepl.strategies import GossipStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the gossip over the graph that the run config names."""
    strategy = GossipStrategy.from_run_config(context.run_config, app_keys=["classes-per-agent"], name="quickstart")
    strategy.start(grid=grid)
