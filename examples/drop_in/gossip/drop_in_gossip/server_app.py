"""Server: which strategy, which model to begin with."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_mcepl import Topology
from flower_mcepl.strategies import GossipStrategy

from .task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy."""
    torch.manual_seed(1)
    arrays = ArrayRecord(Net().state_dict())
    strategy = GossipStrategy(topology=Topology.ring(10))
    strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=context.run_config["num-server-rounds"]
    )
