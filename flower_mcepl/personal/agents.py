"""A personal model of an agent: its network, and what its file says of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from flower_mcepl.agents import Agent
from flower_mcepl.agents.tasks.network import one_output
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.personal.inputs import PIXELS
from flower_mcepl.personal.network import DEPTH, NETWORK
from flower_mcepl.personal.origins import Origin
from flower_mcepl.personal.writing import personal_bytes

PICKS = "picks-output"  # fact of a file: `Task.outputs` is a function of the app's own
_TOLD = ("task", "main-metric", "higher-is-better", "metric-unit")  # of the handshake


def save_agent(
    agent: Agent,
    path: str | Path,
    *,
    round: int | None = None,
    network: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> int:
    """Write an agent's personal model as a ``.mask`` file; return its size in bytes.

    Parameters
    ----------
    agent : Agent
        The agent, trained or restored.
    path : str or Path
        The file; its folder must be there.
    round : int, optional
        The round that its state is of.
    network : mapping, optional
        Who builds the network, see `reference_to`.
    metrics : mapping, optional
        What its evaluation gave.
    pixels : mapping, optional
        ``mean`` and ``std``, by which images become inputs.

    Raises
    ------
    ConfigError
        If the agent's algorithm has no network to hand out.
    """
    data = agent_bytes(agent, round=round, reference=network, metrics=metrics, pixels=pixels)
    replace_file(Path(path), data)
    return len(data)


def agent_bytes(
    agent: Agent,
    *,
    network: nn.Module | None = None,
    drawn: bool = True,
    round: int | None = None,
    reference: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes that `save_agent` writes.

    ``network`` is another one in the place of the agent's own; one whose weights are
    not ``drawn`` by the run's seed has them stored, whatever they are now.
    """
    handshake = agent.describe()
    facts = {
        "algorithm": agent.algorithm,
        "agent": agent.index,
        "seed": agent.seed,
        **({} if round is None else {"round": round}),
        **({DEPTH: agent.depth} if agent.depth else {}),
        **{key: handshake[key] for key in _TOLD if key in handshake},
        **({} if own_outputs(agent) is None else {PICKS: True}),
        **({NETWORK: dict(reference)} if reference else {}),
        **({"metrics": dict(metrics), "metrics-of": _evaluated(agent)} if metrics else {}),
        **({PIXELS: dict(pixels)} if pixels else {}),
    }
    return personal_bytes(
        personal_network(agent) if network is None else network,
        origin=Origin(agent.seed, agent.index) if drawn else None,
        facts=facts,
        fingerprint=agent.fingerprint,
        input_shape=input_shape(agent),
    )


def _evaluated(agent: Agent) -> str:
    """Split that an agent's metrics are of: "test" or "validation"."""
    return str(getattr(getattr(agent, "data", None), "evaluated", "test"))


def own_outputs(agent: Agent) -> Callable[[Any], Tensor] | None:
    """What picks predictions from what the network returns, if the task has its own."""
    task = getattr(getattr(agent, "learner", None), "task", None)
    outputs: Callable[[Any], Tensor] = getattr(task, "outputs", one_output)
    return None if outputs is one_output else outputs


@final
class Picked(nn.Module):
    """A network that returns what ``outputs`` picks from its outputs."""

    def __init__(self, network: nn.Module, outputs: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions for a batch."""
        return self.outputs(self.network(inputs))


def personal_network(agent: Agent) -> nn.Module:
    """The network of an agent on the CPU, in eval mode, without gradients."""
    return agent.personal_model().cpu().eval().requires_grad_(False)


def predicting_network(agent: Agent) -> nn.Module:
    """The same, but what it returns is what the agent's task predicts with."""
    network, outputs = personal_network(agent), own_outputs(agent)
    return network if outputs is None else Picked(network, outputs).eval()


def input_shape(agent: Agent) -> tuple[int, ...] | None:
    """Shape of one example as a batch, where inputs are one tensor of floats."""
    data = getattr(agent, "data", None)
    batches = data.test.evaluation_batches(batch_size=1) if data is not None else ()
    for inputs, _ in batches:
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            return tuple(inputs.shape)
        break
    return None
