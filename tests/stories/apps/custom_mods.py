"""custom-mods: what the app trained is logged by mods of its own."""

import time
from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

CallNext = Callable[[Message, Context], Message]
LOGGED: list[tuple[int, int, dict[str, float]]] = []


def get_writer_mod(name: str) -> Callable[[Message, Context, CallNext], Message]:
    """Mod that writes down the metrics of training, as one for TensorBoard would."""

    def writer_mod(msg: Message, context: Context, call_next: CallNext) -> Message:
        server_round, began = msg.content["config"]["server-round"], time.time()
        reply = call_next(msg, context)
        if reply.metadata.message_type == "train" and reply.has_content():
            found = reply.content["metrics"]
            written = {"train_loss": found["train_loss"], "fit_time": time.time() - began}
            LOGGED.append((server_round, msg.metadata.dst_node_id, written))
        return reply

    return writer_mod


client = ClientApp(mods=[get_writer_mod("runs")])


@client.train()
def train(msg: Message, context: Context) -> Message:
    arrays = [m + 1 for m in msg.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"train_loss": 0.5, "num-examples": 4})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    metrics = MetricRecord({"eval_loss": 0.25, "eval_acc": 0.75, "num-examples": 4})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg()
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.ones(3)]), num_rounds=2)
