"""quickstart-tensorflow: a compiled model with fit, evaluate and save."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

Array = NDArray[np.float32]


class KerasModel:
    """One dense layer with a sigmoid, in the manner of keras."""

    def __init__(self) -> None:
        self._weights = [np.zeros((3, 1), np.float32), np.zeros(1, np.float32)]

    def get_weights(self) -> list[Array]:
        return [x.copy() for x in self._weights]

    def set_weights(self, weights: list[Array]) -> None:
        if [x.shape for x in weights] != [x.shape for x in self._weights]:
            raise ValueError(f"expected 2 weights, got {len(weights)}")
        self._weights = [np.asarray(x, np.float32) for x in weights]

    def fit(self, x: Array, y: Array, epochs: int, verbose: int) -> SimpleNamespace:
        history: dict[str, list[float]] = {"loss": [], "accuracy": []}
        for _ in range(epochs):
            away = (self._predict(x) - y)[:, None] / len(x)
            self._weights[0] -= 2 * (x.T @ away)
            self._weights[1] -= 2 * away.sum(0)
            for entries, value in zip(history.values(), self.evaluate(x, y), strict=True):
                entries.append(value)
        return SimpleNamespace(history=history)

    def evaluate(self, x: Array, y: Array, verbose: int = 0) -> tuple[float, float]:
        p = self._predict(x).clip(1e-6, 1 - 1e-6)
        loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        return float(loss), float(((p > 0.5) == y).mean())

    def save(self, path: str) -> None:
        Path(path).write_bytes(b"".join(x.tobytes() for x in self._weights))

    def _predict(self, x: Array) -> Array:
        return 1 / (1 + np.exp(-(x @ self._weights[0] + self._weights[1])[:, 0]))


def load_data(partition: int) -> tuple[Array, Array]:
    x = np.random.default_rng(partition).normal(size=(32, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.float32)


client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    model = KerasModel()
    model.set_weights(msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"])
    history = model.fit(x, y, epochs=2, verbose=0).history
    metrics = {
        "num-examples": len(x),
        "train_loss": history["loss"][-1],
        "train_acc": history["accuracy"][-1],
    }
    content = {"arrays": ArrayRecord(model.get_weights()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = KerasModel()
    model.set_weights(msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(10 + context.node_config["partition-id"])
    loss, accuracy = model.evaluate(x, y, verbose=0)
    metrics = {"eval_acc": accuracy, "eval_loss": loss, "num-examples": len(x)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    model = KerasModel()
    strategy = FedAvg(fraction_train=1.0)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(model.get_weights()), num_rounds=2
    )
    model.set_weights(result.arrays.to_numpy_ndarrays())
    model.save("final_model.keras")
