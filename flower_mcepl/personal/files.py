"""Files of personal models: ``.mask``, ``.pt2`` and ``.onnx``, one door for all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flower_mcepl.agents import Agent, TrainingConfig
from flower_mcepl.agents.tasks.network import one_output, taken
from flower_mcepl.errors import ConfigError, DataError
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.weight_init import SIGNED_CONSTANT
from flower_mcepl.personal.agents import predicting_network, save_agent
from flower_mcepl.personal.compacting import compact_or_whole
from flower_mcepl.personal.exporting import export_onnx, export_program, tensor_batches
from flower_mcepl.personal.reading import read_personal
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.record.values import human_bytes

ALIKE = 1e-3  # outputs of an input in batches of two sizes, relative to the largest


@dataclass(frozen=True)
class Exported:
    """An agent as it was trained or restored, and what is known of its model."""

    agent: Agent
    round: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)  # who builds it
    whole: bool = False  # empty filters stay
    # how images become inputs; empty: nobody said
    pixels: Mapping[str, Any] = field(default_factory=dict)


def export_model(model: Exported, to: Path) -> list[str]:
    """Write an agent's personal model as a file that runs, and say what came out.

    A ``.mask`` file is read back to the same bits; a ``.pt2`` or ``.onnx`` file is of
    the compact network, and gives what the agent's gives on its evaluated split.

    Raises
    ------
    ConfigError
        If the file's ending is none of `EXPORTS`, or the agent has no such model.
    UnsupportedLayerError
        If the network cannot be written so.
    """
    check_ending(to)
    lines = (_write_mask if to.suffix == EXPORTS["mask"] else _write_graph)(model, to)
    return [*lines, *_beside_others(model.agent)]


def check_ending(to: Path) -> None:
    """Raise ConfigError unless a file's ending is one of `EXPORTS`."""
    if to.suffix not in EXPORTS.values():
        raise ConfigError(
            f"a model is exported to a file ending in {', '.join(EXPORTS.values())}; got "
            f"{to.name}. Name one."
        )


def _write_mask(model: Exported, to: Path) -> list[str]:
    size = save_agent(
        model.agent,
        to,
        round=model.round,
        network=model.network,
        metrics=model.metrics,
        pixels=model.pixels,
    )
    file = read_personal(to)
    weights = sum(mask.numel() for mask in file.masks.values())
    whole = human_bytes(sum(x.numel() * x.element_size() for x in file.tensors.values()))
    lines = [f"{to}: {human_bytes(size)} for {weights:,} masked weights; without masks {whole}"]
    if file.stored:
        why = _why_stored(model.agent.parameters())
        lines.append(f"{human_bytes(file.stored)} of it are weights that are stored: {why}")
    if not model.network:
        lines.append(
            "it names no model function, and predict has none: a file names a class of networks, "
            "or a function of a module that is called model_fn or annotated to return one, and "
            "needs nothing but settings; load_personal takes any other, load_personal(path, "
            "model_fn)"
        )
    if not file.facts.get("probe", {}).get("outputs", True):
        lines.append(
            "its network gives no outputs for made-up inputs, or others each time: load_personal "
            "cannot see whether a model function's network calculates the same"
        )
    return lines


def _why_stored(parameters: Mapping[str, Any]) -> str:
    weight_init = parameters.get("weight_init")
    if weight_init is None:
        return "the algorithm trains weights"
    if FUSIONS.find(parameters.get("fusion", "mcepl")).blend is not None:
        return "its rule of fusion blends masks, which leaves parts of weights"
    if weight_init == SIGNED_CONSTANT:
        return "under its masks they are no signed constants any more"
    return (
        "the run's seed does not draw them again, as it does with PyTorch's own initialization and "
        'with weight-init = "signed-constant"'
    )


def _write_graph(model: Exported, to: Path) -> list[str]:
    network, lines = predicting_network(model.agent), []
    batches = tensor_batches(_test_batches(model.agent), network)
    if not model.whole:
        network, line = compact_or_whole(network, batches)
        lines.append(line)
    write = export_onnx if to.suffix == EXPORTS["onnx"] else export_program
    agreed = write(network, to, batches)
    return [*lines, f"{to}: {human_bytes(to.stat().st_size)}; read back: {agreed}"]


# A norm by the statistics of a batch, or a layer that takes another axis for the batch,
# learns and is evaluated well enough. On a device inputs come one by one.
def _beside_others(agent: Agent) -> list[str]:
    """A line, if what an input gets depends on the inputs beside it."""
    if getattr(agent, "data", None) is None:
        return []
    inputs, _ = next(iter(_test_batches(agent)), (None, None))
    if not isinstance(inputs, Tensor) or len(inputs) < 3:
        return []
    network = predicting_network(agent)
    whole = taken(inputs, network)
    try:
        with torch.no_grad():
            all_of_them, two = (one_output(network(x)) for x in (whole, whole[:2]))
        gap, most = (all_of_them[:2] - two).abs().max(), all_of_them.abs().max()
        if bool(gap <= ALIKE * most):
            return []
    except DataError:  # which of its outputs counts, nobody knows
        return []
    except Exception:  # such as of a network for batches of one size
        pass
    return [
        f"an input gets other outputs, or none, in a batch of 2 than in one of {len(inputs)}: what "
        "the agent was evaluated with does not hold for single inputs. Look for a norm without "
        "running statistics, a dropout that is never off, or a layer that takes another axis for "
        "the batch (batch_first)."
    ]


def _test_batches(agent: Agent) -> Any:
    data = getattr(agent, "data", None)
    if data is None:
        raise ConfigError(
            f"an exported graph is checked on the agent's test split, and agents of "
            f"{agent.algorithm} hold no data of their own. Export to .mask."
        )
    # parameters of an algorithm of one's own need not say it
    config, usual = getattr(agent, "config", None), TrainingConfig.eval_batch_size
    return data.test.evaluation_batches(batch_size=getattr(config, "eval_batch_size", usual))
