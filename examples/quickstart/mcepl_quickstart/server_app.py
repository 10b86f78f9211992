"""Server side: the relay."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flower_mcepl.strategies import GossipStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the gossip over the graph that the run config names."""
    run = context.run_config
    strategy = GossipStrategy.from_run_config(run, app_keys=["classes-per-agent"], name="quickstart")
    strategy.start(grid=grid, num_rounds=int(run["num-rounds"]))
