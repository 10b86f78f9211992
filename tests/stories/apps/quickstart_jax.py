"""quickstart-jax: a train state with a tree of parameters; nothing is mutated."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

Tree = dict[str, dict[str, NDArray[np.float32]]]


def leaves(tree: Tree) -> list[NDArray[np.float32]]:
    return [tree[layer][name] for layer in sorted(tree) for name in sorted(tree[layer])]


def unflatten(like: Tree, values: list[NDArray[np.float32]]) -> Tree:
    rest = iter(values)
    return {layer: {name: next(rest) for name in sorted(like[layer])} for layer in sorted(like)}


@dataclass(frozen=True)
class TrainState:
    params: Tree
    lr: float

    def apply_gradients(self, grads: Tree) -> "TrainState":
        moved = [p - self.lr * g for p, g in zip(leaves(self.params), leaves(grads), strict=True)]
        return replace(self, params=unflatten(self.params, [x.astype(np.float32) for x in moved]))


def create_train_state(lr: float) -> TrainState:
    dense = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    return TrainState({"Dense_0": dense}, lr)


def apply_model(state: TrainState, batch: dict[str, Any]) -> tuple[Tree, Any, Any]:
    dense, x, y = state.params["Dense_0"], batch["image"], batch["label"]
    logits = x @ dense["kernel"] + dense["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    away = (p - np.eye(2, dtype=np.float32)[y]) / len(x)
    loss = -np.log(p[np.arange(len(x)), y]).mean()
    grads = {"Dense_0": {"kernel": x.T @ away, "bias": away.sum(0)}}
    return grads, loss, (logits.argmax(1) == y).mean()


def load_data(partition: int) -> list[dict[str, Any]]:
    x = np.random.default_rng(partition).normal(size=(4, 8, 3)).astype(np.float32)
    return [{"image": part, "label": (part[:, 0] > 0).astype(int)} for part in x]


client = ClientApp()


def own_state(msg: Message) -> TrainState:
    state = create_train_state(lr=0.5)
    return replace(state, params=unflatten(state.params, msg.content["arrays"].to_numpy_ndarrays()))


@client.train()
def train(msg: Message, context: Context) -> Message:
    state = own_state(msg)
    for batch in load_data(context.node_config["partition-id"]):
        grads, loss, accuracy = apply_model(state, batch)
        state = state.apply_gradients(grads)
    metrics = {"train_loss": float(loss), "train_acc": float(accuracy), "num-examples": 32}
    content = {"arrays": ArrayRecord(leaves(state.params)), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    state = own_state(msg)
    parts = [apply_model(state, b)[1:] for b in load_data(10 + context.node_config["partition-id"])]
    loss, accuracy = np.mean(parts, axis=0)
    metrics = {"eval_loss": float(loss), "eval_acc": float(accuracy), "num-examples": 32}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(leaves(create_train_state(lr=0.5).params))
    strategy = FedAvg()
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2)
