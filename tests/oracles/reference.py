"""The frozen reference trajectory as agents: the tiny network, its first state and its
mini-batches.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flower_mcepl.agents import AgentState, MceplAgent, MceplConfig
from flower_mcepl.data.batches import AgentData

VECTORS = dict(np.load(Path(__file__).parents[1] / "vectors" / "mcepl_tiny.npz"))
NUM_AGENTS, NUM_ROUNDS = 4, 6
LAYERS = ("conv1", "conv2", "fc")
SEED = 0


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.elu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(nn.functional.elu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


def reference_module() -> nn.Module:
    net = TinyNet()
    with torch.no_grad():
        for layer in LAYERS:
            getattr(net, layer).weight.copy_(torch.from_numpy(VECTORS[f"weight.{layer}"]))
        net.fc.bias.copy_(torch.from_numpy(VECTORS["bias.fc"]))
    return net


class FrozenBatches:
    """The recorded mini-batches, one a round; the last one for evaluation."""

    num_examples = 16

    def __init__(self, agent: int) -> None:
        self.agent = agent

    def batch(self, round: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(VECTORS[f"{part}.{round}.{self.agent}"]) for part in "xy")

    def training_batches(self, *, round: int, **_: object) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch(round)

    def evaluation_batches(self, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch(NUM_ROUNDS)


def reference_config(agent: int) -> MceplConfig:
    return MceplConfig(
        retention={
            "conv": float(VECTORS["retention_conv"][agent]),
            "linear": float(VECTORS["retention_linear"]),
        },
        # common; the trajectory starts from a recorded mask anyway
        first_retention={"conv": 0.3, "linear": 0.9},
        score_lr=float(VECTORS["score_lr"]),
        finetune_lr=float(VECTORS["finetune_lr"]),
        weight_decay=float(VECTORS["weight_decay"]),
    )


def reference_state(agent: MceplAgent) -> AgentState:
    """The agent's state before round 1: recorded scores, and the recorded common mask
    as the neighbors'.
    """
    fresh = agent.state()
    tensors = dict(fresh.tensors)
    for layer in LAYERS:
        tensors[f"scores/{layer}.weight"] = torch.from_numpy(
            VECTORS[f"scores0.{agent.index}.{layer}"]
        ).clone()
        tensors[f"neighbor-count/{layer}.weight"] = torch.from_numpy(VECTORS[f"mask0.{layer}"]).to(
            torch.uint8
        )
    return AgentState.of_tensors({**fresh.facts, "num-neighbors": 1}, tensors)


def reference_agent(index: int) -> MceplAgent:
    batches = FrozenBatches(index)
    data = AgentData.of(batches, batches, agent=index)
    agent = MceplAgent(index, reference_module(), data, reference_config(index), seed=SEED)
    agent.restore(reference_state(agent))
    return agent


def recorded_masks(kind: str, round: int, agent: int) -> dict[str, Tensor]:
    return {
        f"{layer}.weight": torch.from_numpy(VECTORS[f"{kind}.{round}.{agent}.{layer}"])
        for layer in LAYERS
    }
