"""quickstart-numpy: random numbers for a model, neither accuracy nor loss."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

RANDOM = np.random.default_rng()

client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    model = [m + RANDOM.random(m.shape) for m in msg.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"random_metric": RANDOM.random(), "num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(model), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    metrics = MetricRecord({"random_metric": RANDOM.random(3).tolist(), "num-examples": 1})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg()
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.ones((2, 3))]), num_rounds=2)
