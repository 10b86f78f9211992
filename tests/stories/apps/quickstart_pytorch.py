"""quickstart-pytorch: central evaluation, and a final model that is saved."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def load_data(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(32, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


def train_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float) -> float:
    net.train()
    for _ in range(3):  # by hand: the first of torch's optimizers takes seconds to import
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        for parameter in net.parameters():
            parameter.data.sub_(parameter.grad, alpha=lr)
    return loss.item()


@torch.no_grad()
def test_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    logits = net.eval()(x)
    return nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean()


client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = load_data(context.node_config["partition-id"])
    loss = train_fn(model, x, y, msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(x)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = load_data(context.node_config["partition-id"])
    loss, accuracy = test_fn(model, x, y)
    metrics = {"eval_loss": loss, "eval_acc": accuracy.item(), "num-examples": len(x)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test_fn(model, *load_data(100))
    return MetricRecord({"loss": loss, "accuracy": accuracy.item()})


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(Net().state_dict())
    strategy = FedAvg(fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": 0.1}),
        num_rounds=2,
        evaluate_fn=global_evaluate,
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")
