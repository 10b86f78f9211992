"""quickstart-pytorch-lightning: an autoencoder, which has a loss alone."""

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn


class LightningModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: Tensor) -> None:
        self.logged[name] = value.item()


class SGD:
    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.lr = model, lr

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.data.sub_(parameter.grad, alpha=self.lr)


class Trainer:
    def __init__(self, max_epochs: int = 1) -> None:
        self.max_epochs = max_epochs

    def fit(self, model: Any, batches: Iterable[Tensor]) -> None:
        optimizer = model.configure_optimizers()
        for _ in range(self.max_epochs):
            for index, batch in enumerate(batches):
                optimizer.zero_grad()
                model.training_step(batch, index).backward()
                optimizer.step()

    @torch.no_grad()
    def test(self, model: Any, batches: Iterable[Tensor]) -> list[dict[str, float]]:
        for index, batch in enumerate(batches):
            model.test_step(batch, index)
        return [{name: value for name, value in model.logged.items() if name.startswith("test")}]


class LitAutoEncoder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def configure_optimizers(self) -> SGD:
        return SGD(self, lr=1e-2)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.decoder(self.encoder(batch)), batch)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test_loss", nn.functional.mse_loss(self.decoder(self.encoder(batch)), batch))


def load_data(partition: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(partition))
    return x[:16], x[16:]


client = ClientApp()


def own_model(msg: Message) -> LitAutoEncoder:
    model = LitAutoEncoder()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    return model


@client.train()
def train(msg: Message, context: Context) -> Message:
    model = own_model(msg)
    data, _ = load_data(context.node_config["partition-id"])
    Trainer(max_epochs=2).fit(model, data.split(8))
    metrics = {"train_loss": model.logged["train_loss"], "num-examples": len(data)}
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    _, data = load_data(context.node_config["partition-id"])
    (results,) = Trainer().test(own_model(msg), [data])
    metrics = MetricRecord({"eval_loss": results["test_loss"], "num-examples": len(data)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    strategy.start(
        grid=grid, initial_arrays=ArrayRecord(LitAutoEncoder().state_dict()), num_rounds=2
    )
