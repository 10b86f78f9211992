"""The tutorial on strategies: one of the user's own, whose step decays."""

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

STEPS: list[tuple[int, float]] = []

client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    config = msg.content["config"]
    STEPS.append((config["server-round"], config["lr"]))
    arrays = [m - config["lr"] * m for m in msg.content["arrays"].to_numpy_ndarrays()]
    notes = ConfigRecord({"training-time": 0.1, "converged": True})
    metrics = MetricRecord({"train_loss": 0.5, "num-examples": 4})
    content = {"arrays": ArrayRecord(arrays), "metrics": metrics, "train_metadata": notes}
    return Message(content=RecordDict(content), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    loss = sum(float((m**2).sum()) for m in msg.content["arrays"].to_numpy_ndarrays())
    metrics = MetricRecord({"eval_loss": loss, "num-examples": 4})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


class Decaying(FedAvg):
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round % 2 == 0:
            config["lr"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Decaying()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.ones(3)]),
        train_config=ConfigRecord({"lr": 0.5}),
        num_rounds=3,
    )
