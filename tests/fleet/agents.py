"""Small agents on made-up data, for tests that need a fleet and not a result."""

from typing import Any

import torch
from torch import Tensor, nn

from flower_mcepl import Agent, AgentData, MceplAgent, MceplConfig, decode_frame, shared_module
from flower_mcepl.wire import Frame, Reference, read_header

SEED = 7


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def noisy_net() -> nn.Module:
    """A network with everything that has a state or draws at random: batch norm and
    dropout.
    """
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, 3),
    )


def split(agent: int, *, size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + agent)
    labels = torch.randint(3, (size,), generator=generator)
    inputs = torch.randn(size, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return inputs, labels


def make_agent(
    index: int,
    *,
    model_fn: Any = small_net,
    seed: int = SEED,
    kind: type[MceplAgent] = MceplAgent,
    data_of: int | None = None,
    **config: Any,
) -> MceplAgent:
    """``data_of`` is the agent whose data it holds, by default its own."""
    settings = MceplConfig(**{"batch_size": 8, "score_lr": 1.0, "finetune_lr": 1.0, **config})
    owner = index if data_of is None else data_of
    data = AgentData.of(split(owner), split(1000 + owner), agent=index)
    return kind(index, shared_module(model_fn, seed=seed), data, settings, seed=seed)


def make_fleet(size: int, **options: Any) -> list[MceplAgent]:
    return [make_agent(index, **options) for index in range(size)]


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def without_run(frame: bytes) -> tuple[bytes, str, bytes, bytes]:
    """Parts of a frame that do not bind it to its run."""
    return frame[:20], read_header(frame).content, frame[36:40], frame[40:-8]


class Reader:
    """Reads an agent's frames as one who has read all earlier ones."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        first = agent.first_payload()
        self.held = {} if first is None else {0: Reference(0, first)}

    def read(self, frame: bytes) -> Frame:
        agent = self.agent
        found = decode_frame(
            frame,
            fingerprint=agent.fingerprint,
            layers=agent.layers,
            sender=agent.index,
            references=[*self.held.values()],
            prior=agent.prior,
            run=None,
        )
        self.held[found.header.round] = found.as_reference()
        return found
