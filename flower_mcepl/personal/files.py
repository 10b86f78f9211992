"""Files of personal models: ``.mask``, ``.pt2`` and ``.onnx``, one door for all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_mcepl.agents import Agent
from flower_mcepl.errors import ConfigError
from flower_mcepl.masks.fusion import FUSIONS
from flower_mcepl.masks.weight_init import SIGNED_CONSTANT
from flower_mcepl.personal.agents import personal_network, save_agent
from flower_mcepl.personal.compacting import compact_or_whole
from flower_mcepl.personal.exporting import export_onnx, export_program, tensor_batches
from flower_mcepl.personal.reading import read_personal
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.record.values import human_bytes


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
    return (_write_mask if to.suffix == EXPORTS["mask"] else _write_graph)(model, to)


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
            "its model function has no name that can be imported: load_personal needs one, "
            "load_personal(path, model_fn)"
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
    network, lines = personal_network(model.agent), []
    batches = tensor_batches(_test_batches(model.agent), network)
    if not model.whole:
        network, line = compact_or_whole(network, batches)
        lines.append(line)
    write = export_onnx if to.suffix == EXPORTS["onnx"] else export_program
    agreed = write(network, to, batches)
    return [*lines, f"{to}: {human_bytes(to.stat().st_size)}; read back: {agreed}"]


def _test_batches(agent: Agent) -> Any:
    data = getattr(agent, "data", None)
    if data is None:
        raise ConfigError(
            f"an exported graph is checked on the agent's test split, and agents of "
            f"{agent.algorithm} hold no data of their own. Export to .mask."
        )
    return data.test.evaluation_batches(batch_size=agent.config.eval_batch_size)  # type: ignore[attr-defined]
