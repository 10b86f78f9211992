"""quickstart-sklearn: arrays without names, and many metrics."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


class LogisticRegression:
    """An estimator that goes on from where it was, as with ``warm_start=True``."""

    coef_: Floats
    intercept_: Floats

    def fit(self, x: Floats, y: Labels) -> None:
        for _ in range(3):
            away = (self.predict_proba(x) - y) / len(x)
            self.coef_ = self.coef_ - away @ x
            self.intercept_ = self.intercept_ - away.sum()

    def predict_proba(self, x: Floats) -> Floats:
        return 1 / (1 + np.exp(-(x @ self.coef_[0] + self.intercept_)))

    def predict(self, x: Floats) -> Labels:
        return (self.predict_proba(x) > 0.5).astype(int)

    def score(self, x: Floats, y: Labels) -> float:
        return float((self.predict(x) == y).mean())


def log_loss(y: Labels, p: Floats) -> float:
    return float(-np.log(np.where(y == 1, p, 1 - p)).mean())


def precision_recall(y: Labels, guess: Labels) -> tuple[float, float]:
    hits = int((y & guess).sum())
    return hits / max(int(guess.sum()), 1), hits / max(int(y.sum()), 1)


def set_params(model: LogisticRegression, arrays: list[Floats]) -> None:
    model.coef_, model.intercept_ = arrays


def create_model() -> LogisticRegression:
    model = LogisticRegression()
    set_params(model, [np.zeros((1, 5)), np.zeros(1)])
    return model


def load_data(partition: int) -> tuple[Floats, Labels]:
    x = np.random.default_rng(partition).normal(size=(60, 5))
    return x, (x[:, 0] + x[:, 1] > 0).astype(int)


client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    model = create_model()
    set_params(model, msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"])
    model.fit(x[:40], y[:40])
    metrics = {
        "num-examples": 40,
        "train_logloss": log_loss(y[:40], model.predict_proba(x[:40])),
        "train_accuracy": model.score(x[:40], y[:40]),
    }
    arrays = ArrayRecord([model.coef_, model.intercept_])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = create_model()
    set_params(model, msg.content["arrays"].to_numpy_ndarrays())
    x, y = load_data(context.node_config["partition-id"])
    x, y = x[40:], y[40:]
    precision, recall = precision_recall(y, model.predict(x))
    metrics = {
        "num-examples": len(x),
        "test_logloss": log_loss(y, model.predict_proba(x)),
        "accuracy": model.score(x, y),
        "precision": precision,
        "recall": recall,
    }
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    model = create_model()
    arrays = ArrayRecord([model.coef_, model.intercept_])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2)
